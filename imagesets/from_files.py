"""Batches of images too many for memory (ImageNet): read by workers, normalised on the device.

The counterpart of batches.DeviceBatches and batches.TestBatches, with the same order: what a position of an epoch shows
depends on (seed, epoch, position) alone, not on the number of workers or processes.
"""

import atexit
import contextlib
import math
import multiprocessing
import os
import shutil
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import batches
import datasets
import decoding
import distributed
import launcher
from utils import UserError, warn

TEST_RESIZE = 256
PREFETCH = 2  # batches that each worker reads ahead
SHOWN = 20  # unreadable images that a process names in an epoch


@dataclass
class FileSet:
    """One split: encoded `paths` (N,), one array rather than N objects that forked workers would copy, and `labels` (N,)."""

    paths: np.ndarray
    labels: torch.Tensor
    classes: list[str]

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        """Return the split's images at `indices`, in that order."""
        return replace(self, paths=self.paths[indices.numpy()], labels=self.labels[indices])


def find(root, train):
    """Return the split `<root>/{train,val}/<class>/*`, any number of classes; UserError where it is not there."""
    folder = Path(root) / ("train" if train else "val")
    names, samples = datasets.class_folders(folder)
    if not samples:
        raise UserError(f"no images: put them at {folder}/<class>/*")
    paths, labels = zip(*samples, strict=True)
    return FileSet(np.array([os.fsencode(path) for path in paths]), torch.tensor(labels), names)


def outlive_signals(leaving, parent, _):
    """Let a worker outlive the signals that a scheduler sends to all processes: training saves itself, then ends it.

    Where training, the process `parent`, is killed it ends at once: it holds the run folder's lock, and a resumed run waits.
    """
    launcher.end_with_parent(signal.SIGKILL, parent)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)


def check_shared_memory(size):
    """Raise UserError where the workers' batches, `size` bytes, do not fit into /dev/shm: without room they would hang."""
    with contextlib.suppress(OSError):  # elsewhere than on Linux it is not there
        free = shutil.disk_usage("/dev/shm").free
        if free < size:
            lacking = f"/dev/shm has {free / 2**20:.0f} MiB left, {size / 2**20:.0f} are needed for the batches of the workers"
            raise UserError(f"{lacking}: fewer --num-workers, or a larger one (docker run --shm-size)")


class Plan:
    """The batch sampler of a loader whose workers persist: a new plan of batches for every pass."""

    def __init__(self):
        self.batches = []

    def __iter__(self):
        return iter(self.batches)


