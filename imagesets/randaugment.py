"""RandAugment (Cubuk et al., 2020) and Cutout of whole batches on the device, distributed as torchvision's."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms.v2 import functional as v2

SHARE = 9 / 30  # of the largest magnitude, torchvision's default
SHEAR, ENHANCE = math.degrees(math.atan(0.3 * SHARE)), 0.9 * SHARE
# torchvision's operations in its order: functions of images (B, 3, S, S) uint8 and of the magnitude's sign.
OPERATIONS = {
    "Identity": lambda x, _: x,
    "ShearX": lambda x, sign: v2.affine(x, 0, [0, 0], 1, [sign * SHEAR, 0], center=[0, 0]),
    "ShearY": lambda x, sign: v2.affine(x, 0, [0, 0], 1, [0, sign * SHEAR], center=[0, 0]),
    "TranslateX": lambda x, sign: v2.affine(x, 0, [sign * shift(x), 0], 1, [0, 0]),
    "TranslateY": lambda x, sign: v2.affine(x, 0, [0, sign * shift(x)], 1, [0, 0]),
    "Rotate": lambda x, sign: v2.rotate(x, sign * 30 * SHARE),
    "Brightness": lambda x, sign: v2.adjust_brightness(x, 1 + sign * ENHANCE),
    "Color": lambda x, sign: v2.adjust_saturation(x, 1 + sign * ENHANCE),
    "Contrast": lambda x, sign: v2.adjust_contrast(x, 1 + sign * ENHANCE),
    "Sharpness": lambda x, sign: v2.adjust_sharpness(x, 1 + sign * ENHANCE),
    "Posterize": lambda x, _: v2.posterize(x, 7),
    "Solarize": lambda x, _: v2.solarize(x, 255 * (1 - SHARE)),
    "AutoContrast": lambda x, _: v2.autocontrast(x),
    "Equalize": lambda x, _: v2.equalize(x),
}
COUNT = 2  # operations of an image
GREY = 127  # fills a Cutout


def shift(images: torch.Tensor) -> int:
    """Return the pixels of a translation."""
    return int(150 / 331 * SHARE * images.shape[-1])


@dataclass
class RandAugmented:
    """Another augmentation, then two operations of RandAugment, and Cutout of a quarter of the side if asked for."""

    inner: Any
    cutout: bool = False

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.inner.size

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return the inner draws with columns of operations, of signs (0 or 1), and of the Cutout's centre."""
        columns = [self.inner.draw(count, generator)]
        for highest in (len(OPERATIONS), 2, self.size)[: 3 if self.cutout else 2]:
            columns.append(torch.randint(highest, (count, COUNT), generator=generator))
        return torch.cat(columns, dim=1)

    def apply(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Augment `images` (B, 3, S, S) uint8, each by its row of `draws`."""
        own = draws[:, -2 * COUNT - 2 * self.cutout :]
        images = self.inner.apply(images, draws[:, : -own.shape[1]]).round().to(torch.uint8)
        for number in range(COUNT):
            images = operate(images, own[:, number], own[:, COUNT + number])
        return cut_out(images, own[:, -2:]) if self.cutout else images


def operate(images: torch.Tensor, operations: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return `images` (B, 3, S, S) uint8 after each one's operation (B,), of magnitude + or - by its sign (B,)."""
    images = images.clone()
    for number, change in enumerate(OPERATIONS.values()):
        for sign in (0, 1):
            rows = (operations == number) & (signs == sign)
            if rows.any():
                images[rows] = change(images[rows], 2 * sign - 1)
    return images


def cut_out(images: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return `images` (B, 3, S, S) uint8 with a grey square of a quarter of the side about `centres` (B, 2)."""
    size = images.shape[-1]
    offsets = torch.arange(size, device=images.device) - centres.unsqueeze(2)  # (B, 2, S)
    inside = (offsets >= -(size // 8)) & (offsets < size // 4 - size // 8)
    return images.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1), GREY)


def random_cut_out(image: torch.Tensor) -> torch.Tensor:
    """Return `image` (3, S, S) uint8 with one such square at random."""
    return cut_out(image[None], torch.randint(image.shape[-1], (1, 2)))[0]
