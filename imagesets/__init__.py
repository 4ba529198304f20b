"""Data sets by name, and the batches that a run trains and is tested on."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torchvision.transforms import v2

from imagesets import cifar_stl, folders, from_files, in_memory
from imagesets.augment import Augmentation
from imagesets.images import ImageSet, Settings
from utils import UserError, print_main

STATISTICS = {  # (mean, std) on the scale 0 to 1
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "stl10": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "digits": ((0.3054,) * 3, (0.3237,) * 3),
}


class Data(NamedTuple):
    """What a run trains and is tested on: batches; `val` is None unless training images are held out."""

    train: Any
    val: Any
    test: Any
    classes: list[str]
    size: int  # pixels a side of an image that the network sees
    statistics: tuple  # mean and std of the normalisation, on the scale 0 to 1
    info: dict[str, Any]  # of the training images: dataset, class_names, size, mean, std, images (their number) ...

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.classes)

    @property
    def class_weights(self) -> torch.Tensor:
        """Return balanced class weights (N,): training images / (N * images of the class)."""
        counts = self.train.image_set.labels.bincount(minlength=self.num_classes)
        return counts.sum() / (self.num_classes * counts.clamp(min=1))

    def batches(self) -> dict[str, Any]:
        """Return what a Trainer takes of it: train, val, test and info."""
        return {name: getattr(self, name) for name in ("train", "val", "test", "info")}


def recorded(info: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that read test images as the training images of a checkpoint's `info` were read."""
    names = ("mean", "std", "class_names", "size", "resize", "test_split", "split_of", "grey_range")
    published = {**dict.fromkeys(folders.TESTS, folders.STATISTICS), **STATISTICS}.get(info.get("dataset"))
    # For files that are older than what they record.
    found = dict(zip(("mean", "std"), published, strict=True)) if published else {}
    return found | {name: info[name] for name in names if info.get(name) is not None}


def load(name: str, root: str = "./data", **settings: Any) -> Data:
    """Read the data set `name` below `root` and return its batches; `settings` are the fields of `Settings`.

    Raises UserError for data that is missing or cannot be used.
    """
    settings = Settings(**settings)
    train, test = find(name, root, settings)
    if train is None:
        raise UserError(f"no training images: put them at {Path(root) / 'train'}/<class>/*")
    train, held_out = split(train, settings)
    if train.in_memory:
        train = train.into_memory(settings)
    if settings.mean == "auto":
        train = replace(train, statistics=measured_statistics(train, settings))
    augmentation = choose_augmentation(name, train, settings)
    if train.in_memory:
        batched = augmentation.on_device(train.size, settings.crop_size or train.size)
        batches = in_memory.TrainBatches(train, batched, settings)
    else:
        batches = from_files.TrainBatches(train, augmentation, settings)
    mean, std = train.statistics
    info = {"dataset": name, "class_names": train.classes, "size": batches.size, "mean": mean, "std": std}
    info |= {"images": len(train), "augment": str(augmentation)}
    if name in folders.TESTS:
        info |= {"resize": train.resize, "keep": "memory" if train.in_memory else "files"}
        info |= {"test_split": settings.test_split, "grey_range": train.grey_range}
        info |= {"split_of": train.split_of} if train.split_of else {}
    val = test_batches(held_out, train.statistics, settings) if held_out else None
    test = test_batches(test, train.statistics, settings)
    return Data(batches, val, test, train.classes, batches.size, train.statistics, info)


def load_test(name: str, root: str = "./data", **settings: Any) -> Any:
    """Return batches of the test images of the data set `name`; `settings` are the fields of `Settings`."""
    settings = Settings(**settings)
    _, test = find(name, root, settings, test_alone=True)
    return test_batches(test, test.statistics, settings)


def test_batches(images: ImageSet, statistics: tuple, settings: Settings) -> Any:
    """Return batches of `images`, normalised by `statistics`, for a forward pass without gradient."""
    images = replace(images, statistics=statistics)
    if not images.in_memory:
        return from_files.TestBatches(images, settings)
    images = images.into_memory(settings)
    if settings.crop_size:
        pixels = v2.functional.resize(images.pixels, [settings.crop_size] * 2)
        images = replace(images, size=settings.crop_size, pixels=pixels)
    return in_memory.TestBatches(images, settings)


