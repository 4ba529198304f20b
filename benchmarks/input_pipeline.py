"""Images per second and core of decoding and augmentation, beside a plain ImageFolder with torchvision's v1 transforms.

    python benchmarks/input_pipeline.py --data FOLDER [--images 2000] [--rounds 7]

FOLDER holds train/<class>/*.JPEG or <class>/*.JPEG, a few images being enough: hard links beside it, taken away at the end,
replicate them to `--images` files. Both loaders read in this process (one core, no workers), in turns over slices of the
same files; the ratio is the median over the rounds. v1 ends in normalised float32; here a worker ends in uint8, and the
device normalises (the last line does it on this core).
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fast  # noqa: E402
import imagefiles  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402
from datasets import IMAGENET_STATISTICS, class_folders  # noqa: E402
from distributed import World  # noqa: E402
from utils import UserError  # noqa: E402

BATCH = 50


def image_files(folder):
    """Return (path, class name) of the images of `folder`/train/<class>/, or of `folder`/<class>/ where there is no train/."""
    train = Path(folder) / "train"
    names, samples = class_folders(train if train.is_dir() else folder)
    return [(Path(path), names[label]) for path, label in samples]


def replicate(files, target, count):
    """Fill `target`/train with `count` hard links (copies across file systems) to the image `files`, class by class."""
    for number, (path, name) in enumerate(itertools.islice(itertools.cycle(files), count)):
        folder = Path(target) / "train" / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, folder / f"{number}{path.suffix}")
        except OSError:
            (folder / f"{number}{path.suffix}").write_bytes(path.read_bytes())


def plain_loader(root):
    """Return ImageFolder with v1 transforms to normalised float32, as in torchvision's and the published training code."""
    augment = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return datasets.ImageFolder(f"{root}/train", transforms.Compose([*augment, transforms.Normalize(*IMAGENET_STATISTICS)]))


def our_batches(root):
    """Return this project's training batches, read in this process."""
    args = argparse.Namespace(decode="cpu", skip_bad_images=False, limit_batches=None, num_workers=0)
    args.batch_size, args.manual_seed = BATCH, 0
    return imagefiles.TrainBatches(imagefiles.find(root, train=True), args, World(0, 1, torch.device("cpu")))


def uint8_batches(ours, plan):
    """Yield what the workers hand to the device: (uint8 images, labels)."""
    ours.plan.batches = plan
    for images, labels, _ in ours.loader:
        yield images, labels


def speed(batches, cores=time.process_time):
    """Return images per second of processor time over an iterable of (images, labels)."""
    began = cores()
    count = sum(len(labels) for _, labels in batches)
    return count / (cores() - began)


def needed(flops):
    """Yield lines of how many images a second ResNet-34 -> ResNet-18 trains on, at a device's `flops` a second.

    An image is four views; a trained network costs three forward passes a view, a frozen teacher one.
    """
    teacher, student = (models.create(f"resnet{depth}_imagenet_aux", 1000).eval() for depth in (34, 18))
    cost_teacher, cost_student = (8 * metrics.multiply_adds(network, 224) for network in (teacher, student))
    for name, cost in (("joint teacher", 3 * cost_teacher), ("student", cost_teacher + 3 * cost_student)):
        yield f"needed by the {name} ({cost / 1e9:.0f} GFLOP an image): {flops / cost:.0f} images/s"


def measure(args, files):
    """Return (files, files a turn, a turn's three speeds for each counted turn) over `--images` copies of `files`."""
    with tempfile.TemporaryDirectory(dir=Path(args.data).resolve().parent) as root:
        replicate(files, root, args.images)
        plain, ours = plain_loader(root), our_batches(root)
        order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0)).tolist()
        size = max(len(order) // args.rounds // BATCH, 1) * BATCH
        found = []
        for turn in range(args.rounds):
            part = order[turn * size : (turn + 1) * size]
            chunks = [[(i, (0, turn, i)) for i in part[at : at + BATCH]] for at in range(0, len(part), BATCH)]
            theirs = speed(DataLoader(Subset(plain, part), BATCH))
            found.append((theirs, speed(uint8_batches(ours, chunks)), speed(ours.read(chunks))))
    return len(order), size, found[1:] or found


def main():
    """Measure in turns and print both speeds, their ratio and its spread."""
    parser = options.Parser(__doc__)
    parser.add_argument("--data", required=True, type=options.path, help="folder of train/<class>/*.JPEG")
    parser.add_argument("--images", type=options.positive, default=2000, help="files to replicate them to")
    parser.add_argument("--rounds", type=options.positive, default=7, help="turns of the two loaders; the first is not counted")
    parser.add_argument("--tflops", type=options.above_zero, default=400.0, help="speed of the device that trains")
    args = parser.parse_args()
    if args.images < args.rounds * BATCH:
        parser.error(f"--images {args.images}: {args.rounds} rounds take {args.rounds * BATCH} or more")
    torch.set_num_threads(1)
    fast.keep_memory()  # as a run on the CPU does; the other loader gains from it too
    try:
        files = image_files(args.data)
        if not files:
            parser.error(f"--data {args.data}: no images at train/<class>/* or <class>/*")
        count, size, found = measure(args, files)
    except (UserError, OSError) as error:  # an image that cannot be read, a folder that cannot be written beside them
        parser.error(error)
    print(f"{count} files, {size} a turn, {len(found)} turns, one core: images per second of processor time, median")
    names = ("ImageFolder + v1 transforms", "imagefiles: decode + augment", "the same, normalised here too")
    for name, speeds in zip(names, zip(*found, strict=True), strict=True):
        ratios = sorted(speed / turn[0] for speed, turn in zip(speeds, found, strict=True))
        spread = f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{name:30}{statistics.median(speeds):6.0f}   {spread}")
    print(f"at {args.tflops:g} TFLOP/s", *needed(args.tflops * 1e12), sep="\n")


if __name__ == "__main__":
    main()
