"""Four-stage ResNets (He et al., CVPR 2016): torchvision's layout for ImageNet, and ResNet50 with a CIFAR stem."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.auxiliary import AuxiliaryClassifier
from models.layers import Backbone, copy_stages, global_pool, init_weights, tapped


class CifarBottleneck(Bottleneck):
    """torchvision's bottleneck under the keys of the published CIFAR ResNet50: its projection is called `shortcut`."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1, shortcut: nn.Module | None = None):
        super().__init__(in_planes, planes, stride)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(residual + shortcut), (B, in, H, W) -> (B, 4 * planes, H / stride, W / stride)."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(residual)))))
        return self.relu(residual.add_(x if self.shortcut is None else self.shortcut(x)))


class ResNet(Backbone):
    """ResNet with torchvision's keys and function; taps are the outputs of the stages, at strides 4, 8, 16, 32.

    For small images the stem has a 3x3 kernel, stride 1 and no max-pool: taps at strides 1, 2, 4, 8.
    """

    small_images = False
    zero_aux_bias = False  # whether the biases of auxiliary classifiers begin at 0

    def __init__(
        self,
        block: type[nn.Module],
        repeats: tuple[int, ...],
        num_classes: int,
        stem_width: int = 64,
        planes: tuple[int, ...] = (64, 128, 256, 512),
    ):
        super().__init__()
        self.block, self.repeats = block, repeats
        self.stem_width, self.planes = stem_width, planes
        kernel, stride = (3, 1) if self.small_images else (7, 2)
        self.conv1 = nn.Conv2d(3, stem_width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        for index in range(len(planes)):
            self.add_module(f"layer{index + 1}", self.make_stage(index))
        self.add_module(self.head_name, nn.Linear(planes[-1] * block.expansion, num_classes))
        init_weights(self, linear_bias=False)

    def make_stage(self, index: int, repeated: bool = False) -> nn.Sequential:
        """Return a new stage `index`, projecting where needed; a repeated one takes its own output at stride 1."""
        block, planes, stride = self.block, self.planes[index], 1 if index == 0 or repeated else 2
        before = index if repeated else index - 1
        in_planes = self.planes[before] * block.expansion if before >= 0 else self.stem_width
        out_planes, projection = planes * block.expansion, None
        if stride != 1 or in_planes != out_planes:
            conv = nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)
            projection = nn.Sequential(conv, nn.BatchNorm2d(out_planes))
        rest = [block(out_planes, planes) for _ in range(self.repeats[index] - 1)]
        return nn.Sequential(block(in_planes, planes, stride, projection), *rest)

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of the stages and the embedding (B, last planes * expansion)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = x if self.small_images else F.max_pool2d(x, 3, 2, 1)
        stages = (getattr(self, f"layer{index + 1}") for index in range(len(self.planes)))
        taps = tapped(stages, x)
        return taps, global_pool(taps[-1])

    def build_auxiliary(self, num_outputs: int) -> AuxiliaryClassifier:
        """Return a branch of the remaining stages for each stage."""
        branches = copy_stages(self.make_stage, len(self.planes))
        auxiliary = AuxiliaryClassifier(branches, self.head.in_features, num_outputs)
        init_weights(auxiliary, linear_bias=self.zero_aux_bias)
        return auxiliary


class CifarResNet50(ResNet):
    """ResNet50 for small images, under the published keys."""

    head_name, small_images = "linear", True


BACKBONES = {
    "ResNet50": partial(CifarResNet50, CifarBottleneck, (3, 4, 6, 3)),
    "resnet18_imagenet": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34_imagenet": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50_imagenet": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
}
