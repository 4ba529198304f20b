"""Four-stage ResNets (He et al., CVPR 2016): torchvision's layout for ImageNet, and ResNet50 with a CIFAR stem."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.auxiliary import AuxiliaryClassifier
from models.layers import Backbone, copy_stages, global_pool, init_weights, tapped


class CifarBottleneck(Bottleneck):
    """The bottleneck under the keys of the published CIFAR ResNet50: its projection is called `shortcut`."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1, shortcut: nn.Module | None = None):
        super().__init__(in_planes, planes, stride)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(residual + shortcut), (B, in, H, W) -> (B, 4 * planes, H / stride, W / stride)."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(residual)))))
        return self.relu(residual.add_(x if self.shortcut is None else self.shortcut(x)))


def residual_stage(block: type[nn.Module], in_planes: int, planes: int, repeats: int, stride: int) -> nn.Sequential:
    """Return `repeats` blocks, the first of which changes width and stride, with a projection where it does."""
    out_planes = planes * block.expansion
    projection = None
    if stride != 1 or in_planes != out_planes:
        conv = nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)
        projection = nn.Sequential(conv, nn.BatchNorm2d(out_planes))
    rest = [block(out_planes, planes) for _ in range(repeats - 1)]
    return nn.Sequential(block(in_planes, planes, stride, projection), *rest)


class ImageNetResNet(Backbone):
    """ResNet with torchvision's keys and function; taps are the outputs of the four stages, strides 4, 8, 16, 32."""

    planes = (64, 128, 256, 512)

    def __init__(self, block: type[nn.Module], repeats: tuple[int, int, int, int], num_classes: int):
        super().__init__()
        self.block = block
        self.repeats = repeats
        self.add_stem()
        for index in range(4):
            self.add_module(f"layer{index + 1}", self.make_stage(index))
        self.add_module(self.head_name, nn.Linear(self.planes[-1] * block.expansion, num_classes))
        init_weights(self, linear_bias=False)

    def add_stem(self) -> None:
        """Register the first convolution, 7x7 with stride 2."""
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)

    def stem(self, x: Tensor) -> Tensor:
        """Return (B, 64, H / 4, W / 4)."""
        return F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)

    def make_stage(self, index: int, repeated: bool = False) -> nn.Sequential:
        """Return a new stage `index`; a repeated one takes its own output at stride 1."""
        expansion = self.block.expansion
        in_planes = 64 if index == 0 else self.planes[index - 1] * expansion
        if repeated:
            in_planes = self.planes[index] * expansion
        stride = 1 if index == 0 or repeated else 2
        return residual_stage(self.block, in_planes, self.planes[index], self.repeats[index], stride)

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of the four stages and the embedding (B, 512 * expansion)."""
        x = self.stem(x)
        taps = tapped((self.layer1, self.layer2, self.layer3, self.layer4), x)
        return taps, global_pool(taps[-1])

    def build_auxiliary(self, num_outputs: int) -> AuxiliaryClassifier:
        """Return four branches of the remaining stages."""
        auxiliary = AuxiliaryClassifier(copy_stages(self.make_stage, 4), self.head.in_features, num_outputs)
        init_weights(auxiliary, linear_bias=False)
        return auxiliary


class CifarResNet50(ImageNetResNet):
    """ResNet50 for small images: 3x3 stride-1 stem, no max-pool, `linear` head; taps at strides 1, 2, 4, 8."""

    head_name = "linear"

    def __init__(self, num_classes: int):
        super().__init__(CifarBottleneck, (3, 4, 6, 3), num_classes)

    def add_stem(self) -> None:
        """Register the first convolution, 3x3 with stride 1."""
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)

    def stem(self, x: Tensor) -> Tensor:
        """Return (B, 64, H, W)."""
        return F.relu(self.bn1(self.conv1(x)), inplace=True)


BACKBONES = {
    "ResNet50": CifarResNet50,
    "resnet18_imagenet": partial(ImageNetResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34_imagenet": partial(ImageNetResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50_imagenet": partial(ImageNetResNet, Bottleneck, (3, 4, 6, 3)),
}
