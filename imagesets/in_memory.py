"""Batches of images that live on the training device: order and normalisation as tensor operations."""

import math

import numpy as np
import torch

import distributed
from utils import UserError

TEST_IMAGES = 256  # in a test batch, of 32 x 32 pixels or fewer


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


def share_of_test(length, limit, world):
    """Return this rank's positions (n,) in a test set of `length`: of every image, or of `limit` spread over all classes."""
    count = min(length, limit or length)
    if count < world.size:
        raise UserError(f"fewer test images ({count}) than processes ({world.size})")
    return (torch.arange(count) * length // count)[world.rank :: world.size]


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
    """Test batches of a data set held as uint8 on the device: each image once, split over the processes.

    A batch is of `batch_size` images or more, as many as take little memory in a forward pass without gradients.
    """

    __test__ = False

    def __init__(self, image_set, batch_size, world, limit=None):
        self.classes, self.size = image_set.classes, image_set.size
        limit = limit and limit * max(batch_size, TEST_IMAGES)
        share = image_set.subset(share_of_test(len(image_set), limit, world))
        self.images = share.images().to(world.device)
        self.labels = share.labels.to(world.device)
        self.normalise = Normaliser(image_set.statistics, world.device)
        self.batch_size = max(batch_size, TEST_IMAGES * 32**2 // max(self.size, 32) ** 2)
        self.total = distributed.count_over_ranks(len(self.labels), world)

    def __iter__(self):
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalise(images), labels
