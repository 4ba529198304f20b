"""The flags of images: where they are, and how they are read, normalised and augmented."""

import argparse
from collections.abc import Callable
from typing import Any

import utils
from options.parser import DATASETS, Channels, Parser, average, dataset, line_list, natural, part, path, positive, share

FOLDERS = ("tinyimagenet", "imagefolder", "imagenet")
FOLDER_FLAGS = ("image_size", "resize", "in_memory", "from_files", "test_split")
AUGMENTATIONS = ("crop", "rrc", "randaugment", "strong", "none")
REPEATS = 4  # epochs for each view of --views auto, as docs/speed.md recommends


def add_data(parser: Parser, dataset_name: str) -> None:
    """Add the flags of every script that reads a data set."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", type=path, default="./data", help="folder of the data set (default: %(default)s)")
    add("--dataset", type=dataset, default=dataset_name, help=f"{', '.join(DATASETS)} (default: %(default)s)")
    add("--batch-size", type=positive, default=64, help="images per step of all processes (default: 64, ImageNet 256)")
    add("--limit-batches", type=positive, help="for a quick trial: stop a pass after so many batches")
    readers = min(4, utils.available_cores())
    add("--num-workers", type=natural, default=readers, help="readers of images in each process (default: %(default)s)")
    add_statistics(
        add, "", "of the normalisation; auto, in training: measured", lambda x: x if x == "auto" else average(x)
    )
    add("--class-names", type=line_list, metavar="FILE", help="the order of the classes: a name a line")
    group = parser.add_argument_group("folders of images")
    add = group.add_argument
    add("--image-size", type=positive, metavar="N", help="pixels a side (default: the images', up to 96; ImageNet 224)")
    add("--resize", choices=["crop", "squash", "pad"], help="how images become square (default: crop)")
    add("--test-split", type=part, metavar="R", help="share held out for testing if there is no test folder")
    add("--skip-bad-images", action="store_true", help="skip unreadable images, and name them")
    add = group.add_mutually_exclusive_group().add_argument
    add("--in-memory", action="store_true", help="keep all images in memory; default: up to 2 GB of pixels")
    add("--from-files", action="store_true", help="read the images from their files in every pass")


def add_statistics(add: Callable, prefix: str, use: str, kind: Callable = average) -> None:
    """Add, by a group's `add_argument`, the mean and the standard deviation of a normalisation."""
    channels = {"action": Channels, "nargs": "+", "metavar": "A"}
    add(f"--{prefix}mean", type=kind, help=f"mean, 1 or 3 numbers from 0 to 1, {use}", **channels)
    add(f"--{prefix}std", type=share, help="standard deviation, likewise", **channels)


def add_augmentation(parser: Parser) -> None:
    """Add what is done to training images."""
    add = parser.add_argument_group("augmentation (default: as published; own images: by their size)").add_argument
    kinds = "crop: padded; rrc: random resized crop; randaugment: crop and more; strong: that and Cutout"
    add("--augment", choices=AUGMENTATIONS, help=kinds)
    add("--no-flip", action="store_true", help="mirror no images, such as text or arrows")
    views = f"number of fixed views of each image, of which an epoch uses one; auto: one for {REPEATS} epochs"
    add("--views", type=lambda text: text if text == "auto" else positive(text), metavar="V", help=views)
    add("--views-seed", type=natural, default=0, help="seed of the fixed views (default: 0)")


def check_data(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with one line for flags of images that contradict each other."""
    for name in FOLDER_FLAGS:
        if args.dataset not in FOLDERS and getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} is for folders of images, not for --dataset {args.dataset}")
    if args.mean == "auto" and (args.std or "optimizer" not in args):
        parser.error("--mean auto measures mean and std of training images; weights trained so record both")


def test_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of `imagesets.load_test` that the command line gives."""
    found = {name: getattr(args, name) for name in ("resize", "mean", "std", "class_names", "test_split")}
    found |= {"size": args.image_size, "keep": "memory" if args.in_memory else "files" if args.from_files else None}
    return {
        "name": args.dataset,
        "root": args.data,
        "batch_size": args.batch_size,
        "workers": args.num_workers,
        "limit": args.limit_batches,
        "skip_bad_images": args.skip_bad_images,
        **{name: value for name, value in found.items() if value is not None},
    }
