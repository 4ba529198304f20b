"""Batches of images that live on the training device: order and normalisation as tensor operations."""

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from imagesets.augment import CropFlip, ResizedCropFlip
from imagesets.images import ImageSet, Settings
from imagesets.randaugment import RandAugmented
from utils import UserError, World

TEST_IMAGES = 256  # in a test batch, of 32 x 32 pixels or fewer


def generator_of(*key: int) -> torch.Generator:
    """Return a generator that is a function of whole numbers, such as (seed, epoch), alone: so a run is resumable."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def share_of_test(length: int, limit: int | None, world: World) -> tuple[torch.Tensor, int]:
    """Return this rank's positions in a test set, and the number of all ranks' positions.

    They are all of the `length`, or `limit` of them, evenly spaced.
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
    epoch can be entered at any step. With `views` each image has so many fixed views, functions of (views_seed, image,
    view); an epoch draws one of them.
    """

    def __init__(self, images: ImageSet, augmentation: Any, settings: Settings):
        self.image_set, self.augmentation = images, augmentation
        self.num_images, self.size, self.statistics = len(images), images.size, images.statistics
        self.batch_size, self.seed, self.world = settings.batch_size, settings.seed, settings.world
        self.views, self.views_seed = settings.views, settings.views_seed
        self.steps = min(math.ceil(len(images) / self.batch_size), settings.limit or len(images))
        if self.batch_size % self.world.size:
            raise UserError(f"a batch size of {self.batch_size} does not divide among {self.world.size} processes")

    def __len__(self):
        return self.steps

    def __iter__(self):
        return self.epoch(0)

    def views_key(self) -> dict[str, Any]:
        """Return all that a fixed view depends on."""
        key = {"images": self.image_set.fingerprint(), "size": self.size, "statistics": self.statistics}
        return {**key, "augmentation": repr(self.augmentation), "views_seed": self.views_seed}

    def order(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Generator]:
        """Return the order of an epoch's images, the view of each position, if views are fixed, and the generator."""
        generator = generator_of(self.seed, epoch)
        order = torch.randperm(self.num_images, generator=generator)
        views = torch.randint(self.views, (self.num_images,), generator=generator) if self.views else None
        return order, views, generator

    def shares(self, start: int) -> Iterator[torch.Tensor]:
        """Yield this rank's positions in the epoch's order, an equal slice of each batch, from step `start` on.

        The last batch holds what is left, padded from the start of the order to a multiple of the ranks, and to two
        images a rank: BatchNorm cannot train on a single value.
        """
        rank, ranks, _ = self.world
        for first in range(start * self.batch_size, self.steps * self.batch_size, self.batch_size):
            length = min(self.batch_size, self.num_images - first)
            each = max(math.ceil(length / ranks), min(2, self.num_images, self.batch_size // ranks))
            yield (torch.arange(each) + first + rank * each) % self.num_images


class TrainBatches(Epochs):
    """Training batches of images held as uint8 on the device."""

    def __init__(self, images: ImageSet, augmentation: CropFlip | ResizedCropFlip | RandAugmented, settings: Settings):
        super().__init__(images, augmentation, settings)
        self.images, self.labels = images.pixels.to(self.world.device), images.labels.to(self.world.device)
        self.normalise, self.size = Normaliser(images.statistics, self.world.device), augmentation.size
        if self.views:
            generators = [generator_of(self.views_seed, view, 1) for view in range(self.views)]
            self.view_draws = torch.stack([augmentation.draw(len(images), generator) for generator in generators])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (images (B, 3, S, S) float32, labels (B,), index (B,)) of this rank from step `start` of `epoch` on.

        If views are fixed, the views (B,) follow.
        """
        order, views, generator = self.order(epoch)
        draws = self.augmentation.draw(self.num_images, generator) if views is None else self.view_draws[views, order]
        shares = list(self.shares(start))
        if not shares:
            return
        # All steps' indices go to the device at once: a copy in each step would make the host wait.
        at, lengths = torch.cat(shares), [len(share) for share in shares]
        rows = (order, draws) if views is None else (order, draws, views)
        parts = (values[at].to(self.world.device).split(lengths) for values in rows)
        for index, drawn, *view in zip(*parts, strict=True):
            yield self.augmented(index, drawn), self.labels[index], index, *view

    def augmented(self, index: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return the images at `index` (B,), each augmented by its row of `draws`: (B, 3, S, S) float32."""
        return self.normalise(self.augmentation.apply(self.images[index], draws))

    def read_views(self, blocks: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield (images (B, 3, S, S) float32, index (B,), view (B,)) of blocks of (index, view)."""
        for index, view in blocks:
            device = self.world.device
            yield self.augmented(index.to(device), self.view_draws[view, index].to(device)), index, view


class TestBatches:
    """Test batches of images held as uint8 on the device: each image once, split over the processes.

    A batch has `batch_size` images or more, as many as take little memory in a forward pass without gradients.
    """

    __test__ = False

    def __init__(self, images: ImageSet, settings: Settings):
        batch_size, world = settings.batch_size, settings.world
        limit = settings.limit and settings.limit * max(batch_size, TEST_IMAGES)
        positions, self.total = share_of_test(len(images), limit, world)
        share = images.subset(positions)
        self.images, self.labels = share.pixels.to(world.device), share.labels.to(world.device)
        self.classes, self.size, self.statistics = images.classes, images.size, images.statistics
        self.normalise = Normaliser(images.statistics, world.device)
        self.batch_size = max(batch_size, TEST_IMAGES * 32**2 // max(self.size, 32) ** 2)

    def __len__(self):
        return math.ceil(len(self.labels) / self.batch_size)

    def some(self, count: int) -> "TestBatches":
        """Return batches of at most `count` images over all processes, evenly spaced."""
        found, step = copy.copy(self), math.ceil(self.total / count)
        found.images, found.labels = self.images[::step], self.labels[::step]
        return found

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            yield self.normalise(images), labels
