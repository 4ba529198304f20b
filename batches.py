"""Batches of images that live on the training device: order and normalisation as tensor operations."""

import importlib
import math
from typing import NamedTuple

import numpy as np
import torch

import datasets
import distributed
from augment import CropFlip, resized
from utils import UserError, class_digest

# Data sets too large for memory, and the module that reads their batches from files.
READERS = {"imagenet": "imagefiles"}


def epoch_generator(seed, epoch):
    """Return the generator of an epoch's order and augmentation: a function of (seed, epoch) alone, so resumable."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def share_of_batch(step, batch_size, count, rank, world_size):
    """Return this rank's positions in the epoch's order at `step`: an equal slice of the batch of all ranks.

    The last batch is as long as what is left, padded from the start of the order to a multiple of the ranks.
    """
    first = step * batch_size
    length = min(batch_size, count - first)
    each = math.ceil(length / world_size)
    return (torch.arange(each) + first + rank * each) % count


def steps_of_epoch(count, batch_size, world, limit=None):
    """Return the steps of an epoch of `count` images; UserError where the batch does not divide among the processes."""
    if batch_size % world.size:
        raise UserError(f"--batch-size {batch_size} does not divide among {world.size} processes")
    steps = math.ceil(count / batch_size)
    return min(steps, limit or steps)


class Normaliser:
    """uint8 images to normalised float32 in channels-last layout, (x / 255 - mean) / std."""

    def __init__(self, statistics, device):
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in statistics)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images):
        """Return (B, 3, H, W) float32 of images (B, 3, H, W)."""
        width = images.shape[3]
        if self.scale.shape[3] != width:
            # A whole row of each: a CPU is several times slower where only the innermost three values repeat.
            rows = (value[..., :1].expand(1, 3, 1, width) for value in (self.scale, self.shift))
            self.scale, self.shift = (row.contiguous(memory_format=torch.channels_last) for row in rows)
        images = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        return torch.addcmul(self.shift, images, self.scale, out=images)


class DeviceBatches:
    """Training batches of a data set held as uint8 on the device.

    Order and augmentation depend on (seed, epoch, position) alone: the same for every number of processes, and an
    epoch can be entered at any step.
    """

    def __init__(self, image_set, batch_size, augment, world, seed, limit=None):
        self.steps = steps_of_epoch(len(image_set), batch_size, world, limit)
        self.images = image_set.images().to(world.device)
        self.labels = image_set.labels.to(world.device)
        self.normalise = Normaliser(image_set.statistics, world.device)
        self.batch_size, self.augment, self.world, self.seed = batch_size, augment, world, seed

    def __len__(self):
        return self.steps

    def epoch(self, epoch, start=0):
        """Yield (images (B, 3, S, S) float32, labels (B,)) of this rank from step `start` of `epoch` on."""
        count, device = len(self.labels), self.world.device
        generator = epoch_generator(self.seed, epoch)
        order = torch.randperm(count, generator=generator)
        draws = self.augment.draw(count, generator)
        world = self.world
        shares = [share_of_batch(step, self.batch_size, count, world.rank, world.size) for step in range(start, self.steps)]
        if not shares:
            return
        # All steps' indices go to the device at once: a copy in each step would make the host wait.
        at, lengths = torch.cat(shares), [len(share) for share in shares]
        parts = (rows[at].to(device).split(lengths) for rows in (order, draws))
        for chosen, drawn in zip(*parts, strict=True):
            images = self.augment.apply(self.images[chosen], drawn)
            yield self.normalise(images), self.labels[chosen]


class TestBatches:
    """Test batches of a data set held as uint8 on the device: each image once, split over the processes."""

    __test__ = False

    def __init__(self, image_set, batch_size, world, limit=None):
        self.classes, self.size = image_set.classes, image_set.size
        count = min(len(image_set), limit * batch_size) if limit else len(image_set)
        if count < world.size:
            raise UserError(f"fewer test images ({count}) than processes ({world.size})")
        mine = torch.arange(world.rank, count, world.size)
        share = image_set.subset(mine)
        self.images = share.images().to(world.device)
        self.labels = share.labels.to(world.device)
        self.normalise = Normaliser(image_set.statistics, world.device)
        self.batch_size = batch_size
        self.total = distributed.total(len(self.labels), world)

    def __len__(self):
        return len(self.labels)

    def __iter__(self):
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalise(images), labels


class Data(NamedTuple):
    """What a run trains and is measured on; `val` is None unless training images are held out."""

    train: object
    val: object
    test: object
    num_classes: int
    size: int
    about: str = ""  # tells training sets apart


def crop_flip(image_set):
    """Return the augmentation of the CIFAR recipe for a set of training images."""
    return CropFlip(image_set.size, flip=image_set.flip)


def load(args, world, augmentation=crop_flip, test_size=None):
    """Read the data set of `args`, once, into batches on the device: a Data.

    `augmentation` makes the training images' augmentation from their ImageSet; test images are resized to `test_size`
    pixels a side where it is given.
    """
    if args.dataset in READERS:
        return importlib.import_module(READERS[args.dataset]).load(args, world)
    with distributed.first_alone(world):  # what has to be downloaded, one process downloads
        train_set = datasets.load(args.dataset, args.data, True, args.num_workers)
    test = load_test(args, world, test_size)
    train_set, held_out = split(train_set, args, world)
    augment = augmentation(train_set)
    train = DeviceBatches(train_set, args.batch_size, augment, world, args.manual_seed, args.limit_batches)
    val = test_batches(held_out, args, world, test_size) if held_out else None
    size = test_size or train_set.size
    return Data(train, val, test, len(train_set.classes), size, about(train_set, size))


def about(train_set, size):
    """Return a text that tells training sets apart: their images' number and size, and their classes."""
    names = train_set.classes
    return f"{len(train_set)} images, {size} pixels, {len(names)} classes (digest {class_digest(names)})"


def split(train_set, args, world):
    """Return (training images, held-out images or None) of `--val-split` and `--few-ratio`."""
    held_out = None
    if args.val_split:
        kept = datasets.stratified_share(train_set.labels, 1 - args.val_split)
        left = torch.ones(len(train_set), dtype=torch.bool).index_fill(0, kept, False).nonzero().flatten()
        train_set, held_out = train_set.subset(kept), train_set.subset(left)
    if getattr(args, "few_ratio", None):
        train_set = train_set.subset(datasets.stratified_share(train_set.labels, args.few_ratio))
        if world.is_main:
            counts = zip(train_set.classes, train_set.labels.bincount(minlength=len(train_set.classes)).tolist(), strict=True)
            print("training images: " + ", ".join(f"{name} {count}" for name, count in counts))
    return train_set, held_out


def load_test(args, world, size=None, trained_size=None):
    """Read the test images of the data set of `args` into batches on the device.

    They are resized to `size` where it is given; an image folder's are read at `trained_size`, else at its own size.
    """
    if args.dataset in READERS:
        return importlib.import_module(READERS[args.dataset]).load_test(args, world)
    with distributed.first_alone(world):
        test_set = datasets.load(args.dataset, args.data, False, args.num_workers, trained_size)
    return test_batches(test_set, args, world, size)


def test_batches(image_set, args, world, size=None):
    """Return batches of a forward pass without gradient over `image_set`, resized to `size` pixels where it is given."""
    if size:
        image_set = resized(image_set, size)
    return TestBatches(image_set, max(args.batch_size, 256), world, args.limit_batches)
