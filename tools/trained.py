"""Trained weights and how their images are read, for the scripts that use a network without training it."""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import imagesets
import models
import options
import utils
from imagesets.folders import ENDINGS, not_images
from imagesets.from_files import Reader
from imagesets.images import ImageSet, header
from options.parser import line_list
from training import speed
from utils import Checkpoint, UserError, World, warn


def add_weights(parser: options.Parser) -> None:
    """Add flags for the weights, their network and how images are read; defaults are what the weights record."""
    add = parser.add_argument_group("weights").add_argument
    add("--weights", type=options.path, required=True, metavar="FILE", help="trained weights")
    options.add_choice(add, "--weights")
    add("--arch", type=options.architecture, help="network; default: the one that the weights record")
    add = parser.add_argument_group("images (default: as the weights record)").add_argument
    add("--image-size", type=options.positive, metavar="N", help="pixels a side")
    add("--resize", choices=["crop", "squash", "pad"], help="how images become square")
    add("--margin", type=options.above_zero, help="shorter side before the centre crop, in sizes: 1.143 is 256 / 224")
    options.add_statistics(add, "", "of the normalisation")
    add("--class-names", type=line_list, metavar="FILE", help="names of the classes, one a line")
    add("--batch-size", type=options.positive, default=64, help="images of a forward pass (default: %(default)s)")
    readers = min(4, utils.available_cores())
    add("--num-workers", type=options.natural, default=readers, help="readers of images (default: %(default)s)")


@dataclass(frozen=True)
class Trained:
    """A plain network in evaluation mode, (B, 3, S, S) -> logits (B, N), and what its images are."""

    network: nn.Module
    arch: str
    classes: list[str]
    size: int  # S, pixels a side
    mean: tuple[float, ...]  # of the normalisation, on the scale 0 to 1
    std: tuple[float, ...]
    resize: str = "crop"  # crop, squash or pad
    margin: float = 1.0  # shorter side before the centre crop, in sizes
    grey_range: tuple[int, int] = (0, 65535)  # 16-bit values that become black and white
    info: dict[str, Any] = field(default_factory=dict)  # what the file records of its training images

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments by which `imagesets` reads a data set as this network's images are read."""
        own = {name: getattr(self, name) for name in ("size", "mean", "std", "resize", "margin", "grey_range")}
        return {**imagesets.recorded(self.info), **own}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What a program must know to use the network: how images become its input, and what its outputs mean."""
        return {
            "arch": self.arch,
            "input": f"float32 (batch, 3, {self.size}, {self.size}), RGB, (pixel / 255 - mean) / std",
            "output": f"logits (batch, {len(self.classes)})",
            "size": self.size,
            "resize": self.resize,
            "resized_side": round(self.size * self.margin) if self.resize == "crop" else self.size,
            "mean": list(self.mean),
            "std": list(self.std),
            "grey_range": list(self.grey_range),
            "class_names": self.classes,
        }

    def read(self, paths: list[str], batch_size: int, workers: int, world: World) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield (images (B, 3, S, S) float32, their paths) of image files, read as test images are.

        An unreadable image is named on stderr and left out.
        """
        labels, encoded = torch.zeros(len(paths), dtype=torch.int64), np.array([os.fsencode(path) for path in paths])
        how = {"resize": self.resize, "margin": self.margin, "grey_range": self.grey_range}
        images = ImageSet(labels, self.classes, (self.mean, self.std), self.size, paths=encoded, in_memory=False, **how)
        workers = 0 if len(paths) <= batch_size else workers  # a few images are read before a process has started
        reader = Reader(images, images.fitting(), world, workers, skip_bad_images=True)
        numbers = torch.arange(len(paths)).split(batch_size)
        for pixels, _, index, *_ in reader.read([[(number, (0,)) for number in part.tolist()] for part in numbers]):
            yield pixels, [paths[number] for number in index.tolist()]


def load(args: argparse.Namespace, world: World) -> Trained:
    """Return the network that the flags of `add_weights` name; UserError if anything is missing or does not fit."""
    checkpoint = Checkpoint(args.weights, args.weights_key, args.arch)
    arch = models.backbone_name(options.named(args.arch, checkpoint, args.net))
    settings = reading(args, checkpoint, arch)
    classes = args.class_names or checkpoint.info.get("class_names")
    classes = classes or [str(number) for number in range(checkpoint.num_classes)]
    if len(classes) != checkpoint.num_classes:
        raise UserError(f"{args.weights}: {checkpoint.num_classes} classes, but {len(classes)} class names")
    network = create(arch, len(classes), settings["size"])
    checkpoint.load_into(network, args.net)
    example = torch.zeros(1, 3, settings["size"], settings["size"])
    network = network.to(world.device, memory_format=speed.common_layout([network], [[example]]))
    named = {"class_names": args.class_names} if args.class_names else {}
    return Trained(network, arch, classes, **settings, info={**named, **checkpoint.info})


def reading(args: argparse.Namespace, checkpoint: Checkpoint, arch: str) -> dict[str, Any]:
    """Return how images are read, the last fields of `Trained`: as flags, the weights or the network's library say."""
    info = checkpoint.info
    found = options.own_reading(arch, info)
    if "dataset" in info:
        found["margin"] = 256 / 224 if info["dataset"] == "imagenet" else 1.0
    names = ("size", "mean", "std", "resize", "margin", "grey_range")
    found |= {name: value for name, value in imagesets.recorded(info).items() if name in names}
    given = {name: getattr(args, "image_size" if name == "size" else name, None) for name in names}
    found |= {name: value for name, value in given.items() if value is not None}
    missing = [f"--{'image-size' if name == 'size' else name}" for name in names[:3] if name not in found]
    if missing:
        raise UserError(f"{checkpoint.path}: does not say how its images are read: give {', '.join(missing)}")
    return found


@torch.no_grad()
def create(arch: str, num_classes: int, size: int) -> nn.Module:
    """Return a plain network in evaluation mode; UserError, in its own words, if it refuses images of `size` pixels."""
    try:
        network = models.create(arch, num_classes, size=size).eval()
        models.check_outputs(network(torch.zeros(1, 3, size, size)), num_classes, plain=True)
        return network
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"{arch}, images of {size} pixels: {utils.first_line(error)}") from None


def image_files(places: list[str]) -> list[str]:
    """Return the image files that are named, and those in and below the folders that are, sorted, without hidden ones.

    UserError for a folder without any.
    """
    found = []
    for place in places:
        if not os.path.isdir(place):
            found.append(place)
            continue
        walked = os.walk(place, followlinks=True)
        below = sorted(path for root, _, names in walked for name in names if (path := Path(root, name)).is_file())
        shown = [path for path in below if not any(part.startswith(".") for part in path.relative_to(place).parts)]
        images = {path: None for path in shown if path.suffix.lower() in ENDINGS or header(str(path))}
        others = not_images(path for path in shown if path not in images)
        if not images:
            raise UserError(f"no images in {place}{others}")
        if others:
            warn(f"{place}: images: {len(images)}{others}")
        found += map(str, images)
    return found
