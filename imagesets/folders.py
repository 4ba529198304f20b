"""Folders of images: what is in them, and how they are read."""

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets.folder import make_dataset

from imagesets.images import FORMATS, UNREADABLE, ImageSet, Settings, header
from utils import UserError, first_line, warn

STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's
TESTS = {
    "tinyimagenet": ("val_sorted", "val"),
    "imagefolder": ("val_sorted", "val", "valid", "test"),
    "imagenet": ("val",),
}
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")  # listed unopened
LARGEST_CHOSEN = 96  # pixels a side of own images whose size is not given
MEMORY = 2e9  # bytes of images that are kept in memory


def find(name: str, root: Path, settings: Settings, test_alone: bool) -> tuple[ImageSet | None, ImageSet]:
    """Return (training images, test images) of `root/train/<class>/` and the first test folder that has classes.

    The former are None if they are missing, or not needed since tests alone are read. Raises UserError for folders
    that cannot be used.
    """
    if name == "tinyimagenet":
        root = tiny_imagenet(root)
    size = settings.size or (224 if name == "imagenet" else None)
    train_folder = root / "train" if (root / "train").is_dir() else None
    test_folder = next((root / part for part in TESTS[name] if class_names(root / part)), None)
    if settings.test_split and not test_folder:
        whole = read_folder(train_folder or root)
        if settings.split_of not in (None, len(whole)):
            changed = f"{len(whole)} images, {settings.split_of} when the test images were drawn"
            warn(f"warning: {root}: {changed}: others are drawn now, and may have been trained on")
        train, test = (replace(part, split_of=len(whole)) for part in whole.stratified(1 - settings.test_split))
    elif not test_folder:
        places = " or ".join(f"{root / part}/<class>/*" for part in TESTS[name] if part != "val_sorted")
        raise UserError(f"no images: put them at {root / 'train'}/<class>/* and {places}")
    else:
        train = read_folder(train_folder) if train_folder and not (test_alone and size) else None
        test = read_folder(test_folder)
    if train and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[:3]
        raise UserError(f"{test_folder}: its class folders must be those of {train_folder} (check: {', '.join(odd)})")
    changed = reading(name, train or test, size, settings)
    return train and replace(train, **changed), replace(test, **changed)


def tiny_imagenet(root: Path) -> Path:
    """Return the folder of TinyImageNet at or below `root`, with its validation images sorted by class."""
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    if not (root / "train").is_dir():
        raise UserError(f"tinyimagenet: unpack tiny-imagenet-200.zip so that {root / 'tiny-imagenet-200'} exists")
    if (root / "val" / "images").is_dir() and not (root / "val_sorted").is_dir():
        raise UserError(f"sort the validation images first: python data/preprocess_tinyimagenet.py {root}")
    return root


def class_names(folder: Path) -> list[str]:
    """Return the sorted names of the class folders in `folder`, without hidden ones; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_folder(folder: Path) -> ImageSet:
    """Return the images of `folder/<class>/`, without hidden files; print what is there on stderr.

    A file of unknown extension is opened to see whether it is an image. UserError if a class has no images.
    """
    left_out = []

    def is_image(path: str) -> bool:
        if f"{os.sep}." in path[len(str(folder)) :]:
            return False  # such as the ._1.png that macOS leaves beside 1.png in an archive
        if path.lower().endswith(ENDINGS) or header(path):
            return True
        left_out.append(Path(path))
        return False

    names = class_names(folder)
    if not names:
        raise UserError(f"no images: put them at {folder}/<class>/*")
    try:
        samples = make_dataset(folder, {name: number for number, name in enumerate(names)}, is_valid_file=is_image)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: {first_line(error).removesuffix('.')}{not_images(left_out)}") from None
    paths, labels = zip(*samples, strict=True)
    counts = Counter(labels)
    ends = min(counts, key=counts.get), max(counts, key=counts.get)
    smallest, largest = (f"{names[number]} {counts[number]}" for number in ends)
    listed = f"images: {len(labels)}, classes: {len(names)} (smallest {smallest}, largest {largest})"
    warn(f"{folder}: {listed}{not_images(left_out)}")
    if len(names) == 1:
        warn(f"warning: {folder} has one class, {names[0]}: are the folders of the classes one level deeper?")
    return ImageSet(torch.tensor(labels), names, STATISTICS, paths=np.array([os.fsencode(path) for path in paths]))


def not_images(paths: Iterable[Path]) -> str:
    """Return the number of non-image files by extension, as the rest of a line; empty if there are none."""
    counts = Counter(path.suffix or "with no extension" for path in paths)
    listed = ", ".join(f"{count} {ending}" for ending, count in counts.items())
    heif = {".heic", ".heif"} & {ending.lower() for ending in counts} and "HEIF" not in FORMATS
    return f"; not images: {listed}" * bool(listed) + " (pip install pillow-heif reads HEIC)" * bool(heif)


def reading(name: str, images: ImageSet, size: int | None, settings: Settings) -> dict:
    """Return the ImageSet fields that up to 100 of `images` decide (`grey_range`: 2,000); report them on stderr."""
    headers = [found for found in map(header, images.some(100).paths) if found]
    if not headers:
        raise UserError(f"unreadable image {os.fsdecode(images.paths[0])}, and so are others")
    sides, grey_range = np.array([found.size for found in headers]), settings.grey_range
    size = size or min(int(np.median(sides.min(1))), LARGEST_CHOSEN)
    if not grey_range and any(found.mode.startswith("I") for found in headers):
        grey_range = measured_range(images)
        warn(f"16-bit grey: {grey_range[0]} becomes black and {grey_range[1]} white")
    keep = settings.keep or ("memory" if name != "imagenet" and len(images) * 3 * size**2 <= MEMORY else "files")
    if settings.crop_size and keep == "files":
        size = settings.crop_size
    if name == "imagefolder":
        (wide, high), (widest, highest) = sides.min(0), sides.max(0)
        warn(f"images of {wide} x {high} to {widest} x {highest} pixels, read as {size} x {size} ({settings.resize})")
        if settings.resize == "crop" and np.median(sides.max(1) / sides.min(1)) > 2:
            warn("warning: most images are more than twice as long as wide and lose their ends: see --resize")
        numbers = [int(text) for text in images.classes if text.isdecimal()]
        if len(numbers) == len(images.classes) and numbers != sorted(numbers) and not settings.class_names:
            warn(f"warning: class folders are sorted as text, {', '.join(images.classes[:3])} ...: see --class-names")
    changed = {"size": size, "resize": settings.resize, "in_memory": keep == "memory"}
    changed["margin"] = settings.margin or (256 / 224 if name == "imagenet" else 1.0)
    return changed | ({"grey_range": tuple(grey_range)} if grey_range else {})


def measured_range(images: ImageSet) -> tuple[int, int]:
    """Return the smallest and the largest value in the 16-bit grey images among 2,000, at most, of `images`."""
    low, high = 2**31, 0
    for path in images.some(2000).paths:
        with suppress(*UNREADABLE), Image.open(os.fsdecode(path), formats=FORMATS) as image:
            if image.mode.startswith("I"):
                values = np.asarray(image)
                low, high = min(low, int(values.min())), max(high, int(values.max()))
    return low, max(high, low + 1)
