"""Batches of images too many for memory: read by worker processes, normalised on the device.

As with images in memory, what a position of an epoch shows depends on (seed, epoch, position) alone, not on the number
of workers or processes.
"""

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from imagesets import folders
from imagesets.folders import ImageSet
from imagesets.in_memory import Normaliser, epoch_generator, share_of_batch, share_of_test, steps_of_epoch
from utils import UserError, World

try:
    from torchvision.io import decode_jpeg
except ImportError:  # torchvision has announced that it will leave; PIL reads the files then
    decode_jpeg = None

TEST_RESIZE = 256 / 224  # of the shorter side, before the centre crop
PREFETCH = 2  # batches that each worker reads ahead


def decode(path: str) -> torch.Tensor:
    """Return the image at `path` as (3, H, W) uint8, whatever its colour space; UserError if it cannot be read."""
    with suppress(OSError, RuntimeError):
        content = torch.from_numpy(np.fromfile(path, np.uint8))
        if decode_jpeg and content[:3].tolist() == [0xFF, 0xD8, 0xFF]:
            return decode_jpeg(content, "RGB")
    return folders.decode(path)  # slower, but knows more formats and says what is wrong


def transformed(image: torch.Tensor, transform: Callable, key: Iterable[int]) -> torch.Tensor:
    """Return `transform(image)` with torch's generator seeded by the whole numbers `key`, and left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]))
        return transform(image)


def random_resized_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Return torchvision's RandomResizedCrop(size) of `image` (3, H, W), in the layout that `stacked` joins fastest."""
    top, left, height, width = v2.RandomResizedCrop.get_params(image, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    pixels = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous()
    return v2.functional.resize(pixels.permute(2, 0, 1), [size, size], antialias=True)


class Images(Dataset):
    """Item (number, key) -> (image (3, S, S) uint8, label, number), or a line if the image cannot be read."""

    def __init__(self, images: ImageSet, transform: Callable):
        self.images, self.transform = images, transform

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> tuple | str:
        number, key = item
        try:
            image = decode(os.fsdecode(self.images.paths[number]))
        except UserError as error:
            return str(error)
        return transformed(image, self.transform, key), self.images.labels[number], number


def collate(found: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Join `Images` items into (images, labels, numbers, lines about unreadable images)."""
    bad = [item for item in found if isinstance(item, str)]
    good = [item for item in found if not isinstance(item, str)]
    if not good:
        return torch.empty(0), torch.empty(0), torch.empty(0), bad
    images, labels, numbers = zip(*good, strict=True)
    return stacked(images), torch.stack(labels), torch.tensor(numbers), bad


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


class FileBatches:
    """Batches of this rank's share of an image set, read by `workers` processes, which end with each pass."""

    def __init__(self, images: ImageSet, transform: Callable, world: World, workers: int, skip: bool):
        self.images, self.world, self.workers, self.skip = Images(images, transform), world, workers, skip
        self.normalise = Normaliser(images.statistics, world.device)
        self.classes, self.size, self.statistics = images.classes, images.size, images.statistics
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
            pin_memory=self.world.device.type == "cuda",
            worker_init_fn=partial(ignore_signals, self.leaving),
            prefetch_factor=PREFETCH if self.workers else None,
            generator=torch.Generator(),  # leaves the global one alone
        )

    def read(self, plan: Iterable[list]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (images (B, 3, S, S) float32, labels (B,), index (B,)) of the batches in `plan`.

        Unreadable images are skipped, named once and counted, or raise a UserError.
        """
        device, known = self.world.device, len(self.skipped)
        for images, labels, index, bad in self.loader(plan):
            if bad and not self.skip:
                raise UserError(f"{bad[0]}; --skip-bad-images leaves it out")
            for line in bad:
                if line not in self.skipped and len(self.skipped) < folders.SHOWN:
                    print(f"skipped: {line}", file=sys.stderr, flush=True)  # each rank meets others
                self.skipped.add(line)
            if len(labels):
                parts = (part.to(device, non_blocking=True) for part in (images, labels, index))
                images, labels, index = parts
                yield self.normalise(images), labels, index
        if len(self.skipped) > known:
            print(f"skipped {len(self.skipped)} unreadable images", file=sys.stderr, flush=True)


class TrainBatches(FileBatches):
    """Training batches: random resized crop and flip; an epoch can be entered at any step."""

    def __init__(
        self, images: ImageSet, batch_size: int, seed: int, world: World, limit: int | None, workers: int, skip: bool
    ):
        transform = v2.Compose([partial(random_resized_crop, size=images.size), v2.RandomHorizontalFlip()])
        super().__init__(images, transform, world, workers, skip)
        self.batch_size, self.seed, self.num_images = batch_size, seed, len(images)
        self.steps = steps_of_epoch(len(images), batch_size, world, limit)

    def __len__(self):
        return self.steps

    def __iter__(self):
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (images, labels, index) of this rank from step `start` of `epoch` on."""
        if start < self.steps:  # else workers would start for nothing
            yield from self.read(self.plan(epoch, start))

    def plan(self, epoch: int, start: int = 0) -> Iterator[list]:
        """Yield each step's list of (number, (seed, epoch, position)) of this rank."""
        order = torch.randperm(self.num_images, generator=epoch_generator(self.seed, epoch))
        for step in range(start, self.steps):
            at = share_of_batch(step, self.batch_size, self.num_images, self.world)
            yield [(i, (self.seed, epoch, p)) for i, p in zip(order[at].tolist(), at.tolist(), strict=True)]


class TestBatches(FileBatches):
    """Test batches: the shorter side resized, the centre cropped; each image once, split over the processes."""

    __test__ = False

    def __init__(self, images: ImageSet, batch_size: int, world: World, limit: int | None, workers: int, skip: bool):
        transform = v2.Compose([v2.Resize(round(images.size * TEST_RESIZE)), v2.CenterCrop(images.size)])
        super().__init__(images, transform, world, workers, skip)
        mine, self.total = share_of_test(len(images), limit and limit * batch_size, world)
        self.batches = [[(i, (0,)) for i in part.tolist()] for part in mine.split(max(batch_size // world.size, 1))]

    def __len__(self):
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels, _ in self.read(self.batches):
            yield images, labels
