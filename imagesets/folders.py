"""Every small data set, read once into a uint8 tensor, and the splits of the experiments."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import archives
from utils import UserError, first_line

CIFAR100_STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STL10_STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ARCHIVES = {"cifar100": CIFAR100_STATISTICS, "cifar10": CIFAR10_STATISTICS, "stl10": STL10_STATISTICS}
DIGITS_STATISTICS = ((0.3054,) * 3, (0.3237,) * 3)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")  # torchvision's, and GIF
SMALLEST, LARGEST_IN_MEMORY = 8, 96  # pixels a side
LONGEST = 1000  # an image so many times as long as it is wide would be huge, once its short side is resized


@dataclass
class ImageSet:
    """One split of a data set, its images not read yet.

    `labels` (N,) int64; `read(indices) -> (n, 3, S, S)` uint8 on the CPU; `statistics` the (mean, std) of the
    normalisation, on the scale 0 to 1; `flip` whether a mirrored image keeps its class.
    """

    labels: torch.Tensor
    read: Callable[[torch.Tensor], torch.Tensor]
    classes: list[str]
    statistics: tuple
    size: int
    flip: bool = True

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        """Return the split's images at `indices`, in that order."""
        return replace(self, labels=self.labels[indices], read=lambda i: self.read(indices[i]))

    def images(self):
        """Read all images: (N, 3, S, S) uint8."""
        return self.read(torch.arange(len(self)))


def stratified_share(labels, ratio):
    """Return the indices of the published few-shot split: a stratified share `ratio` of the training set.

    scikit-learn's StratifiedShuffleSplit with random_state 0 over the labels (as the published few-shot runs); 1 means all.
    """
    if ratio == 1:
        return torch.arange(len(labels))
    from sklearn.model_selection import StratifiedShuffleSplit  # a second of import that most runs do not need

    splitter = StratifiedShuffleSplit(n_splits=1, test_size=1 - ratio, random_state=0)
    try:
        kept, _ = next(splitter.split(np.zeros(len(labels)), labels.numpy()))
    except ValueError:  # whose message is of the splitter's arguments
        shares = f"shares of {ratio:g} and {1 - ratio:g}, every class in both"
        raise UserError(f"{len(labels)} images of {len(labels.unique())} classes cannot be stratified into {shares}") from None
    return torch.from_numpy(np.sort(kept))


def in_memory(images, labels, classes, statistics, flip=True):
    """Return an ImageSet over images already decoded, (N, 3, S, S) uint8."""
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return ImageSet(labels, lambda i: images[i], list(classes), statistics, images.shape[-1], flip)


def digits(root, train):
    """Return a split (80/20, stratified, fixed) of scikit-learn's 1,797 digits, scaled to 3 x 32 x 32; `root` is unused."""
    from sklearn.datasets import load_digits

    found = load_digits()
    labels = torch.from_numpy(found.target)
    images = torch.from_numpy(found.images).float().unsqueeze(1) * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = images.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    kept = stratified_share(labels, 0.8)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[kept] = True
    indices = (chosen if train else ~chosen).nonzero().flatten()
    return in_memory(images, labels, found.target_names.astype(str), DIGITS_STATISTICS, flip=False).subset(indices)


def files_below(folder):
    """Yield the path of every file below `folder`, links followed, each folder once (a link may lead back to a parent).

    What is hidden is left out, such as the `._1.png` that macOS leaves beside 1.png in an archive.
    UserError where a folder cannot be read.
    """

    def stop(error):
        raise UserError(f"{error.filename}: {error.strerror}")

    visited = set()
    for at, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(at)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(at) / file for file in files if not file.startswith("."))


def class_names(folder):
    """Return the sorted names of the class folders in `folder`; none where it does not exist."""
    found = os.listdir(folder) if os.path.isdir(folder) else ()
    return sorted(name for name in found if not name.startswith(".") and os.path.isdir(os.path.join(folder, name)))


def class_folders(folder):
    """Return the sorted class folders below `folder` and every image as (path, class number).

    Raises UserError for a class without images, which would be a class that no network is ever shown.
    """
    folder, names, samples = Path(folder), class_names(folder), []
    for number, name in enumerate(names):
        images = [(str(file), number) for file in sorted(files_below(folder / name)) if file.suffix.lower() in EXTENSIONS]
        if not images:
            raise UserError(f"{folder / name}: a class folder without images ({', '.join(EXTENSIONS)})")
        samples += images
    return names, samples


