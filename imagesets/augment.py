"""Augmentation of whole batches on the device, distributed as torchvision's transforms."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from imagesets.randaugment import RandAugmented


class Augmentation(NamedTuple):
    """What is done to a training image."""

    padding: int | None  # of the random crop; None: a random resized crop, 0: none
    flip: bool
    randaugment: bool = False
    cutout: bool = False  # after RandAugment

    def __str__(self):
        crop = f"random crop with padding {self.padding}" if self.padding else "no random crop"
        crop = "random resized crop" if self.padding is None else crop
        return crop + ", flip" * self.flip + ", RandAugment" * self.randaugment + ", Cutout" * self.cutout

    def on_device(self, source: int, size: int) -> "CropFlip | ResizedCropFlip | RandAugmented":
        """Return the augmentation of batches of images with `source` pixels a side to `size`."""
        is_resized = self.padding is None
        found = ResizedCropFlip(source, size, self.flip) if is_resized else CropFlip(size, self.padding, self.flip)
        return RandAugmented(found, self.cutout) if self.randaugment else found


@dataclass
class CropFlip:
    """Zero-padded random crop and horizontal flip: torchvision's RandomCrop(size, padding) + RandomHorizontalFlip."""

    size: int
    padding: int = 4
    flip: bool = True

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return (count, 3) int64: top and left of the crop in the padded image, and whether to flip."""
        offsets = torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator)
        return torch.cat([offsets, draw_flips(count, generator, self.flip)], dim=1)

    def apply(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Crop and flip `images` (B, 3, S, S) uint8, each by its row of `draws`."""
        b, c, h, w = images.shape
        padded = torch.nn.functional.pad(images, [self.padding] * 4)
        top, left, flip = draws.unsqueeze(-1).unbind(1)
        steps = torch.arange(self.size, device=images.device)
        rows = top + steps
        columns = left + torch.where(flip == 1, self.size - 1 - steps, steps)
        flat = (rows.unsqueeze(2) * (w + 2 * self.padding) + columns.unsqueeze(1)).view(b, 1, -1)
        return padded.flatten(2).gather(2, flat.expand(-1, c, -1)).view(b, c, self.size, self.size)


@dataclass
class ResizedCropFlip:
    """torchvision's RandomResizedCrop(size) + RandomHorizontalFlip of images with `source` pixels a side."""

    source: int
    size: int
    flip: bool = True

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return (count, 5) int64: top, left, height and width of the crop, and whether to flip.

        Of ten boxes the first that fits is taken; a square image's fallback is all of it.
        """
        shape = (count, 10)
        area = self.source**2 * torch.empty(shape).uniform_(0.08, 1.0, generator=generator)
        ratio = torch.empty(shape).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).exp()
        sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=2).round().long()
        fits = ((sides > 0) & (sides <= self.source)).all(2)
        first = fits.int().argmax(1)
        sides = torch.where(fits.any(1, keepdim=True), sides[torch.arange(count), first], self.source)
        room = self.source - sides + 1
        corners = (torch.rand(count, 2, generator=generator) * room).long().minimum(room - 1)
        return torch.cat([corners, sides, draw_flips(count, generator, self.flip)], dim=1)

    def apply(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Crop, resize and flip `images` (B, 3, S, S) uint8, each by its row of `draws`: (B, 3, size, size) float32."""
        b, c, h, w = images.shape
        top, left, height, width, flip = draws.unbind(1)
        rows, columns = resampling(top, height, h, self.size), resampling(left, width, w, self.size)
        columns = torch.where(flip.view(-1, 1, 1) == 1, columns.flip(1), columns)
        narrow = torch.bmm(images.reshape(b, c * h, w).float(), columns.transpose(1, 2)).view(b, c, h, self.size)
        return torch.matmul(rows.unsqueeze(1), narrow)


def draw_flips(count: int, generator: torch.Generator, flip: bool) -> torch.Tensor:
    """Return (count, 1) int64, 1 for an image to be mirrored."""
    return torch.randint(0, 2, (count, 1), generator=generator) if flip else torch.zeros(count, 1).long()


def resampling(start: torch.Tensor, length: torch.Tensor, source: int, size: int) -> torch.Tensor:
    """Return (B, size, source) matrices that resize the `length` pixels from `start` on, each (B,), to `size`.

    A triangle filter, widened by the scale when shrinking (antialiased bilinear, as PIL's), normalised within the box.
    """
    start, length = start.view(-1, 1, 1).float(), length.view(-1, 1, 1).float()
    scale = length / size
    centres = (torch.arange(size, device=start.device).view(1, -1, 1) + 0.5) * scale
    pixels = torch.arange(source, device=start.device).view(1, 1, -1) + 0.5 - start
    weights = (1 - (pixels - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixels > 0) & (pixels < length))
    return weights / weights.sum(2, keepdim=True)
