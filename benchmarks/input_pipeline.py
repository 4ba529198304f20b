"""Images per second and core of reading ImageNet's files, beside a plain ImageFolder with torchvision's v1 transforms.

    python benchmarks/input_pipeline.py --data FOLDER [--images 2000] [--rounds 7]

FOLDER holds train/<class>/*.JPEG; if they are fewer than `--images`, they are read again. Both loaders read in this
process, in turns. v1 ends in normalised float32; here a worker ends in uint8, and the device normalises (the last line
does it on this core).
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from paths import ranged, spread
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
    count = sum(len(batch[1]) for batch in batches)
    return count / (time.process_time() - began)


def measure(folder, count, rounds):
    """Return the three speeds of each turn, in which `count / rounds` of the images are read."""
    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    plain = datasets.ImageFolder(folder, transforms.Compose([*steps, transforms.Normalize(*folders.STATISTICS)]))
    images = replace(folders.read_folder(folder), size=224)
    transform = from_files.training_transform(images, Augmentation(padding=None, flip=True))
    reader, found = from_files.Reader(images, transform, World(), 0, False), []
    for turn, part in enumerate(torch.randperm(count).remainder(len(images)).chunk(rounds)):
        plan = [[(number, (turn, number)) for number in numbers.tolist()] for numbers in part.split(BATCH)]
        theirs = rate(DataLoader(Subset(plain, part.tolist()), BATCH))
        found.append((theirs, rate(reader.loader(plan)), rate(reader.read(plan))))
    return found


def main():
    """Measure in turns and print the speeds and their ratios to v1's: medians and quartiles."""
    parser = options.Parser(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder of train/<class>/*.JPEG")
    parser.add_argument("--images", type=options.positive, default=2000, help="images to read in all")
    parser.add_argument("--rounds", type=options.positive, default=7, help="turns of the two")
    args = parser.parse_args()
    torch.set_num_threads(1)
    speed.keep_memory()  # as a run on the CPU does; the other loader gains from it too
    measure(args.data / "train", args.images // args.rounds, 1)  # warms up
    plain, *others = zip(*measure(args.data / "train", args.images, args.rounds), strict=True)
    print(f"ImageFolder and v1 transforms: {ranged(spread(plain), 0)} images/s")
    for name, speeds in zip(("decoded and augmented here", "the same, normalised too"), others, strict=True):
        ratios = spread([mine / theirs for mine, theirs in zip(speeds, plain, strict=True)])
        print(f"{name}: {ranged(spread(speeds), 0)} images/s, ratio {ranged(ratios, 2)}")


if __name__ == "__main__":
    main()
