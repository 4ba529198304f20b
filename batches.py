"""Batches of images that live on the training device: order, augmentation and normalisation as tensor operations."""

import math
from typing import NamedTuple

import numpy as np
import torch

import datasets
from utils import UserError


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


class CropFlip:
    """Zero-padded random crop and horizontal flip: torchvision's RandomCrop(size, padding) + RandomHorizontalFlip."""

    def __init__(self, size, padding=4, flip=True):
        self.size, self.padding, self.flip = size, padding, flip

    def draw(self, count, generator):
        """Return (count, 3) int64: top and left of the crop in the padded image, and whether to flip."""
        offsets = torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 2, (count, 1), generator=generator) if self.flip else torch.zeros(count, 1).long()
        return torch.cat([offsets, flips], dim=1)

    def apply(self, images, draws):
        """Crop and flip `images` (B, 3, S, S) uint8, each by its row of `draws`."""
        b, c, h, w = images.shape
        padded = torch.nn.functional.pad(images, [self.padding] * 4)
        top, left, flip = draws.unsqueeze(-1).unbind(1)
        steps = torch.arange(self.size, device=images.device)
        rows = top + steps
        columns = left + torch.where(flip == 1, self.size - 1 - steps, steps)
        flat = (rows.unsqueeze(2) * (w + 2 * self.padding) + columns.unsqueeze(1)).view(b, 1, -1)
        return padded.flatten(2).gather(2, flat.expand(-1, c, -1)).view(b, c, self.size, self.size)


class Normaliser:
    """uint8 images to normalised float32 in channels-last layout, (x / 255 - mean) / std."""

    def __init__(self, statistics, device):
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in statistics)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images):
        return torch.addcmul(self.shift, images, self.scale).contiguous(memory_format=torch.channels_last)


class DeviceBatches:
    """Training batches of a data set held as uint8 on the device.

    Order and augmentation depend on (seed, epoch, position) alone: the same for every number of processes, and an
    epoch can be entered at any step.
    """

    def __init__(self, image_set, batch_size, augment, world, seed, limit=None):
        if batch_size % world.size:
            raise UserError(f"--batch-size {batch_size} does not divide among {world.size} processes")
        self.images = image_set.images().to(world.device)
        self.labels = image_set.labels.to(world.device)
        self.normalise = Normaliser(image_set.statistics, world.device)
        self.batch_size, self.augment, self.world, self.seed = batch_size, augment, world, seed
        steps = math.ceil(len(image_set) / batch_size)
        self.steps = min(steps, limit or steps)

    def __len__(self):
        return self.steps

    def epoch(self, epoch, start=0):
        """Yield (images (B, 3, S, S) float32, labels (B,)) of this rank from step `start` of `epoch` on."""
        count, device = len(self.labels), self.world.device
        generator = epoch_generator(self.seed, epoch)
        order = torch.randperm(count, generator=generator).to(device)
        draws = self.augment.draw(count, generator).to(device)
        for step in range(start, self.steps):
            at = share_of_batch(step, self.batch_size, count, self.world.rank, self.world.size)
            at = at.to(device, non_blocking=True)
            chosen = order[at]
            images = self.augment.apply(self.images[chosen], draws[at])
            yield self.normalise(images), self.labels[chosen]


class TestBatches:
    """Test batches of a data set held as uint8 on the device: each image once, split over the processes."""

    __test__ = False

    def __init__(self, image_set, batch_size, world, limit=None):
        if len(image_set) < world.size:
            raise UserError(f"{len(image_set)} test images do not divide among {world.size} processes")
        self.num_classes, self.size = len(image_set.classes), image_set.size
        mine = torch.arange(world.rank, len(image_set), world.size)[: None if limit is None else limit * batch_size]
        share = image_set.subset(mine)
        self.images = share.images().to(world.device)
        self.labels = share.labels.to(world.device)
        self.normalise = Normaliser(image_set.statistics, world.device)
        self.batch_size = batch_size

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


def load(args, world):
    """Read the data set of `args`, once, into batches on the device: a Data."""
    train_set = datasets.load(args.dataset, args.data, True, args.num_workers)
    test = load_test(args, world)
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
    augment = CropFlip(train_set.size, flip=train_set.flip)
    train = DeviceBatches(train_set, args.batch_size, augment, world, args.manual_seed, args.limit_batches)
    val = test_batches(held_out, args, world) if held_out else None
    return Data(train, val, test, len(train_set.classes), train_set.size)


def load_test(args, world):
    """Read the test images of the data set of `args` into batches on the device."""
    return test_batches(datasets.load(args.dataset, args.data, False, args.num_workers), args, world)


def test_batches(image_set, args, world):
    """Return batches of a forward pass without gradient over `image_set`."""
    return TestBatches(image_set, max(args.batch_size, 256), world, args.limit_batches)
