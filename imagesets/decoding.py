"""From an image file to what a network sees of it: decoded, on the CPU or the GPU, and transformed by a seed of its own."""

import os
import re
from contextlib import suppress

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

import datasets
from utils import UserError, first_line, warn

try:
    from torchvision.io import decode_jpeg, encode_jpeg
except ImportError:  # torchvision has announced that decoding will leave it; PIL reads the files then
    decode_jpeg = None

SIZE = 224
REPLACEMENTS = 100  # images tried in place of an unreadable one
JPEG = [0xFF, 0xD8, 0xFF]  # how a JPEG file begins
GPU_FAULT = "CUDA error|Failed to synchronize CUDA|cudaStream"  # how PyTorch's and torchvision's errors of it begin


def read_bytes(path):
    """Return the bytes of the file at `path`, (n,) uint8; OSError where it cannot be read."""
    return torch.from_numpy(np.fromfile(path, np.uint8))


def decode(path):
    """Return the image at `path` as (3, H, W) uint8, whatever its colour space; UserError where it cannot be read."""
    with suppress(OSError, RuntimeError):
        content = read_bytes(path)
        if decode_jpeg and content[:3].tolist() == JPEG:  # of other formats its decoders crash on some damaged files
            image = decode_jpeg(content, "RGB")
            datasets.check_sides(path, *image.shape[1:])
            return image
    return datasets.decode(path)  # slower, but knows more formats and says what is wrong


def check_decoder(device):
    """Raise UserError unless torchvision decodes a JPEG file on `device`."""
    if not decode_jpeg:
        raise UserError("--decode device: this torchvision has no decoder")
    try:
        decode_jpeg([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))], "RGB", device)
    except RuntimeError as error:
        raise UserError(f"--decode device: {first_line(error)}") from None


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
            for image, (index, _) in zip(images, items, strict=True):
                datasets.check_sides(os.fsdecode(self.files.paths[index]), *image.shape[1:])
        except (RuntimeError, UserError) as error:  # one is no JPEG that the device knows: on the CPU, image by image
            if isinstance(error, torch.OutOfMemoryError) or re.match(GPU_FAULT, str(error), re.IGNORECASE):
                raise
            if not self.told:
                warn(f"--decode device: batches with files that it cannot read are read on the CPU ({first_line(error)})")
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
    """Join `EncodedImages` items: all files' bytes in one tensor, their lengths, labels and items.

    Every tensor that a worker sends takes a file descriptor.
    """
    contents, labels, items = zip(*found, strict=True)
    return torch.cat(contents), [len(content) for content in contents], torch.stack(labels), list(items)


def on_stream(stream, decoded, *args):
    """Return `decoded(*args)`, images on the GPU first, computed on a `stream` of their own.

    torchvision's decoder does not synchronise with the current stream: it could overwrite freed memory that kernels queued
    there still read.
    """
    current = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(stream):
        stream.synchronize()
        images, *rest = decoded(*args)
    current.wait_stream(stream)
    if images.is_cuda:
        images.record_stream(current)
    return images, *rest
