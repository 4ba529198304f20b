"""Data sets by name, and the batches that a run trains and is tested on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from imagesets import cifar_stl, folders, in_memory
from imagesets.augment import CropFlip, ResizedCropFlip, resize
from imagesets.folders import ImageSet
from utils import UserError, World, print_main, warn

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = {  # (mean, std) on the scale 0 to 1
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "stl10": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "digits": ((0.3054,) * 3, (0.3237,) * 3),
}
TEST_FOLDERS = {
    "tinyimagenet": ("val_sorted", "val"),
    "imagefolder": ("val_sorted", "val", "test"),
    "imagenet": ("val",),
}


class Data(NamedTuple):
    """What a run trains and is tested on: batches; `val` is None unless training images are held out."""

    train: Any
    val: Any
    test: Any
    classes: list[str]
    size: int  # pixels a side of an image that the network sees
    statistics: tuple  # mean and std of the normalisation, on the scale 0 to 1
    info: dict[str, Any]  # of the training images: dataset, class_names, size, mean, std, images (their number)

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.classes)

    def batches(self) -> dict[str, Any]:
        """Return what a Trainer takes of it: train, val, test and info."""
        return {name: getattr(self, name) for name in ("train", "val", "test", "info")}


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of `load` and `load_test`."""

    batch_size: int = 64  # images of a step, over all processes
    seed: int = 0  # of order and augmentation
    world: World = World()  # noqa: RUF009 - a tuple
    workers: int = 4  # threads (imagenet: processes) that read files
    limit: int | None = None  # batches of a pass; a test's have 256 images or more
    val_split: float = 0.0  # share of training images held out
    few_ratio: float | None = None  # share of the others trained on
    skip_bad_images: bool = False
    crop_size: int | None = None  # in memory: train on random resized crops of this size, test at it
    size: int | None = None  # read image folders at this size


def load(name: str, root: str = "./data", **settings: Any) -> Data:
    """Read the data set `name` below `root` and return its batches; `settings` are the fields of `Settings`.

    Raises UserError for data that is missing or cannot be used.
    """
    settings = Settings(**settings)
    train, test = find(name, root, settings)
    if train is None:
        raise UserError(f"no training images: put them at {Path(root) / 'train'}/<class>/*")
    train, held_out = split(train, settings)
    train, train_batches = training_batches(train, settings)
    mean, std = train.statistics
    info = {"dataset": name, "class_names": train.classes, "size": train_batches.size, "mean": mean, "std": std}
    info["images"] = len(train)
    val = test_batches(held_out, settings) if held_out else None
    test = test_batches(test, settings)
    return Data(train_batches, val, test, train.classes, train_batches.size, train.statistics, info)


def load_test(name: str, root: str = "./data", **settings: Any) -> Any:
    """Return batches of the test images of the data set `name`; `settings` are the fields of `Settings`."""
    settings = Settings(**settings)
    return test_batches(find(name, root, settings)[1], settings)


def training_batches(images: ImageSet, settings: Settings) -> tuple[ImageSet, Any]:
    """Return the readable training images and their batches."""
    order = settings.batch_size, settings.seed, settings.world, settings.limit
    if not images.in_memory:
        from imagesets import from_files

        reading = settings.workers, settings.skip_bad_images
        return images, from_files.TrainBatches(images, *order, *reading)
    images = folders.into_memory(images, settings.workers, settings.skip_bad_images)
    augmentation = CropFlip(images.size, flip=images.flip)
    if settings.crop_size:
        augmentation = ResizedCropFlip(images.size, settings.crop_size, flip=images.flip)
    return images, in_memory.TrainBatches(images, augmentation, *order)


def test_batches(images: ImageSet, settings: Settings) -> Any:
    """Return batches of `images` for a forward pass without gradient."""
    split = settings.batch_size, settings.world, settings.limit
    if not images.in_memory:
        from imagesets import from_files

        return from_files.TestBatches(images, *split, settings.workers, settings.skip_bad_images)
    images = folders.into_memory(images, settings.workers, settings.skip_bad_images)
    if settings.crop_size:
        images = replace(images, size=settings.crop_size, pixels=resize(images.pixels, settings.crop_size))
    return in_memory.TestBatches(images, *split)