class FileBatches:
    """Batches of this rank's share of a FileSet, read by `--num-workers` processes."""

    def __init__(self, files, transform, args, world, fill):
        if args.decode == "device" and world.device.type != "cuda":
            raise UserError("--decode device needs a GPU: this run has none")
        if args.decode == "device":
            decoding.check_decoder(world.device)
        self.files, self.world, self.skip, self.limit = files, world, args.skip_bad_images, args.limit_batches
        self.named, self.skipped = set(), 0  # unreadable images: those told here, and the number of the last pass
        encoded = args.decode == "device"
        self.images = (decoding.EncodedImages if encoded else decoding.Images)(files, transform, fill and self.skip)
        self.stream = torch.cuda.Stream(world.device) if encoded else None
        self.normalise = batches.Normaliser(datasets.IMAGENET_STATISTICS, world.device)
        self.plan, workers = Plan(), args.num_workers
        if not encoded:
            ahead = workers * PREFETCH * math.ceil(args.batch_size / world.size)
            check_shared_memory(min(ahead, len(files)) * 3 * decoding.SIZE**2)
        self.leaving = multiprocessing.RawValue("b", 0)
        atexit.register(setattr, self.leaving, "value", 1)
        self.loader = DataLoader(
            self.images,
            batch_sampler=self.plan,
            num_workers=workers,
            collate_fn=decoding.collate_encoded if encoded else decoding.collate,
            pin_memory=world.device.type == "cuda" and not encoded,
            worker_init_fn=partial(outlive_signals, self.leaving, os.getpid()),
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            generator=torch.Generator(),
        )

    def close(self):
        """End the workers, each of which would else delay the end of the process group or the interpreter by ten seconds."""
        self.leaving.value = 1
        self.loader = None

    def read(self, plan):
        """Yield (images (B, 3, 224, 224) float32, labels (B,)) of the batches of (index, key) items in `plan`.

        Raises UserError at an unreadable image; with --skip-bad-images names it and counts them at the end.
        """
        self.plan.batches, device = plan, self.world.device
        met, empty = set(), True
        for found in self.loader:
            if isinstance(self.images, decoding.EncodedImages):
                content, lengths, *rest = found
                found = decoding.on_stream(self.stream, self.images.decoded, list(content.split(lengths)), *rest, device)
            images, labels, bad = found
            if bad and not self.skip:
                raise UserError(f"{bad[0]}; --skip-bad-images goes on without it")
            for line in dict.fromkeys(bad):
                if line not in self.named and len(self.named) < SHOWN:
                    warn(f"skipped: {line}")
                    self.named.add(line)
            met.update(bad)
            if len(labels):
                empty = False
                yield self.normalise(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
            elif self.images.fill:
                raise UserError(f"{bad[0]}; nor are the {decoding.REPLACEMENTS - 1} images after it readable")
        if self.skip:
            skipped, seen = (distributed.count_over_ranks(count, self.world) for count in (len(met), not empty))
            if skipped and not seen:
                raise UserError(f"{min(met, default='unreadable images')}; nor is any other image of this pass readable")
            if skipped != self.skipped and self.world.is_main:
                warn(f"skipped {skipped} unreadable images")
            self.skipped = skipped


class TrainBatches(FileBatches):
    """Training batches: RandomResizedCrop(224) and flip; an epoch can be entered at any step."""

    def __init__(self, files, args, world):
        transform = v2.Compose([decoding.random_resized_crop, v2.RandomHorizontalFlip()])
        super().__init__(files, transform, args, world, fill=True)
        self.batch_size, self.seed = args.batch_size, args.manual_seed
        self.steps = batches.steps_of_epoch(len(files), self.batch_size, world, self.limit)

    def __len__(self):
        return self.steps

    def epoch(self, epoch, start=0):
        """Yield (images, labels) of this rank from step `start` of `epoch` on."""
        if start < self.steps:  # a run stopped after an epoch's last step starts no workers for nothing
            yield from self.read(self.items(epoch, start))

    def items(self, epoch, start=0):
        """Yield each step's list of (index, (seed, epoch, position)) of this rank."""
        count = len(self.files)
        order = torch.randperm(count, generator=batches.epoch_generator(self.seed, epoch))
        for step in range(start, self.steps):
            at = batches.share_of_batch(step, self.batch_size, count, self.world.rank, self.world.size)
            yield [(i, (self.seed, epoch, p)) for i, p in zip(order[at].tolist(), at.tolist(), strict=True)]


class TestBatches(FileBatches):
    """Test batches: Resize(256) and CenterCrop(224); each image once, split over the processes."""

    __test__ = False

    def __init__(self, files, args, world):
        transform = v2.Compose([v2.Resize(TEST_RESIZE, antialias=True), v2.CenterCrop(decoding.SIZE)])
        super().__init__(files, transform, args, world, fill=False)
        self.classes, self.size = files.classes, decoding.SIZE
        size = max(args.batch_size // world.size, 1)
        mine = batches.share_of_test(len(files), self.limit and self.limit * args.batch_size, world).tolist()
        self.listed = distributed.count_over_ranks(len(mine), world)
        self.items = [[(i, (0,)) for i in mine[at : at + size]] for at in range(0, len(mine), size)]

    @property
    def total(self):
        """The images of all processes, without those that the last pass left out."""
        return self.listed - self.skipped

    def __iter__(self):
        return self.read(self.items)
