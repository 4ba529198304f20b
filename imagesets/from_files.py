"""Batches of images too many for memory: read by worker processes, normalised on the device.

As with images in memory, what a position of an epoch shows depends on (seed, epoch, position) alone, not on the number
of workers or processes.
"""

import atexit
import copy
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from imagesets.augment import Augmentation
from imagesets.images import ImageSet, Settings
from imagesets.in_memory import Epochs, Normaliser, share_of_test
from imagesets.randaugment import random_cut_out
from utils import UserError, World


def random_resized_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Return torchvision's RandomResizedCrop(size) of `image` (3, H, W), in the layout that `stacked` joins fastest."""
    top, left, height, width = v2.RandomResizedCrop.get_params(image, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    pixels = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous()
    return v2.functional.resize(pixels.permute(2, 0, 1), [size, size], antialias=True)


def training_transform(images: ImageSet, augmentation: Augmentation) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the transform of a training image (3, H, W); a random resized crop is taken from the whole image."""
    if augmentation.padding is None:
        steps = [] if images.resize == "crop" else [images.fitting()]
        steps.append(partial(random_resized_crop, size=images.size))
    else:
        steps = [images.fitting(), v2.RandomCrop(images.size, augmentation.padding)]
    steps += [v2.RandomHorizontalFlip()] * augmentation.flip
    steps += [v2.RandAugment()] * augmentation.randaugment + [random_cut_out] * augmentation.cutout
    return v2.Compose(steps)


class Images(Dataset):
    """Item (number, key) -> (image (3, S, S) uint8, label, number, key[-1]), or an error line if it cannot be read.

    The key seeds the transform; key[-1] is the view, if views are fixed.
    """

    def __init__(self, images: ImageSet, transform: Callable):
        self.images, self.transform = images, transform

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> tuple | str:
        number, key = item
        try:
            image = self.images.decode(number)
        except UserError as error:
            return str(error)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]))
            return self.transform(image), self.images.labels[number], number, key[-1]


def collate(found: list) -> tuple:
    """Join `Images` items into (images, labels, numbers, key[-1] each, error lines), or (error lines,) if all fail."""
    bad = [item for item in found if isinstance(item, str)]
    good = [item for item in found if not isinstance(item, str)]
    if not good:
        return (bad,)
    images, labels, numbers, ends = zip(*good, strict=True)
    return stacked(images), torch.stack(labels), torch.tensor(numbers), torch.tensor(ends), bad


def stacked(images: Iterable[torch.Tensor]) -> torch.Tensor:
    """Join (3, H, W) images into (B, 3, H, W), channels-last: decoded pixels have that layout, and networks use it."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def ignore_signals(leaving: Any, _: int) -> None:
    """Make a worker ignore the signals that a scheduler sends to every process: training saves itself, then ends it.

    Python ends its children by SIGTERM when it exits, so that one counts once `leaving` is set.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):  # Windows lacks two of them
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)


class Reader:
    """Reads batches of an image set by `workers` processes, which end with each pass."""

    def __init__(self, images: ImageSet, transform: Callable, world: World, workers: int, skip_bad_images: bool):
        self.images, self.device = Images(images, transform), world.device
        self.workers, self.skip = workers, skip_bad_images
        self.normalise = Normaliser(images.statistics, world.device)
        self.skipped = set()
        self.leaving = multiprocessing.RawValue("b", 0)
        atexit.register(setattr, self.leaving, "value", 1)

    def loader(self, plan: Iterable[list]) -> DataLoader:
        """Return a loader of the batches of (number, key) items in `plan`, as `collate` joins them."""
        return DataLoader(
            self.images,
            batch_sampler=plan,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=partial(ignore_signals, self.leaving),
            generator=torch.Generator(),  # leaves the global one alone
        )

    def read(self, plan: Iterable[list]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (images (B, 3, S, S) float32, labels (B,), index (B,), key[-1] (B,)) of the batches in `plan`.

        Unreadable images are skipped, named once and counted, or raise a UserError.
        """
        known = len(self.skipped)
        for *batch, bad in self.loader(plan):
            if bad and not self.skip:
                raise UserError(f"{bad[0]}; --skip-bad-images leaves it out")
            for line in sorted(set(bad) - self.skipped):
                print(f"skipped: {line}", file=sys.stderr, flush=True)  # each rank meets others
            self.skipped.update(bad)
            if batch:
                images, *rest = (part.to(self.device, non_blocking=self.device.type == "cuda") for part in batch)
                yield self.normalise(images), *rest
        if len(self.skipped) > known:
            print(f"skipped {len(self.skipped)} unreadable images", file=sys.stderr, flush=True)


class TrainBatches(Epochs):
    """Training batches; an epoch can be entered at any step."""

    def __init__(self, images: ImageSet, augmentation: Augmentation, settings: Settings):
        super().__init__(images, augmentation, settings)
        transform = training_transform(images, augmentation)
        self.reader = Reader(images, transform, self.world, settings.workers, settings.skip_bad_images)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (images, labels, index) of this rank from step `start` of `epoch` on, and the views if fixed."""
        if start < self.steps:  # else workers would start for nothing
            for *batch, view in self.reader.read(self.plan(epoch, start)):
                yield (*batch, view) if self.views else tuple(batch)

    def plan(self, epoch: int, start: int = 0) -> Iterator[list]:
        """Yield each step's list of (number, key) of this rank."""
        order, views, _ = self.order(epoch)
        for at in self.shares(start):
            if views is None:
                yield [(i, (self.seed, epoch, p)) for i, p in zip(order[at].tolist(), at.tolist(), strict=True)]
            else:
                yield self.items(order[at], views[at])

    def items(self, index: torch.Tensor, view: torch.Tensor) -> list:
        """Return the (number, key) of fixed views."""
        return [(i, (self.views_seed, i, v)) for i, v in zip(index.tolist(), view.tolist(), strict=True)]

    def read_views(self, blocks: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (images (B, 3, S, S) float32, index (B,), view (B,)) of blocks of (index, view)."""
        for images, _, index, view in self.reader.read(self.items(*block) for block in blocks):
            yield images, index, view


class TestBatches:
    """Test batches: each image once, split over the processes."""

    __test__ = False

    def __init__(self, images: ImageSet, settings: Settings):
        self.classes, self.size, self.statistics = images.classes, images.size, images.statistics
        limit, world = settings.limit and settings.limit * settings.batch_size, settings.world
        self.reader = Reader(images, images.fitting(), world, settings.workers, settings.skip_bad_images)
        mine, self.total = share_of_test(len(images), limit, world)
        parts = mine.split(max(settings.batch_size // world.size, 1))
        self.batches = [[(number, (0,)) for number in part.tolist()] for part in parts]

    def __len__(self):
        return len(self.batches)

    def some(self, count: int) -> "TestBatches":
        """Return batches of at most `count` images over all processes, evenly spaced."""
        found, size = copy.copy(self), len(self.batches[0])
        items = sum(self.batches, [])[:: math.ceil(self.total / count)]
        found.batches = [items[at : at + size] for at in range(0, len(items), size)]
        return found

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels, *_ in self.reader.read(self.batches):
            yield images, labels
