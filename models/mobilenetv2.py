"""MobileNetV2 for CIFAR (Sandler et al., CVPR 2018) at half width: expansion 6, final width 1280."""

from functools import partial

from torch import Tensor, nn

from models.auxiliary import AuxiliaryClassifier
from models.layers import Backbone, global_pool, init_weights, tapped

EXPANSION = 6
FINAL_WIDTH = 1280
STAGES = (  # expansion, width (already halved), repeats, stride
    (1, 8, 1, 1),
    (EXPANSION, 12, 2, 1),
    (EXPANSION, 16, 3, 2),
    (EXPANSION, 32, 4, 2),
    (EXPANSION, 48, 3, 1),
    (EXPANSION, 80, 3, 2),
    (EXPANSION, 160, 1, 1),
)
STEM_WIDTH = 16
TAPPED = (1, 2, 4, 6)


class InvertedResidual(nn.Module):
    """Expanding 1x1, depthwise 3x3 and linear 1x1 convolution, with a residual where the shape stays."""

    def __init__(self, in_width: int, width: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_width * expansion
        self.adds = stride == 1 and in_width == width
        self.conv = nn.Sequential(
            nn.Conv2d(in_width, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride)."""
        return self.conv(x).add_(x) if self.adds else self.conv(x)


def make_stage(index: int, in_width: int | None = None, stride: int | None = None) -> nn.Sequential:
    """Return a new stage `index`, with its usual input width and stride unless told otherwise."""
    expansion, width, repeats, usual_stride = STAGES[index]
    if in_width is None:
        in_width = STAGES[index - 1][1] if index else STEM_WIDTH
    first = InvertedResidual(in_width, width, usual_stride if stride is None else stride, expansion)
    return nn.Sequential(first, *(InvertedResidual(width, width, 1, expansion) for _ in range(repeats - 1)))


def final_conv() -> nn.Sequential:
    """Return the 1x1 convolution to the final width with its BatchNorm; ReLU follows."""
    return nn.Sequential(nn.Conv2d(STAGES[-1][1], FINAL_WIDTH, 1, bias=False), nn.BatchNorm2d(FINAL_WIDTH))


class MobileNetV2(Backbone):
    """MobileNetV2; taps are the linear outputs of stages 1, 2, 4 and 6, counting from 0."""

    head_name = "classifier"

    def __init__(self, stem_stride: int, num_classes: int):
        super().__init__()
        stem = nn.Conv2d(3, STEM_WIDTH, 3, stem_stride, 1, bias=False)
        self.conv1 = nn.Sequential(stem, nn.BatchNorm2d(STEM_WIDTH), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*(make_stage(index) for index in range(len(STAGES))))
        self.conv2 = final_conv().append(nn.ReLU(inplace=True))
        self.classifier = nn.Linear(FINAL_WIDTH, num_classes)
        init_weights(self, linear_std=0.01)

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the taps (strides 1, 2, 4, 8 after the stem's) and the embedding (B, 1280)."""
        outputs = tapped(self.blocks, self.conv1(x))
        return [outputs[index] for index in TAPPED], global_pool(self.conv2(outputs[-1]))

    def build_auxiliary(self, num_outputs: int) -> AuxiliaryClassifier:
        """Return four branches of the remaining stages, each with its own final convolution."""
        branches = [[make_stage(index) for index in range(tap + 1, len(STAGES))] for tap in TAPPED[:-1]]
        # The last tap has the last stage's width: its branch repeats the last two stages at stride 1.
        branches.append([make_stage(5, in_width=STAGES[-1][1], stride=1), make_stage(6)])
        tails = [final_conv() for _ in branches]
        auxiliary = AuxiliaryClassifier(branches, FINAL_WIDTH, num_outputs, tails, "conv2_")
        init_weights(auxiliary, linear_std=0.01)
        return auxiliary


# DPCD runs it with stem stride 2 (6.5 M multiply-adds instead of 25.7 M): accuracies do not compare, so names differ.
BACKBONES = {"mobilenetV2": partial(MobileNetV2, 1), "mobilenetV2_s2": partial(MobileNetV2, 2)}