def choose_augmentation(name: str, images: ImageSet, settings: Settings) -> Augmentation:
    """Return the augmentation that is asked for, or else that of the published recipe; print it for own images."""
    own, asked = name == "imagefolder", settings.augment
    padding = images.size // 8 if own else 4
    if name == "imagenet" or settings.crop_size or (own and images.size > 64):
        padding = None
    padding = {"crop": images.size // 8 if own else 4, "rrc": None, "none": 0}.get(asked, padding)
    flip = (images.flip if settings.flip is None else settings.flip) and asked != "none"
    found = Augmentation(padding, flip, asked in ("randaugment", "strong"), cutout=asked == "strong")
    if own:
        print_main(f"augmentation: {found}")
    return found


def measured_statistics(images: ImageSet, settings: Settings) -> tuple:
    """Return the (mean, std) of the channels of `images`, of 1,000 at most."""
    pixels = images.some(1000).into_memory(settings).pixels
    means = torch.stack([torch.stack([x.mean((1, 2)), x.square().mean((1, 2))]) for x in (y / 255 for y in pixels)])
    mean, square = means.double().mean(0)
    std = (square - mean**2).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())


def find(name: str, root: str, settings: Settings, test_alone: bool = False) -> tuple[ImageSet | None, ImageSet]:
    """Return (training images, test images) of a data set; None for the former if only the latter are there."""
    if name == "digits":
        found = digits(True), digits(False)
    elif name in cifar_stl.READERS:
        if not settings.world.is_main:
            dist.barrier()  # while the first process downloads
        sets = [cifar_stl.load(name, root, train) for train in (True, False)]
        if settings.world.is_main and settings.world.size > 1:
            dist.barrier()
        found = [ImageSet(labels, names, STATISTICS[name], len(x[0, 0]), x) for x, labels, names in sets]
    else:
        found = folders.find(name, Path(root), settings, test_alone)
    return tuple(images and named(images, settings, test_alone) for images in found)


def named(images: ImageSet, settings: Settings, test_alone: bool) -> ImageSet:
    """Return `images` with the normalisation and the order of classes that are asked for.

    UserError if the classes are others, unless tests alone are read: weights may be tried on other data.
    """
    mean, std = images.statistics
    mean = mean if settings.mean in (None, "auto") else settings.mean
    images = replace(images, statistics=(tuple(mean), tuple(settings.std or std)))
    names = settings.class_names or images.classes
    if sorted(names) != sorted(images.classes):
        if test_alone:
            return images
        odd = sorted(set(names) ^ set(images.classes))[:3]
        raise UserError(f"the class names given are not those of the images (check: {', '.join(odd)})")
    numbers = torch.tensor([names.index(name) for name in images.classes])
    return replace(images, classes=list(names), labels=numbers[images.labels])


def digits(train: bool) -> ImageSet:
    """Return a split (80/20, stratified, fixed) of scikit-learn's 1,797 digits, scaled to 3 x 32 x 32."""
    from sklearn.datasets import load_digits  # takes a second

    found = load_digits()
    labels = torch.from_numpy(found.target)
    images = torch.from_numpy(found.images).float().unsqueeze(1) * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    images = images.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    names = found.target_names.astype(str).tolist()
    whole = ImageSet(labels, names, STATISTICS["digits"], 32, images, flip=False)
    return whole.stratified(0.8)[0 if train else 1]


def split(images: ImageSet, settings: Settings) -> tuple[ImageSet, ImageSet | None]:
    """Return (training images, held-out images or None); few-shot prints how many each class has."""
    held_out = None
    if settings.val_split:
        images, held_out = images.stratified(1 - settings.val_split)
    if settings.few_ratio:
        images, _ = images.stratified(settings.few_ratio)
        counts = images.labels.bincount(minlength=len(images.classes)).tolist()
        each = ", ".join(f"{name} {count}" for name, count in zip(images.classes, counts, strict=True))
        print_main(f"training images: {each}")
    return images, held_out
