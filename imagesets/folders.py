"""A split of a data set; folders of images, and what an image file holds."""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import UserError, first_line, warn

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")  # torchvision's, and GIF
LARGEST_IN_MEMORY = 96  # pixels a side
SHOWN = 20  # unreadable images that are named


@dataclass
class ImageSet:
    """One split: its images are `pixels` (N, 3, S, S) uint8 on the CPU, or files at `paths` (N,) of encoded names.

    `labels` (N,) int64; `size` is S, also of files once they are read; `statistics` (mean, std) of the normalisation
    are on the scale 0 to 1; `flip` says whether a mirrored image keeps its class.
    """

    labels: torch.Tensor
    classes: list[str]
    size: int
    statistics: tuple
    pixels: torch.Tensor | None = None
    paths: np.ndarray | None = None  # one array, since workers would copy a list of texts
    flip: bool = True
    in_memory: bool = True  # or read from files again in every pass

    def __len__(self):
        return len(self.labels)

    def subset(self, indices: torch.Tensor) -> "ImageSet":
        """Return the images at `indices`, in that order."""
        pixels = None if self.pixels is None else self.pixels[indices]
        paths = None if self.paths is None else self.paths[indices.numpy()]
        return replace(self, labels=self.labels[indices], pixels=pixels, paths=paths)


def class_names(folder: Path) -> list[str]:
    """Return the sorted names of the class folders in `folder`, without hidden ones; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_folder(folder: Path, size: int | None, statistics: tuple) -> ImageSet:
    """Return the images of `folder/<class>/`, without hidden files (macOS leaves ._1.png beside 1.png in an archive).

    Raises UserError if there is no class, or a class has no images: no network would ever see it.
    """
    from torchvision.datasets.folder import make_dataset  # takes a second

    def is_image(path: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(folder).parts)
        return not hidden and path.lower().endswith(ENDINGS)

    names = class_names(folder)
    if not names:
        raise UserError(f"no images: put them at {folder}/<class>/*")
    try:
        samples = make_dataset(folder, {name: number for number, name in enumerate(names)}, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {first_line(error)}") from None
    paths, labels = zip(*samples, strict=True)
    return ImageSet(torch.tensor(labels), names, size, statistics, paths=np.array([os.fsencode(p) for p in paths]))


def find(root: Path, tests: Iterable[str], statistics: tuple, size: int | None) -> tuple[ImageSet | None, ImageSet]:
    """Return the training images in `root`/train, None if there is no such folder, and those of the first test folder.

    The names of possible test folders are `tests`. Without `size` it is the median of the images' shorter sides.
    """
    test_folder = next((root / name for name in tests if class_names(root / name)), None)
    if test_folder is None:
        places = " or ".join(f"{root / name}/<class>/*" for name in tests if name != "val_sorted")
        raise UserError(f"no images: put them at {root}/train/<class>/* and {places}")
    test = read_folder(test_folder, size, statistics)
    train = read_folder(root / "train", size, statistics) if (root / "train").is_dir() else None
    if train and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[:3]
        raise UserError(f"{test_folder}: its class folders must be those of {root / 'train'} (check: {', '.join(odd)})")
    size = size or median_side((train or test).paths)
    return train and replace(train, size=size), replace(test, size=size)


def median_side(paths: np.ndarray) -> int:
    """Return the side that images get in memory: the median of about 100 images' shorter sides, at most 96 pixels."""
    sides = []
    for path in paths[:: math.ceil(len(paths) / 100)]:
        try:
            with Image.open(os.fsdecode(path)) as image:
                sides.append(min(image.size))
        except (OSError, ValueError):
            continue  # reported when all images are read
    return min(int(np.median(sides)) if sides else LARGEST_IN_MEMORY, LARGEST_IN_MEMORY)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a PIL image in 8-bit RGB; of 16-bit grey, which PIL itself would cut off at 255, the upper 8 bits."""
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # else PIL warns of palettes with it
    return image.convert("RGB")


def decode(path: str, size: int | None = None) -> torch.Tensor:
    """Return the image at `path` as (3, H, W) uint8, resized and centre-cropped to `size` if given.

    Raises UserError if it cannot be read.
    """
    damaged = (OSError, ValueError, SyntaxError, RuntimeError, MemoryError, Image.DecompressionBombError)
    try:
        with Image.open(path) as file:
            image = to_rgb(file)
        if size and image.size != (size, size):
            scale = size / min(image.size)
            wide, high = (max(size, round(side * scale)) for side in image.size)
            left, top = (wide - size) // 2, (high - size) // 2
            image = image.resize((wide, high), Image.BILINEAR).crop((left, top, left + size, top + size))
    except damaged as error:
        raise UserError(f"unreadable image {path} ({first_line(error)})") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def into_memory(images: ImageSet, workers: int, skip_bad_images: bool = False) -> ImageSet:
    """Return `images` with their pixels, read by `workers` threads; unreadable ones may be left out."""
    if images.pixels is not None:
        return images
    pixels = torch.empty(len(images), 3, images.size, images.size, dtype=torch.uint8)

    def read(number: int) -> str | None:
        try:
            pixels[number] = decode(os.fsdecode(images.paths[number]), images.size)
        except UserError as error:
            if not skip_bad_images:
                raise UserError(f"{error}; --skip-bad-images leaves it out") from None
            return str(error)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        lines = list(pool.map(read, range(len(images))))
    images = replace(images, pixels=pixels, paths=None)
    bad = [line for line in lines if line]
    if not bad:
        return images
    for line in bad[:SHOWN]:
        warn(f"skipped: {line}")
    warn(f"skipped {len(bad)} unreadable images of {len(lines)}")
    return images.subset(torch.tensor([number for number, line in enumerate(lines) if not line], dtype=torch.int64))
