"""ShuffleNetV1 for CIFAR (Zhang et al., CVPR 2018): three groups, 1x1 stem, no max-pool."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.auxiliary import AuxiliaryClassifier
from models.layers import Backbone, channel_shuffle, copy_stages, global_pool, init_weights, tapped

GROUPS = 3
STEM_WIDTH = 24
WIDTHS = (240, 480, 960)
REPEATS = (4, 8, 4)


class ShuffleUnit(nn.Module):
    """Grouped 1x1, depthwise 3x3 and grouped 1x1 convolution; stride 2 concatenates the shortcut, stride 1 adds it."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        out_width = width - in_width if stride == 2 else width
        mid_width = out_width // 4
        # The first unit sees the 24 channels of the stem: too few to group.
        self.groups = 1 if in_width == STEM_WIDTH else GROUPS
        self.conv1 = nn.Conv2d(in_width, mid_width, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid_width)
        self.conv2 = nn.Conv2d(mid_width, mid_width, 3, stride, 1, groups=mid_width, bias=False)
        self.bn2 = nn.BatchNorm2d(mid_width)
        self.conv3 = nn.Conv2d(mid_width, out_width, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(out_width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.groups > 1:
            out = channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return F.relu(out.add_(x), inplace=True)
        # ReLU before the concatenation: BatchNorm's backward pass is slow on slices of a gradient.
        return torch.cat([F.relu(out, inplace=True), F.relu(F.avg_pool2d(x, 3, 2, 1), inplace=True)], dim=1)


def make_stage(index: int, repeated: bool = False) -> nn.Sequential:
    """Return a new stage `index`; in a repeated one every unit has stride 1 and adds."""
    width = WIDTHS[index]
    in_width = WIDTHS[index - 1] if index else STEM_WIDTH
    first = ShuffleUnit(width, width, 1) if repeated else ShuffleUnit(in_width, width, 2)
    return nn.Sequential(first, *(ShuffleUnit(width, width, 1) for _ in range(REPEATS[index] - 1)))


class ShuffleNetV1(Backbone):
    """ShuffleNetV1 with PyTorch's default initialisation; taps are the outputs of the three stages."""

    head_name = "linear"

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.layer1 = make_stage(0)
        self.layer2 = make_stage(1)
        self.layer3 = make_stage(2)
        self.linear = nn.Linear(WIDTHS[-1], num_classes)

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of the three stages (strides 2, 4, 8) and the embedding (B, 960)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        taps = tapped((self.layer1, self.layer2, self.layer3), x)
        return taps, global_pool(taps[-1])

    def build_auxiliary(self, num_outputs: int) -> AuxiliaryClassifier:
        """Return three branches of the remaining stages."""
        auxiliary = AuxiliaryClassifier(copy_stages(make_stage, 3), WIDTHS[-1], num_outputs)
        init_weights(auxiliary)
        return auxiliary


BACKBONES = {"ShuffleV1": ShuffleNetV1}
