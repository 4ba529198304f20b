"""Wide residual networks for CIFAR (Zagoruyko & Komodakis, BMVC 2016)."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models.auxiliary import AuxiliaryClassifier
from models.layers import Backbone, copy_stages, global_pool, init_weights, tapped


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv twice; where the width changes, a 1x1 `convShortcut` takes the activated input."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = None
        if in_width != width or stride != 1:
            self.convShortcut = nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, not activated, (B, in, H, W) -> (B, width, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        return self.conv2(out).add_(shortcut)


class BlockGroup(nn.Module):
    """Blocks of one width under the published key `layer`."""

    def __init__(self, repeats: int, in_width: int, width: int, stride: int):
        super().__init__()
        rest = [PreActivationBlock(width, width, 1) for _ in range(repeats - 1)]
        self.layer = nn.Sequential(PreActivationBlock(in_width, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride)."""
        return self.layer(x)


class WideResNet(Backbone):
    """WRN of depth 6n + 4; the taps are the raw outputs of the three groups, before the next BatchNorm."""

    def __init__(self, depth: int, widen: int, num_classes: int):
        super().__init__()
        self.repeats = (depth - 4) // 6
        self.widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = self.make_stage(0)
        self.block2 = self.make_stage(1)
        self.block3 = self.make_stage(2)
        self.bn1 = nn.BatchNorm2d(self.widths[-1])
        self.fc = nn.Linear(self.widths[-1], num_classes)
        init_weights(self)

    def make_stage(self, index: int, repeated: bool = False) -> BlockGroup:
        """Return a new block group `index`; a repeated one takes its own output at stride 1."""
        width = self.widths[index + 1]
        in_width = width if repeated else self.widths[index]
        return BlockGroup(self.repeats, in_width, width, 1 if index == 0 or repeated else 2)

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the raw outputs of the three groups (strides 1, 2, 4) and the embedding (B, 64 * widen)."""
        x = self.conv1(x)
        taps = tapped((self.block1, self.block2, self.block3), x)
        return taps, global_pool(F.relu(self.bn1(taps[-1]), inplace=True))

    def build_auxiliary(self, num_outputs: int) -> AuxiliaryClassifier:
        """Return three branches of the remaining groups, each with the BatchNorm that pre-activation still owes."""
        width = self.widths[-1]
        tails = [nn.BatchNorm2d(width) for _ in range(3)]
        auxiliary = AuxiliaryClassifier(copy_stages(self.make_stage, 3), width, num_outputs, tails, "bn")
        init_weights(auxiliary)
        return auxiliary


BACKBONES = {f"wrn_{depth}_{widen}": partial(WideResNet, depth, widen) for depth in (16, 40) for widen in (1, 2)}