def warn_of_other_data(info: dict[str, Any], images: Any, path: str) -> None:
    """Warn if weights at `path`, trained on data of `info`, are used on batches of other classes or another size."""
    if info.get("class_names") not in (None, images.classes):
        warn(f"warning: {path}: trained on the classes of other data ({info.get('dataset')}): its outputs mean those")
    if info.get("size") not in (None, images.size):
        warn(f"warning: {path}: trained on images of {info['size']} pixels a side, not {images.size}")


def find(name: str, root: str, settings: Settings) -> tuple[ImageSet | None, ImageSet]:
    """Return (training images, test images) of a data set; None for the former if only the latter are there."""
    if name == "digits":
        return digits(True), digits(False)
    if name in cifar_stl.NAMES:
        with first_alone(settings.world):  # one process downloads
            return tuple(in_memory_set(name, *cifar_stl.load(name, root, train)) for train in (True, False))
    folder = Path(root)
    if name == "tinyimagenet":
        folder = folder / "tiny-imagenet-200" if (folder / "tiny-imagenet-200").is_dir() else folder
        if not (folder / "train").is_dir():
            raise UserError(f"tinyimagenet: unpack tiny-imagenet-200.zip so that {folder / 'tiny-imagenet-200'} exists")
        if (folder / "val" / "images").is_dir() and not (folder / "val_sorted").is_dir():
            raise UserError(f"sort the validation images first: python data/preprocess_tinyimagenet.py {folder}")
    size = 224 if name == "imagenet" else settings.size
    found = folders.find(folder, TEST_FOLDERS[name], IMAGENET_STATISTICS, size)
    return tuple(images and replace(images, in_memory=name != "imagenet") for images in found)


def in_memory_set(name: str, pixels: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> ImageSet:
    """Return images that have been read, with the statistics of the data set `name`."""
    return ImageSet(labels, classes, pixels.shape[-1], STATISTICS[name], pixels, flip=name != "digits")


def digits(train: bool) -> ImageSet:
    """Return a split (80/20, stratified, fixed) of scikit-learn's 1,797 digits, scaled to 3 x 32 x 32."""
    from sklearn.datasets import load_digits  # takes a second

    found = load_digits()
    labels = torch.from_numpy(found.target)
    images = torch.from_numpy(found.images).float().unsqueeze(1) * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = images.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    whole = in_memory_set("digits", images, labels, found.target_names.astype(str).tolist())
    kept, left = stratified(labels, 0.8)
    return whole.subset(kept if train else left)


def stratified(labels: torch.Tensor, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sorted indices of a stratified share `ratio` of `labels` (N,), and those of the rest.

    As in the published few-shot runs: scikit-learn's StratifiedShuffleSplit with random_state 0; 1 means all.
    """
    from sklearn.model_selection import StratifiedShuffleSplit  # takes a second

    everything = np.arange(len(labels))
    if ratio == 1:
        return torch.from_numpy(everything), torch.from_numpy(everything[:0])
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=1 - ratio, random_state=0)
    try:
        kept, _ = next(splitter.split(everything, labels.numpy()))
    except ValueError:  # whose message is of the splitter's arguments
        shares = f"shares of {ratio:g} and {1 - ratio:g}, every class in both"
        raise UserError(
            f"{len(labels)} images of {len(labels.unique())} classes cannot be stratified into {shares}"
        ) from None
    kept.sort()
    return torch.from_numpy(kept), torch.from_numpy(np.setdiff1d(everything, kept))


def split(images: ImageSet, settings: Settings) -> tuple[ImageSet, ImageSet | None]:
    """Return (training images, held-out images or None); few-shot prints how many each class has."""
    held_out = None
    if settings.val_split:
        kept, left = stratified(images.labels, 1 - settings.val_split)
        images, held_out = images.subset(kept), images.subset(left)
    if settings.few_ratio:
        images = images.subset(stratified(images.labels, settings.few_ratio)[0])
        counts = images.labels.bincount(minlength=len(images.classes)).tolist()
        each = ", ".join(f"{name} {count}" for name, count in zip(images.classes, counts, strict=True))
        print_main(f"training images: {each}")
    return images, held_out


@contextmanager
def first_alone(world: World) -> Iterator[None]:
    """Run the block in the first process, and in the others once that is done."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    yield
    if world.size > 1 and world.is_main:
        dist.barrier()
