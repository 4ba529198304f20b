"""Accuracy of the published scripts' way of training beside this project's: same seeds, images, teacher and schedule.

    python benchmarks/equal_results.py --seeds 0 1 2 --tarch resnet20_aux --arch resnet8_aux --tcheckpoint T.pth.tar \\
        --dataset imagefolder --data CIFAR10 --epochs 4 --milestones 3 --limit-batches 100

All flags but --seeds are train_student_cifar.py's, which trains the one student of each seed; the other is trained by
the reference loop of step.py: float32, NCHW, eager, PIL transforms image by image.
"""

import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

from paths import PublishedImages, Reference
from torch.utils.data import DataLoader, RandomSampler

import options
import train_student_cifar
from training import launch, metrics
from training.optim import rate_factor, set_rate


def parse_args(argv=None):
    """Parse the command line: the student script's arguments, and the seeds."""
    parser = options.Parser(__doc__)
    parser.add_argument("--seeds", type=options.natural, nargs="+", default=[0, 1, 2])
    ours, rest = parser.parse_known_args(argv)
    args = train_student_cifar.parse_args(rest)
    args.seeds = ours.seeds
    return args


def reference(args, world):
    """Train what the script would as the published scripts do; return the last epoch's top-1 on the test images."""
    with mock.patch.object(train_student_cifar, "Trainer") as trainer:
        train_student_cifar.main(args, world)
    (model, objective), settings = trainer.call_args
    train = settings["train"]
    images, count = train.image_set, min(len(train) * train.batch_size, train.num_images)
    sampler = RandomSampler(images.labels, num_samples=count)
    loader = DataLoader(PublishedImages(images), train.batch_size, sampler=sampler)
    path = Reference(model, objective, loader, world.device, lr=args.init_lr)
    for epoch in range(args.epochs):
        set_rate(path.optimizer, rate_factor("multistep", epoch, 0, 1, args.epochs, args.milestones))
        path.round(epoch)
    return metrics.evaluate(model, settings["test"], world.device)["top1"]


def default(args, world):
    """Train by the script; return the last epoch's top-1."""
    with tempfile.TemporaryDirectory() as args.checkpoint_dir:
        train_student_cifar.main(args, world)
        (log,) = Path(args.checkpoint_dir).glob("*/log.jsonl")
        return json.loads(log.read_text().splitlines()[-1])["test/top1"]


def main(args, world):
    """Train both ways from every seed and print a Markdown table."""
    found = {"reference": [], "default": []}
    for seed in args.seeds:
        args.manual_seed = seed
        found["reference"].append(reference(args, world))
        found["default"].append(default(args, world))
    print("| path | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean ± std |")
    print("|:--|" + ":-:|" * (len(args.seeds) + 1))
    for name, values in found.items():
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + f" | {mean(values):.2f}{spread} |")


if __name__ == "__main__":
    launch.run(parse_args, main)
