"""Batches of images too many for memory (ImageNet): decoded and cropped by workers, normalised on the device.

The counterpart of batches.DeviceBatches and batches.TestBatches, with the same order: what a position of an epoch shows
depends on (seed, epoch, position) alone, not on the number of workers or processes.
"""

import atexit
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import batches
import datasets
import distributed
import launcher
from utils import UserError, first_line

try:
    from torchvision.io import decode_jpeg
except ImportError:  # torchvision has announced that decoding will leave it; PIL reads the files then
    decode_jpeg = None

SIZE, TEST_RESIZE = 224, 256
PREFETCH = 2  # batches that each worker reads ahead
REPLACEMENTS = 100  # images tried in place of an unreadable one
SHOWN = 20  # unreadable images that a process names in an epoch
JPEG = [0xFF, 0xD8, 0xFF]  # how a JPEG file begins


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


def read_bytes(path):
    """Return the bytes of the file at `path`, (n,) uint8; OSError where it cannot be read."""
    return torch.from_numpy(np.fromfile(path, np.uint8))


def decode(path):
    """Return the image at `path` as (3, H, W) uint8, whatever its colour space; UserError where it cannot be read."""
    with suppress(OSError, RuntimeError):
        content = read_bytes(path)
        if decode_jpeg and content[:3].tolist() == JPEG:  # of other formats its decoders crash on some damaged files
            return decode_jpeg(content, "RGB")
    return datasets.decode(path)  # slower, but knows more formats and says what is wrong


