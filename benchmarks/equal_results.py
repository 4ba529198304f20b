"""Accuracy of the published scripts' way of training beside this project's: same seeds, images, teacher and schedule.

    python benchmarks/equal_results.py --seeds 0 1 2 --tarch resnet20_aux --arch resnet8_aux --tcheckpoint T.pth.tar \\
        --dataset imagefolder --data CIFAR10 --epochs 4 --milestones 3 --limit-batches 100

All flags but --seeds are train_student_cifar.py's, which trains the one student of each seed; the other is trained by
the reference loop of step.py: float32, NCHW, eager, PIL transforms image by image. That one reads the rate, milestones,
epochs and batch size, and takes SGD and crops with a padding of 4 as published.
"""

import argparse
from unittest import mock

from paths import PublishedImages, Reference
from step import lines
from torch.utils.data import DataLoader, RandomSampler

import options
import train_student_cifar
from imagesets.augment import CropFlip
from report import mean_std
from training import Trainer, launch, metrics
from training.optim import rate_factor, set_rate


def parse_args(argv=None):
    parser = options.Parser(__doc__)
    parser.add_argument("--seeds", type=options.natural, nargs="+", default=[0, 1, 2])
    ours, rest = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(train_student_cifar.parse_args(rest)), seeds=ours.seeds)


def reference(args, networks, settings):
    """Train as the published scripts do; return the last epoch's top-1 on the test images."""
    train, device = settings["train"], settings["world"].device
    assert train.augmentation == CropFlip(train.size, 4, train.image_set.flip), "not the published augmentation"
    images, count = train.image_set, min(len(train) * train.batch_size, train.num_images)
    sampler = RandomSampler(images.labels, num_samples=count)
    loader = DataLoader(PublishedImages(images), train.batch_size, sampler=sampler)
    path = Reference(*networks, loader, device, args.init_lr)
    for epoch in range(args.epochs):
        set_rate(path.optimizer, rate_factor("multistep", epoch, 0, 1, args.epochs, args.milestones))
        path.round(epoch)
    return metrics.evaluate(path.model, settings["test"], device)["top1"]


def default(_, networks, settings):
    """Train as the script does; return the last epoch's top-1."""
    trainer = Trainer(*networks, **settings | {"folder": None})
    trainer.fit()
    return trainer.last_top1


def main(args, world):
    """Train both ways from every seed and print a Markdown table."""
    rows = []
    for way in (reference, default):
        found = []
        for seed in args.seeds:
            args.manual_seed = seed
            with mock.patch.object(train_student_cifar, "Trainer") as trainer:
                train_student_cifar.main(args, world)
            found.append(way(args, *trainer.call_args))
        rows.append([way.__name__, *(f"{top1:.2f}" for top1 in found), mean_std(found)])
    print(lines(*rows, head=["path", *(f"seed {seed}" for seed in args.seeds), "mean ± std"]))


if __name__ == "__main__":
    launch.run(parse_args, main)