def check_classes(names, expected, folder, other):
    """Raise UserError unless a folder's class names are those `expected`, of the `other` folder."""
    if names != expected:
        odd = sorted(set(names) ^ set(expected))[:3]
        raise UserError(f"{folder}: its class folders must be those of {other} (check: {', '.join(odd)})")


def to_rgb(image):
    """Return a PIL image in 8-bit RGB; of 16-bit grey, which PIL itself would cut off at 255, the upper 8 bits."""
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # else PIL warns of palettes with it
    return image.convert("RGB")


def check_sides(path, *sides):
    """Raise UserError where the image at `path` is such a strip that it cannot be resized."""
    if max(sides) > LONGEST * min(sides):
        raise UserError(f"unreadable image {path} (a strip of {min(sides)} by {max(sides)} pixels)")


def decode(path, size=None):
    """Return the image at `path` as (3, H, W) uint8, resized and centre-cropped to `size` where given."""
    damaged = (OSError, ValueError, SyntaxError, RuntimeError, MemoryError, Image.DecompressionBombError)
    try:
        with Image.open(path) as file:
            image = to_rgb(file)
    except damaged as error:
        raise UserError(f"unreadable image {path} ({first_line(error)})") from None
    check_sides(path, *image.size)
    if size and image.size != (size, size):
        scale = size / min(image.size)
        wide, high = (max(size, round(side * scale)) for side in image.size)
        left, top = (wide - size) // 2, (high - size) // 2
        image = image.resize((wide, high), Image.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def image_size(paths):
    """Return the side that the images at `paths` get in memory: the median of some of their shorter sides, at most 96."""
    some = paths[:: math.ceil(len(paths) / 100)]
    return min(int(np.median([min(decode(path).shape[1:]) for path in some])), LARGEST_IN_MEMORY)


def image_folder(folders, train, workers, statistics, size=None):
    """Return a split of `train/<class>/*` and the first test folder of `folders[1:]` that has classes.

    Where there is no `train`, the test folder stands alone.
    """
    test = next((folder for folder in folders[1:] if class_names(folder)), folders[-1])
    alone = not train and not os.path.isdir(folders[0])
    names, samples = class_folders(test if alone else folders[0])
    if not samples or not (train or class_names(test)):
        known = " or ".join(f"{folder}/<class>/*" for folder in folders[1:] if not folder.endswith("val_sorted"))
        raise UserError(f"no images: put them at {folders[0]}/<class>/* and {known}")
    size = size or image_size([path for path, _ in samples])
    if size < SMALLEST:
        raise UserError(f"{folders[0]}: images of {size} pixels a side; the networks need {SMALLEST} or more")
    if not train and not alone:
        test_names, samples = class_folders(test)
        check_classes(test_names, names, test, folders[0])
    paths, labels = zip(*samples, strict=True)

    def read(indices):
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            images = list(pool.map(lambda i: decode(paths[i], size), indices.tolist()))
        return torch.stack(images)

    return ImageSet(torch.tensor(labels), read, names, statistics, size)


def load(name, root, train, workers=4, size=None):
    """Return a split of the data set `name` below `root`; raise UserError saying what to put where.

    `size` is the side that image files are read at, by default that which suits them.
    """
    if name in ARCHIVES:
        images, labels, classes = archives.load(name, root, train)
        return in_memory(torch.from_numpy(images), labels, classes, ARCHIVES[name])
    if name == "digits":
        return digits(root, train)
    root = Path(root)
    if name == "tinyimagenet" and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    folders = [root / "train", root / "val_sorted", root / "val", root / "test"]
    if name == "tinyimagenet":
        if not any(folder.is_dir() for folder in folders):
            raise UserError(f"tinyimagenet: unpack tiny-imagenet-200.zip so that {root / 'tiny-imagenet-200'} exists")
        if (root / "val" / "images").is_dir() and not class_names(folders[1]):
            raise UserError(f"{root}: sort its validation images first: python data/preprocess_tinyimagenet.py {root}")
        folders.pop()
    return image_folder([str(f) for f in folders], train, workers, IMAGENET_STATISTICS, size)
