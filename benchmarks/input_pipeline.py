"""Images per second and core of reading ImageNet's files, beside a plain ImageFolder with torchvision's v1 transforms.

    python benchmarks/input_pipeline.py --data FOLDER [--images 2000] [--rounds 7]

Images fewer than `--images` are read again. Both loaders read in this process, in turns. v1 ends in normalised float32;
here a worker ends in uint8, and the device normalises (the last line does it on this core).
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from step import ranged
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

import options
from imagesets import folders, from_files
from imagesets.augment import Augmentation
from training import speed
from utils import World

BATCH = 50


def rate(batches):
    """Return images per second of processor time over an iterable of (images, labels, ...)."""
    began = time.process_time()
    return sum(len(batch[1]) for batch in batches) / (time.process_time() - began)


def main():
    """Measure in turns, of which the first one warms up; print the speeds and their ratios to v1's."""
    parser = options.Parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder of train/<class>/*.JPEG")
    parser.add_argument("--images", type=options.positive, default=2000, help="images to read in all")
    parser.add_argument("--rounds", type=options.positive, default=7, help="turns of the two")
    args = parser.parse_args()
    torch.set_num_threads(1)
    speed.keep_memory()  # as a run on the CPU does; the other loader gains from it too
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    steps.append(transforms.Normalize(*folders.STATISTICS))
    plain = datasets.ImageFolder(args.data / "train", transforms.Compose(steps))
    images = replace(folders.read_folder(args.data / "train"), size=224)
    transform = from_files.training_transform(images, Augmentation(padding=None, flip=True))
    reader, turns = from_files.Reader(images, transform, World(), 0, False), []
    for turn, part in enumerate(torch.randperm(args.images).remainder(len(images)).chunk(args.rounds)):
        plan = [[(number, (turn, number)) for number in numbers.tolist()] for numbers in part.split(BATCH)]
        theirs = rate(DataLoader(Subset(plain, part.tolist()), BATCH))
        turns.append((theirs, rate(reader.loader(plan)), rate(reader.read(plan))))
    names = ("ImageFolder and v1 transforms", "decoded and augmented here", "the same, normalised too")
    for number, name in enumerate(names):
        speeds, ratios = zip(*((turn[number], turn[number] / turn[0]) for turn in turns[1:]), strict=True)
        print(f"{name}: {ranged(speeds, 0)} images/s, ratio {ranged(ratios, 2)}")


if __name__ == "__main__":
    main()
