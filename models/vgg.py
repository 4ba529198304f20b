"""VGG for CIFAR (Simonyan & Zisserman, ICLR 2015), in five blocks and one linear layer."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models.auxiliary import AuxiliaryClassifier
from models.layers import Backbone, global_pool, init_weights

WIDTHS = (64, 128, 256, 512, 512)


class VGG(Backbone):
    """VGG with `convs[i]` convolutions in block i; taps are the activated outputs of blocks 0, 1, 2 and 4."""

    head_name = "classifier"

    def __init__(self, convs: tuple[int, int, int, int, int], num_classes: int, batch_norm: bool = True):
        super().__init__()
        self.convs, self.batch_norm = convs, batch_norm
        for index in range(5):
            self.add_module(f"block{index}", self.make_block(index))
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        init_weights(self, linear_std=0.01)

    def make_block(self, index: int, in_width: int | None = None) -> nn.Sequential:
        """Return a new block `index` without its last ReLU, fed by `in_width` channels or by the block before it."""
        width, layers = WIDTHS[index], []
        for before in [in_width or (3, *WIDTHS)[index]] + [width] * (self.convs[index] - 1):
            layers.append(nn.Conv2d(before, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width)] * self.batch_norm + [nn.ReLU(inplace=True)]
        return nn.Sequential(*layers[:-1])

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the taps (strides 1, 2, 4 and 8, or 16 for 64x64 images) and the embedding (B, 512)."""
        # The published code keeps the pool between blocks 3 and 4 for 64x64 images only. Any other size goes without:
        # every layer is convolutional and the last pool is global, so all sizes from 8x8 up are well defined.
        fourth_pool = x.shape[-2] == x.shape[-1] == 64
        tap0 = F.relu(self.block0(x), inplace=True)
        tap1 = F.relu(self.block1(F.max_pool2d(tap0, 2)), inplace=True)
        tap2 = F.relu(self.block2(F.max_pool2d(tap1, 2)), inplace=True)
        x = F.relu(self.block3(F.max_pool2d(tap2, 2)), inplace=True)
        if fourth_pool:
            x = F.max_pool2d(x, 2)
        tap4 = F.relu(self.block4(x), inplace=True)
        return [tap0, tap1, tap2, tap4], global_pool(tap4)

    def make_branch(self, tap: int) -> list[nn.Module]:
        """Return blocks tap+1..4 with ReLU, pools before all but 4."""
        # Branches have no pool between blocks 3 and 4 at any image size: the published module indices (`.7` then `.9`
        # in branch 1) leave room for the ReLU alone. At 64x64 they therefore end at twice the backbone's resolution.
        layers: list[nn.Module] = []
        for index in range(tap + 1, 5):
            if index < 4:
                layers.append(nn.MaxPool2d(2))
            layers += [self.make_block(index), nn.ReLU(inplace=True)]
        return layers

    def build_auxiliary(self, num_outputs: int) -> AuxiliaryClassifier:
        """Return four branches with PyTorch's default initialisation; the last one repeats blocks 3 and 4, unpooled."""
        last = [self.make_block(3, WIDTHS[4]), nn.ReLU(inplace=True), self.make_block(4), nn.ReLU(inplace=True)]
        branches = [*(self.make_branch(tap) for tap in range(3)), last]
        return AuxiliaryClassifier(branches, WIDTHS[-1], num_outputs)


BACKBONES = {
    "vgg8": partial(VGG, (1, 1, 1, 1, 1), batch_norm=False),  # DPCD's student
    "vgg8_bn": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11_bn": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13_bn": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16_bn": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19_bn": partial(VGG, (2, 2, 4, 4, 4)),
}
