"""Accuracy of the published scripts' way of training beside this project's: same seeds, images, teacher and schedule.

    python benchmarks/equal_results.py --seeds 0 1 2 --tarch resnet20_aux --arch resnet8_aux --tcheckpoint T.pth.tar \\
        --dataset imagefolder --data CIFAR10 --epochs 4 --milestones 3 --limit-batches 100

All flags but --seeds and --json are train_student_cifar.py's, which trains the one student of each seed; the other is
trained by the reference loop of step.py: float32, NCHW, eager, PIL transforms image by image.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from torch.utils.data import RandomSampler
from training_paths import Reference

import datasets
import distributed
import loading
import methods
import metrics
import options
import train_student_cifar
import utils

SCRIPT = Path(train_student_cifar.__file__)


def parse_args(argv=None):
    """Parse the command line: the student script's arguments, and ours."""
    parser = options.Parser(__doc__)
    parser.add_argument("--seeds", type=options.seed, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", metavar="FILE", help="write all measurements")
    ours, rest = parser.parse_known_args(argv)
    args = train_student_cifar.parse_args(rest)
    if args.val_split or args.warmup_epoch or args.accumulate > 1 or args.dataset == "imagenet":
        parser.error("the reference has no --val-split, --warmup-epoch, --accumulate or --dataset imagenet")
    if args.resume or args.evaluate or args.multiprocessing_distributed:
        parser.error("every run is trained anew, by one process: no --resume, --evaluate or --multiprocessing-distributed")
    options.check_output(parser, "--json", ours.json)
    args.seeds, args.json, args.student_flags = ours.seeds, ours.json, rest
    return args


def reference(args, seed, world):
    """Train as the published scripts do; return the last epoch's top-1 on the test images and the images/s."""
    utils.seed_all(seed)
    train_set = datasets.load(args.dataset, args.data, True, args.num_workers)
    test = loading.load_test(args, world)
    count = min(args.limit_batches * args.batch_size if args.limit_batches else len(train_set), len(train_set))
    pair = methods.create_pair(args, test)
    sampler = RandomSampler(train_set.labels, num_samples=count)
    path = Reference(args, (args.tarch, args.arch), train_set, world, pair, sampler)
    seconds = 0.0
    for epoch in range(args.epochs):
        for group in path.optimizer.param_groups:
            group["lr"] = utils.learning_rate(args, epoch)
        began = time.perf_counter()
        path.round(epoch)
        seconds += time.perf_counter() - began
    return {"top1": metrics.evaluate(path.model, test, world.device)["top1"], "speed": args.epochs * count / seconds}


def default(args, seed):
    """Train with the project's own script; return the last epoch's top-1 and the images/s over all epochs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), *args.student_flags, "--manual_seed", str(seed), "--checkpoint-dir", folder]
        if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            raise utils.UserError(f"{SCRIPT.name} ended with status {status}")
        (log,) = Path(folder).glob("*/log.jsonl")
        epochs = [json.loads(line) for line in log.read_text().splitlines()]
    return {"top1": epochs[-1]["test/top1"], "speed": len(epochs) / sum(1 / e["images_per_second"] for e in epochs)}


def main(args, world):
    """Train both ways from every seed and print a Markdown table."""
    results = {"reference": [], "default": []}
    print("| path | " + " | ".join(f"seed {seed}" for seed in args.seeds) + " | mean and spread | images/s |")
    print("|:--|" + ":-:|" * (len(args.seeds) + 2), flush=True)
    for seed in args.seeds:
        results["reference"].append(reference(args, seed, world))
        results["default"].append(default(args, seed))
    for name, found in results.items():
        accuracies = [result["top1"] for result in found]
        spread = f"{mean(accuracies):.2f} ± {stdev(accuracies):.2f}" if len(found) > 1 else f"{accuracies[0]:.2f}"
        cells = [*(f"{value:.2f}" for value in accuracies), spread, f"{mean(r['speed'] for r in found):.0f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps({"seeds": args.seeds, **results}, indent=1) + "\n")


if __name__ == "__main__":
    distributed.run(parse_args, main)
