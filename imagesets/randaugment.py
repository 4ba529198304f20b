"""RandAugment (Cubuk et al., 2020) and Cutout of whole batches on the device, distributed as torchvision's."""

import math
from typing import Any

import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as v2

# torchvision's, in its order; at magnitude 9 of 0 to 30, which is its default.
OPERATIONS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast")
OPERATIONS += ("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")
SHARE = 9 / 30
SHEAR, TRANSLATE, ROTATE, ENHANCE = 0.3 * SHARE, 150 / 331 * SHARE, math.radians(30) * SHARE, 0.9 * SHARE
POSTERIZE, SOLARIZE = 7, 255 * (1 - SHARE)
COUNT = 2  # operations of an image
GREY = 127  # fills a Cutout


class RandAugmented:
    """Another augmentation, then two operations of RandAugment, and Cutout of a quarter of the side if asked for."""

    def __init__(self, inner: Any, cutout: bool = False):
        self.inner, self.size, self.cutout = inner, inner.size, cutout
        self.moves = moves(inner.size)

    def __repr__(self):
        return f"RandAugmented({self.inner}, {self.cutout})"

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
        self.moves = self.moves.to(images.device)
        for number in range(COUNT):
            images = operate(images, own[:, number], own[:, COUNT + number], self.moves)
        return cut_out(images, own[:, -2:]) if self.cutout else images


def moves(size: int) -> torch.Tensor:
    """Return (14, 2, 2, 3): of each operation and sign, output to input coordinates from the centre, in pixels."""
    found = torch.eye(2, 3).repeat(len(OPERATIONS), 2, 1, 1)
    for number, sign in enumerate((-1, 1)):
        shift, turn = int(TRANSLATE * size), sign * ROTATE
        shear = sign * SHEAR
        matrices = {  # a shear leaves the upper left corner where it is
            "ShearX": [[1, shear, shear * size / 2], [0, 1, 0]],
            "ShearY": [[1, 0, 0], [shear, 1, shear * size / 2]],
            "TranslateX": [[1, 0, -sign * shift], [0, 1, 0]],
            "TranslateY": [[1, 0, 0], [0, 1, -sign * shift]],
            "Rotate": [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0]],
        }
        for name, matrix in matrices.items():
            found[OPERATIONS.index(name), number] = torch.tensor(matrix)
    return found


def operate(images: torch.Tensor, operation: torch.Tensor, sign: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """Return `images` (B, 3, S, S) uint8 after each one's `operation` (B,), of magnitude + or - by `sign` (B,)."""
    images = enhanced(resampled(images, moved[operation, sign]), operation, sign)
    changes = {
        "Posterize": lambda x: v2.posterize(x, POSTERIZE),
        "Solarize": lambda x: v2.solarize(x, SOLARIZE),
        "AutoContrast": v2.autocontrast,
        "Equalize": v2.equalize,
    }
    for name, change in changes.items():
        images = torch.where(chosen(operation, name), change(images), images)
    return images


def chosen(operation: torch.Tensor, name: str) -> torch.Tensor:
    """Return (B, 1, 1, 1): whether an image's operation is the one named."""
    return (operation == OPERATIONS.index(name)).view(-1, 1, 1, 1)


def resampled(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Return `images` (B, 3, S, S) uint8, moved by matrices (B, 2, 3): the nearest pixel, black from outside."""
    half = images.shape[-1] / 2
    scale = matrices.new_tensor([[half, half, 1.0]]) / half  # F.affine_grid counts from -1 to 1
    grid = F.affine_grid(matrices * scale, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)


def enhanced(images: torch.Tensor, operation: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Return `images` (B, 3, S, S) uint8, brightness, colour, contrast or sharpness of some less or more.

    Each is a blend with a degenerate image: black, grey, its mean, blurred.
    """
    pixels = images.float()
    grey = (0.2989 * pixels[:, :1] + 0.587 * pixels[:, 1:2] + 0.114 * pixels[:, 2:]).floor()
    kernel = pixels.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    blurred = pixels.clone()  # but for its border
    blurred[..., 1:-1, 1:-1] = F.conv2d(pixels, kernel.expand(3, 1, 3, 3), groups=3).round()
    degenerate, blended = torch.zeros_like(pixels), chosen(operation, "Brightness")
    for name, image in (("Color", grey), ("Contrast", grey.mean((1, 2, 3), keepdim=True)), ("Sharpness", blurred)):
        here = chosen(operation, name)
        degenerate, blended = torch.where(here, image, degenerate), blended | here
    share = torch.where(blended, ENHANCE * (1 - 2 * sign.view(-1, 1, 1, 1)), 0)  # of the degenerate image
    return (pixels + share * (degenerate - pixels)).clamp(0, 255).to(torch.uint8)


def cut_out(images: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return `images` (B, 3, S, S) uint8 with a grey square of a quarter of the side about `centres` (B, 2)."""
    size = images.shape[-1]
    offsets = torch.arange(size, device=images.device) - centres.unsqueeze(2)  # (B, 2, S)
    inside = (offsets >= -(size // 8)) & (offsets < size // 4 - size // 8)
    return images.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1), GREY)


def random_cut_out(image: torch.Tensor) -> torch.Tensor:
    """Return `image` (3, S, S) uint8 with one such square at random."""
    return cut_out(image[None], torch.randint(image.shape[-1], (1, 2)))[0]
