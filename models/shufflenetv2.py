"""ShuffleNetV2 1x for CIFAR (Ma et al., ECCV 2018): 1x1 stem, no max-pool."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.auxiliary import AuxiliaryClassifier
from models.layers import Backbone, channel_shuffle, copy_stages, global_pool, tapped

STEM_WIDTH = 24
WIDTHS = (116, 232, 464)
REPEATS = (3, 7, 3)
FINAL_WIDTH = 1024


def depthwise(width: int, stride: int) -> nn.Conv2d:
    """Return a depthwise 3x3 convolution."""
    return nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)


class SplitUnit(nn.Module):
    """Half of the channels pass, the other half go through three convolutions; then the halves are shuffled."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = depthwise(half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H, W), the shape of the input."""
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)), inplace=True)
        return channel_shuffle(torch.cat([kept, out], dim=1), 2)


class DownUnit(nn.Module):
    """Both halves of the output come from all channels of the input, through two and three convolutions."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        half = width // 2
        self.conv1 = depthwise(in_width, stride)
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv2 = nn.Conv2d(in_width, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_width, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = depthwise(half, stride)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride)."""
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return channel_shuffle(torch.cat([left, right], dim=1), 2)


def make_stage(index: int, repeated: bool = False) -> nn.Sequential:
    """Return a new stage `index`; a repeated one takes its own output, with a down-sampling unit of stride 1."""
    width = WIDTHS[index]
    in_width = WIDTHS[index - 1] if index else STEM_WIDTH
    first = DownUnit(width, width, 1) if repeated else DownUnit(in_width, width, 2)
    return nn.Sequential(first, *(SplitUnit(width) for _ in range(REPEATS[index])))


def final_layers() -> list[nn.Module]:
    """Return the 1x1 convolution to the final width with BatchNorm and ReLU."""
    conv = nn.Conv2d(WIDTHS[-1], FINAL_WIDTH, 1, bias=False)
    return [conv, nn.BatchNorm2d(FINAL_WIDTH), nn.ReLU(inplace=True)]


class ShuffleNetV2(Backbone):
    """ShuffleNetV2 with PyTorch's default initialisation; taps are the outputs of the three stages."""

    head_name = "linear"

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.layer1 = make_stage(0)
        self.layer2 = make_stage(1)
        self.layer3 = make_stage(2)
        self.conv2, self.bn2, self.relu = final_layers()
        self.linear = nn.Linear(FINAL_WIDTH, num_classes)

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of the three stages (strides 2, 4, 8) and the embedding (B, 1024)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        taps = tapped((self.layer1, self.layer2, self.layer3), x)
        return taps, global_pool(self.relu(self.bn2(self.conv2(taps[-1]))))

    def build_auxiliary(self, num_outputs: int) -> AuxiliaryClassifier:
        """Return three branches, with PyTorch's default initialisation, each ending in its own final layers."""
        branches = [[*stages, *final_layers()] for stages in copy_stages(make_stage, 3)]
        return AuxiliaryClassifier(branches, FINAL_WIDTH, num_outputs)


BACKBONES = {"ShuffleV2": ShuffleNetV2}
