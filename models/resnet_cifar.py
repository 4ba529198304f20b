"""CIFAR ResNets of three stages (He et al., CVPR 2016), and the four times wider ones of RepDistiller's teacher zoo."""

from functools import partial

from models.resnet import BasicBlock, ResNet


class CifarResNet(ResNet):
    """ResNet of depth 6n + 2; `widths` are those of the stem and of the three stages."""

    zero_aux_bias = small_images = True

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int):
        super().__init__(BasicBlock, ((depth - 2) // 6,) * 3, num_classes, widths[0], widths[1:])


THIN = (16, 16, 32, 64)
WIDE = (32, 64, 128, 256)

BACKBONES = {f"resnet{depth}": partial(CifarResNet, depth, THIN) for depth in (8, 14, 20, 32, 44, 56, 110)}
BACKBONES |= {f"resnet{depth}x4": partial(CifarResNet, depth, WIDE) for depth in (8, 32)}
