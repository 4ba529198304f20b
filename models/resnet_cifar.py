"""CIFAR ResNets of three stages (He et al., CVPR 2016), and the four times wider ones of RepDistiller's teacher zoo."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models.auxiliary import AuxiliaryClassifier
from models.layers import Backbone, copy_stages, global_pool, init_weights, tapped
from models.resnet import BasicBlock, residual_stage


class CifarResNet(Backbone):
    """ResNet of depth 6n + 2; `widths` are those of the stem and of the three stages, whose outputs are the taps."""

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int):
        super().__init__()
        self.widths = widths
        self.repeats = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = self.make_stage(0)
        self.layer2 = self.make_stage(1)
        self.layer3 = self.make_stage(2)
        self.fc = nn.Linear(widths[-1], num_classes)
        init_weights(self, linear_bias=False)

    def make_stage(self, index: int, repeated: bool = False) -> nn.Sequential:
        """Return a new stage `index`; a repeated one takes its own output at stride 1."""
        width = self.widths[index + 1]
        in_width = width if repeated else self.widths[index]
        stride = 1 if index == 0 or repeated else 2
        return residual_stage(BasicBlock, in_width, width, self.repeats, stride)

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of the three stages (strides 1, 2, 4) and the embedding (B, widths[-1])."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        taps = tapped((self.layer1, self.layer2, self.layer3), x)
        return taps, global_pool(taps[-1])

    def build_auxiliary(self, num_outputs: int) -> AuxiliaryClassifier:
        """Return three branches of the remaining stages."""
        auxiliary = AuxiliaryClassifier(copy_stages(self.make_stage, 3), self.widths[-1], num_outputs)
        init_weights(auxiliary)
        return auxiliary


THIN = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)

BACKBONES = {f"resnet{depth}": partial(CifarResNet, depth, THIN) for depth in (8, 14, 20, 32, 44, 56, 110)}
BACKBONES |= {f"resnet{depth}x4": partial(CifarResNet, depth, WIDE) for depth in (8, 32)}