def transformed(image, transform, key):
    """Return `transform(image)` with torch's generator seeded by the whole numbers `key`, and left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]))
        return transform(image)


def random_resized_crop(image):
    """Return torchvision's RandomResizedCrop(224) of image (3, H, W) uint8, in the layout that `stacked` joins fastest."""
    top, left, height, width = v2.RandomResizedCrop.get_params(image, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    pixels = image[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous()
    return v2.functional.resize(pixels.permute(2, 0, 1), [SIZE, SIZE], antialias=True)


class Images(Dataset):
    """Item (index, key) -> (image (3, 224, 224) uint8 or None, its label, lines about unreadable images met).

    With `fill` the next readable image takes the place of an unreadable one.
    """

    def __init__(self, files, transform, fill):
        self.files, self.transform, self.fill = files, transform, fill

    def __getitem__(self, item):
        index, key = item
        bad = []
        for at in range(index, index + (REPLACEMENTS if self.fill else 1)):
            at %= len(self.files)
            try:
                image = decode(os.fsdecode(self.files.paths[at]))
            except UserError as error:
                bad.append(str(error))
                continue
            return transformed(image, self.transform, key), self.files.labels[at], bad
        return None, None, bad


class EncodedImages(Images):
    """Item (index, key) -> (the file's bytes (n,) uint8, label, item), for decoding on the device."""

    told = False  # that some files are not decoded there

    def __getitem__(self, item):
        try:
            content = read_bytes(os.fsdecode(self.files.paths[item[0]]))
        except OSError:
            content = torch.zeros(0, dtype=torch.uint8)
        return content, self.files.labels[item[0]], item

    def decoded(self, contents, labels, items, device):
        """Return what `Images` gives for the files' `contents`, decoded on `device` in one call where all are plain JPEG."""
        try:
            images = decode_jpeg(contents, "RGB", device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # one of them is no JPEG that the device knows: on the CPU, image by image
            if not self.told:
                told = f"--decode device: batches with files that it cannot read are read on the CPU ({first_line(error)})"
                print(told, file=sys.stderr, flush=True)
                self.told = True
            found = [super(EncodedImages, self).__getitem__(item) for item in items]
            return collate([(None if image is None else image.to(device), *rest) for image, *rest in found])
        images = [transformed(image, self.transform, key) for image, (_, key) in zip(images, items, strict=True)]
        return stacked(images), labels, []


def collate(found):
    """Join `Images` items into (images, labels, lines about unreadable ones), without those that have no image."""
    images, labels, bad = zip(*found, strict=True)
    images, labels = ([part for part in parts if part is not None] for parts in (images, labels))
    joined = (stacked(images), torch.stack(labels)) if images else (torch.zeros(0), torch.zeros(0))
    return *joined, sum(bad, [])


def stacked(images):
    """Join (3, H, W) images into (B, 3, H, W) in channels-last layout, in which decoded pixels come and networks run."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def collate_encoded(found):
    """Join `EncodedImages` items: all bytes in one tensor, each of which takes a worker a file descriptor, and lengths."""
    contents, labels, items = zip(*found, strict=True)
    return torch.cat(contents), [len(content) for content in contents], torch.stack(labels), list(items)


def on_stream(stream, decoded, *args):
    """Return `decoded(*args)`, images on the GPU first, computed on a `stream` of their own.

    torchvision's decoder does not wait for the current stream before it writes into memory that was freed there, but whose last
    use may be still to come.
    """
    current = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(stream):
        stream.synchronize()
        images, *rest = decoded(*args)
    current.wait_stream(stream)
    if images.is_cuda:
        images.record_stream(current)
    return images, *rest


def stay(leaving, _):
    """Let a worker outlive the signals that a scheduler sends to all processes: training saves itself, then ends it.

    Where training is killed it ends at once: it holds the lock of the run folder, which a resumed run waits for.
    """
    launcher.end_with_parent(signal.SIGKILL, os.getppid())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)


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
        if args.decode == "device" and not decode_jpeg:
            raise UserError("--decode device: this torchvision has no decoder")
        self.files, self.world, self.skip, self.limit = files, world, args.skip_bad_images, args.limit_batches
        self.named, self.skipped = set(), 0  # unreadable images: told so far by this process, and of all in the last pass
        encoded = args.decode == "device"
        self.images = (EncodedImages if encoded else Images)(files, transform, fill and self.skip)
        self.stream = torch.cuda.Stream(world.device) if encoded else None
        self.normalise = batches.Normaliser(datasets.IMAGENET_STATISTICS, world.device)
        self.plan, workers = Plan(), args.num_workers
        leaving = multiprocessing.RawValue("b", 0)
        atexit.register(setattr, leaving, "value", 1)
        self.loader = DataLoader(
            self.images,
            batch_sampler=self.plan,
            num_workers=workers,
            collate_fn=collate_encoded if encoded else collate,
            pin_memory=world.device.type == "cuda" and not encoded,
            worker_init_fn=partial(stay, leaving),
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            generator=torch.Generator(),
        )

    def read(self, plan):
        """Yield (images (B, 3, 224, 224) float32, labels (B,)) of the batches of (index, key) items in `plan`.

        Raises UserError at an unreadable image; with --skip-bad-images names it and counts them at the end.
        """
        self.plan.batches, device = plan, self.world.device
        met, empty = set(), True
        for found in self.loader:
            if isinstance(self.images, EncodedImages):
                content, lengths, *rest = found
                found = on_stream(self.stream, self.images.decoded, list(content.split(lengths)), *rest, device)
            images, labels, bad = found
            if bad and not self.skip:
                raise UserError(f"{bad[0]}; --skip-bad-images goes on without it")
            for line in dict.fromkeys(bad):
                if line not in self.named and len(self.named) < SHOWN:
                    print(f"skipped: {line}", file=sys.stderr, flush=True)
                    self.named.add(line)
            met.update(bad)
            if len(labels):
                empty = False
                yield self.normalise(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
            elif self.images.fill:
                raise UserError(f"{bad[0]}; nor are the {REPLACEMENTS - 1} images after it readable")
        if self.skip:
            skipped, seen = (distributed.count_over_ranks(count, self.world) for count in (len(met), not empty))
            if skipped and not seen:
                raise UserError(f"{min(met, default='unreadable images')}; nor is any other image of this pass readable")
            if skipped != self.skipped and self.world.is_main:
                print(f"skipped {skipped} unreadable images", file=sys.stderr, flush=True)
            self.skipped = skipped


class TrainBatches(FileBatches):
    """Training batches: RandomResizedCrop(224) and flip; an epoch can be entered at any step."""

    def __init__(self, files, args, world):
        transform = v2.Compose([random_resized_crop, v2.RandomHorizontalFlip()])
        super().__init__(files, transform, args, world, fill=True)
        self.batch_size, self.seed = args.batch_size, args.manual_seed
        self.steps = batches.steps_of_epoch(len(files), self.batch_size, world, self.limit)

    def __len__(self):
        return self.steps

    def epoch(self, epoch, start=0):
        """Return an iterator of (images, labels) of this rank from step `start` of `epoch` on."""
        # A run stopped after an epoch's last step starts no workers for nothing.
        return self.read(self.items(epoch, start)) if start < self.steps else iter(())

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
        transform = v2.Compose([v2.Resize(TEST_RESIZE, antialias=True), v2.CenterCrop(SIZE)])
        super().__init__(files, transform, args, world, fill=False)
        self.classes, self.size = files.classes, SIZE
        size = max(args.batch_size // world.size, 1)
        count = min(len(files), self.limit * args.batch_size) if self.limit else len(files)
        if count < world.size:
            raise UserError(f"fewer test images ({count}) than processes ({world.size})")
        self.mine = range(world.rank, count, world.size)
        self.listed = distributed.count_over_ranks(len(self.mine), world)
        self.items = [[(i, (0,)) for i in self.mine[at : at + size]] for at in range(0, len(self.mine), size)]

    @property
    def total(self):
        """The images of all processes, without those that the last pass left out."""
        return self.listed - self.skipped

    def __len__(self):
        return len(self.mine)

    def __iter__(self):
        return self.read(self.items)
