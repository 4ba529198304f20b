"""Four-stage ResNets (He et al., CVPR 2016): torchvision's layout for ImageNet, and ResNet50 with a CIFAR stem."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet

from models.auxiliary import AuxiliaryClassifier
from models.layers import Backbone, copy_stages, global_pool, init_weights, tapped


class BasicBlock(resnet.BasicBlock):
    """torchvision's block; the shortcut is computed first, which sets the order in which gradients are summed."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(residual + shortcut), (B, in, H, W) -> (B, planes, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(residual.add_(shortcut))


class Bottleneck(resnet.Bottleneck):
    """torchvision's bottleneck, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(residual + shortcut), (B, in, H, W) -> (B, 4 * planes, H / stride, W / stride)."""
        shortcut = self.project(x)
        residual = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(self.bn3(self.conv3(residual)).add_(shortcut))

    def project(self, x: Tensor) -> Tensor:
        """Return the shortcut."""
        return x if self.downsample is None else self.downsample(x)


class CifarBottleneck(Bottleneck):
    """The bottleneck under the keys of the published CIFAR ResNet50: its projection is called `shortcut`."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1, shortcut: nn.Module | None = None):
        super().__init__(in_planes, planes, stride)
        self.shortcut = shortcut

    def project(self, x: Tensor) -> Tensor:
        """Return the shortcut."""
        return x if self.shortcut is None else self.shortcut(x)


def residual_stage(block: type[nn.Module], in_planes: int, planes: int, repeats: int, stride: int) -> nn.Sequential:
    """Return `repeats` blocks, the first of which changes width and stride, with a projection where it does."""
    out_planes = planes * block.expansion
    projection = None
    if stride != 1 or in_planes != out_planes:
        conv = nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)
        projection = nn.Sequential(conv, nn.BatchNorm2d(out_planes))
    rest = [block(out_planes, planes) for _ in range(repeats - 1)]
    return nn.Sequential(block(in_planes, planes, stride, projection), *rest)


class ResNet(Backbone):
    """ResNet with torchvision's keys and function; taps are the outputs of the stages, at strides 4, 8, 16, 32."""

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
        self.conv1 = self.stem_conv()
        self.bn1 = nn.BatchNorm2d(stem_width)
        for index in range(len(planes)):
            self.add_module(f"layer{index + 1}", self.make_stage(index))
        self.add_module(self.head_name, nn.Linear(planes[-1] * block.expansion, num_classes))
        init_weights(self, linear_bias=False)

    def stem_conv(self) -> nn.Conv2d:
        """Return the first convolution, 7x7 with stride 2."""
        return nn.Conv2d(3, self.stem_width, 7, 2, 3, bias=False)

    def stem(self, x: Tensor) -> Tensor:
        """Return (B, 64, H / 4, W / 4)."""
        return F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)

    def make_stage(self, index: int, repeated: bool = False) -> nn.Sequential:
        """Return a new stage `index`; a repeated one takes its own output at stride 1."""
        before = index if repeated else index - 1
        in_planes = self.planes[before] * self.block.expansion if before >= 0 else self.stem_width
        stride = 1 if index == 0 or repeated else 2
        return residual_stage(self.block, in_planes, self.planes[index], self.repeats[index], stride)

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of the stages and the embedding (B, last planes * expansion)."""
        stages = (getattr(self, f"layer{index + 1}") for index in range(len(self.planes)))
        taps = tapped(stages, self.stem(x))
        return taps, global_pool(taps[-1])

    def build_auxiliary(self, num_outputs: int) -> AuxiliaryClassifier:
        """Return a branch of the remaining stages for each stage."""
        branches = copy_stages(self.make_stage, len(self.planes))
        auxiliary = AuxiliaryClassifier(branches, self.head.in_features, num_outputs)
        init_weights(auxiliary, linear_bias=self.zero_aux_bias)
        return auxiliary


class SmallResNet(ResNet):
    """ResNet for small images: 3x3 stride-1 stem, no max-pool; taps at strides 1, 2, 4, 8."""

    def stem_conv(self) -> nn.Conv2d:
        """Return the first convolution, 3x3 with stride 1."""
        return nn.Conv2d(3, self.stem_width, 3, 1, 1, bias=False)

    def stem(self, x: Tensor) -> Tensor:
        """Return (B, stem width, H, W)."""
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


class CifarResNet50(SmallResNet):
    """ResNet50 for small images, under the published keys."""

    head_name = "linear"


BACKBONES = {
    "ResNet50": partial(CifarResNet50, CifarBottleneck, (3, 4, 6, 3)),
    "resnet18_imagenet": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34_imagenet": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50_imagenet": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
}
