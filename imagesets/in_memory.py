"""Batches of images that live on the training device: order and normalisation as tensor operations."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from imagesets.augment import CropFlip, ResizedCropFlip
from imagesets.images import ImageSet
from utils import UserError, World

TEST_IMAGES = 256  # in a test batch, of 32 x 32 pixels or fewer


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of an epoch's order and augmentation: a function of (seed, epoch) alone, so resumable."""
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def share_of_batch(step: int, batch_size: int, count: int, world: World) -> torch.Tensor:
    """Return this rank's positions in the epoch's order at `step`: an equal slice of the batch of all ranks.

    The last batch holds what is left, padded from the start of the order to a multiple of the ranks.
    """
    first = step * batch_size
    length = min(batch_size, count - first)
    each = math.ceil(length / world.size)
    return (torch.arange(each) + first + world.rank * each) % count


def share_of_test(length: int, limit: int | None, world: World) -> tuple[torch.Tensor, int]:
    """Return this rank's positions in a test set, and the number of all ranks' positions.

    They are all of the `length`, or `limit` of them spread evenly over all classes.
    """
    count = min(length, limit or length)
    if count < world.size:
        raise UserError(f"fewer test images ({count}) than processes ({world.size})")
    return (torch.arange(count) * length // count)[world.rank :: world.size], count


class Normaliser:
    """uint8 images to normalised float32 in channels-last layout, (x / 255 - mean) / std."""

    def __init__(self, statistics: tuple, device: torch.device):
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in statistics)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return (B, 3, H, W) float32 of images (B, 3, H, W)."""
        width = images.shape[3]
        if self.scale.shape[3] != width:
            # A whole row of each: a CPU is several times slower if only the innermost three values repeat.
            rows = (value[..., :1].expand(1, 3, 1, width) for value in (self.scale, self.shift))
            self.scale, self.shift = (row.contiguous(memory_format=torch.channels_last) for row in rows)
        images = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        return torch.addcmul(self.shift, images, self.scale, out=images)


class Epochs:
    """What all training batches share: the length of an epoch, and its order.

    Order and augmentation depend on (seed, epoch, position) alone: the same for every number of processes, and an
    epoch can be entered at any step.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int, world: World, limit: int | None = None):
        if batch_size % world.size:
            raise UserError(f"a batch size of {batch_size} does not divide among {world.size} processes")
        self.num_images, self.size, self.statistics = len(images), images.size, images.statistics
        self.batch_size, self.seed, self.world = batch_size, seed, world
        self.steps = min(math.ceil(len(images) / batch_size), limit or len(images))

    def __len__(self):
        return self.steps

    def __iter__(self):
        return self.epoch(0)

    def shares(self, start: int) -> Iterator[torch.Tensor]:
        """Yield this rank's positions in the epoch's order at each step from `start` on."""
        for step in range(start, self.steps):
            yield share_of_batch(step, self.batch_size, self.num_images, self.world)


class TrainBatches(Epochs):
    """Training batches of images held as uint8 on the device."""

    def __init__(self, images: ImageSet, augmentation: CropFlip | ResizedCropFlip, *order, **more):
        super().__init__(images, *order, **more)
        self.images, self.labels = images.pixels.to(self.world.device), images.labels.to(self.world.device)
        self.normalise = Normaliser(images.statistics, self.world.device)
        self.augmentation, self.size = augmentation, augmentation.size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (images (B, 3, S, S) float32, labels (B,), index (B,)) of this rank from step `start` of `epoch` on."""
        count, device = self.num_images, self.world.device
        generator = epoch_generator(self.seed, epoch)
        order = torch.randperm(count, generator=generator)
        draws = self.augmentation.draw(count, generator)
        shares = list(self.shares(start))
        if not shares:
            return
        # All steps' indices go to the device at once: a copy in each step would make the host wait.
        at, lengths = torch.cat(shares), [len(share) for share in shares]
        parts = (rows[at].to(device).split(lengths) for rows in (order, draws))
        for index, drawn in zip(*parts, strict=True):
            images = self.augmentation.apply(self.images[index], drawn)
            yield self.normalise(images), self.labels[index], index


class TestBatches:
    """Test batches of images held as uint8 on the device: each image once, split over the processes.

    A batch has `batch_size` images or more, as many as take little memory in a forward pass without gradients.
    """

    __test__ = False

    def __init__(self, images: ImageSet, batch_size: int, world: World, limit: int | None = None):
        limit = limit and limit * max(batch_size, TEST_IMAGES)
        positions, self.total = share_of_test(len(images), limit, world)
        share = images.subset(positions)
        self.images, self.labels = share.pixels.to(world.device), share.labels.to(world.device)
        self.classes, self.size, self.statistics = images.classes, images.size, images.statistics
        self.normalise = Normaliser(images.statistics, world.device)
        self.batch_size = max(batch_size, TEST_IMAGES * 32**2 // max(self.size, 32) ** 2)

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalise(images), labels
