"""The command line shared by the scripts: flags, their defaults by recipe, and the checks of their values."""

import argparse
import difflib
import math
import os
import re
import sys
from pathlib import Path

import models
import utils

DATASETS = ["cifar100", "cifar10", "digits", "tinyimagenet", "stl10", "imagefolder", "imagenet"]
# As published: the light networks start at 0.01, all others at 0.05.
LIGHT_NETWORKS = ("mobilenet", "mbv2", "shuffle")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and the defaults of the flags that have one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit status 2."""

    def __init__(self, description, **kwargs):
        super().__init__(description=description, formatter_class=HelpFormatter, **kwargs)

    def error(self, message):
        """Print `message` as one line, from the first process of a machine, and exit with status 2."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            utils.warn(f"{self.prog}: error: {message}")
        sys.exit(2)


def checked(kind, expected, accepts):
    """Return a parser of `kind` (int or float) of values that `accepts` is true of; its error names what is `expected`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


LARGEST = 2.0**127  # about the largest float32
# Below 2^31, so that products of two are numbers that a tensor can hold.
positive = checked(int, "a whole number from 1 to 2^31 - 1", lambda value: 1 <= value < 2**31)
natural = checked(int, "a whole number from 0 to 2^31 - 1", lambda value: 0 <= value < 2**31)
seed = checked(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
above_zero = checked(float, "a number above 0", lambda value: 0 < value < LARGEST)
not_negative = checked(float, "a number of at least 0", lambda value: 0 <= value < LARGEST)
below_one = checked(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)
share = checked(float, "a share above 0 and at most 1", lambda value: 0 < value <= 1)


def architecture(name):
    """Check that an architecture exists; the error lists the nearest names."""
    try:
        models.backbone_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def dataset(name):
    """Map a data set's name, or a published spelling of it, to the name used here."""
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in DATASETS:
        near = difflib.get_close_matches(plain, DATASETS, 3, 0.3)
        raise argparse.ArgumentTypeError(f"unknown data set {name!r}; nearest: {', '.join(near or DATASETS)}")
    return plain


def gpu_ids(text):
    """Check a comma-separated list of GPU numbers."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"expected GPU numbers such as 0 or 0,1, each once, got {text!r}")
    return text


def tag(text):
    """Check the suffix of a run folder's name."""
    if not re.fullmatch(r"[\w.+=,-]+", text):
        raise argparse.ArgumentTypeError(f"expected letters, digits and any of . _ + = , -, got {text!r}")
    return text


def path(text):
    """Expand the ~ that a shell leaves in --data=~/images; an empty text is no path (of a variable that is not set, say)."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return os.path.expanduser(text)


def base_parser(script, description, arch, dataset_name="cifar100"):
    """Return a parser with the flags that every script reads: data, network, device. `script` is its file."""
    parser = Parser(description, prog=Path(script).name)
    parser.set_defaults(script=Path(script).stem)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=path, default="./data", help="folder of the data set")
    add("--dataset", type=dataset, default=dataset_name, help=", ".join(DATASETS))
    add("--batch-size", type=positive, default=64, help="images a step, over all processes")
    add("--limit-batches", type=positive, help="quick trials: stop a pass after so many batches, a test's of 256 or more")
    readers = min(4, utils.available_cores())
    add("--num-workers", type=natural, default=readers, help="threads (imagenet: processes) that read for each process")
    add("--decode", choices=["cpu", "device"], default="cpu", help="imagenet: where JPEG files are decoded")
    add("--skip-bad-images", action="store_true", help="imagenet: go on without unreadable images, and name them")
    add = parser.add_argument_group("network and device").add_argument
    add("--arch", type=architecture, default=arch, help="architecture of the network, such as wrn_16_2_aux or resnet8x4")
    add("--gpu-id", type=gpu_ids, help="GPU to use, or several: 0,1,2,3")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="precision; auto: 16 bits where they are fast")
    return parser


def training_parser(script, description, arch, dataset_name="cifar100", epochs=240, milestones=(150, 180, 210)):
    """Return the parser of a training script: the base flags, the recipe, runs and processes."""
    parser = base_parser(script, description, arch, dataset_name)
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=positive, default=epochs, help="passes over the training images")
    add("--manual_seed", type=seed, default=0, help="seed of weights, data order and augmentation")
    add("--init-lr", type=above_zero, help="initial learning rate; default by the recipe of the architecture")
    add("--weight-decay", type=not_negative, default=5e-4, help="of all parameters, BatchNorm's too")
    add("--milestones", type=positive, nargs="+", default=list(milestones), help="epochs at which the rate is x0.1")
    add("--warmup-epoch", type=natural, default=0, help="epochs of linear warm-up")
    add("--val-split", type=below_one, default=0.0, help="select the best epoch on this share of training images")
    add("--accumulate", type=positive, default=1, help="parts that a batch is computed in, to save memory")
    add("--compile", action="store_true", help="compile the training step")
    add = parser.add_argument_group("run folder").add_argument
    add("--checkpoint-dir", type=path, default="./checkpoint", help="folder of the run folders")
    add("--tag", type=tag, help="suffix of the run folder's name")
    add("--resume", action="store_true", help="go on with the run in the run folder")
    add("--evaluate", action="store_true", help="test the run folder's best weights and stop")
    add_distributed(parser)
    parser.set_defaults(nesterov=True)
    return parser


def add_distributed(parser):
    """Add the published flags of runs on several devices or machines."""
    add = parser.add_argument_group("several processes (torchrun needs none of these but --sync-bn)").add_argument
    add("--multiprocessing-distributed", action="store_true", help="one process for each id of --gpu-id")
    add("--dist-url", default="tcp://127.0.0.1:23456", help="tcp://HOST:PORT of the first machine")
    add("--dist-backend", choices=["nccl", "gloo"], help="collectives; default nccl on GPUs, gloo on CPUs")
    add("--world-size", type=positive, default=1, help="number of machines")
    add("--rank", type=natural, default=0, help="number of this machine, from 0")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all processes")


def add_temperature(parser):
    """Add the temperature of the KL terms."""
    parser.add_argument("--kd_T", type=above_zero, default=3.0, help="temperature of the KL terms")


def add_net(add, weights):
    """Add, by a parser's or a group's `add_argument`, the network meant where the file of the flag `weights` is a pair's."""
    add("--net", type=int, choices=[1, 2], default=1, help=f"network of a mutual pair's {weights}")


def add_few_ratio(parser, default=None):
    """Add the share of the training set to train on."""
    parser.add_argument("--few-ratio", type=share, default=default, help="stratified share of the training images")


def add_freezing(parser):
    """Add the flags of a teacher script: its heads, and whether they alone train, on a backbone that stays as it is."""
    add = parser.add_argument_group("teacher").add_argument
    add("--pretrained-backbone", type=path, help="weights of the backbone to start from")
    add("--rotations", type=int, choices=[1, 4], default=4, help="views a head tells apart (DPCD: 1)")
    add("--freezed", action="store_true", help="keep the backbone as it is (CIFAR: 100 epochs, x0.1 at 30/60/90)")


def imagenet_parser(script, description, arch):
    """Return the parser of an ImageNet training script: `training_parser` with that recipe's defaults."""
    parser = training_parser(script, description, arch, "imagenet", epochs=100, milestones=(30, 60, 90))
    parser.set_defaults(data="./data/ImageNet", batch_size=256, weight_decay=1e-4, nesterov=False)
    return parser


def frozen_recipe(parser, argv):
    """Make the frozen teacher's schedule the default where `argv` asks for a frozen teacher."""
    if parser.parse_known_args(argv)[0].freezed:
        parser.set_defaults(epochs=100, milestones=[30, 60, 90])


def check_freezing(parser, args):
    """Exit with one line where --freezed has no weights to freeze."""
    if args.freezed and not args.pretrained_backbone:
        parser.error("--freezed needs --pretrained-backbone: an untrained backbone would stay untrained")


def finish(parser, argv=None):
    """Parse `argv` and fill in the recipe's defaults; a mistake is one line and exit status 2."""
    args = parser.parse_args(argv)
    if "init_lr" in args and args.init_lr is None:
        args.init_lr = default_learning_rate(args)
    if args.dataset != "imagenet" and (args.decode != "cpu" or args.skip_bad_images):
        parser.error(f"--decode and --skip-bad-images are for --dataset imagenet, not {args.dataset}")
    milestones = getattr(args, "milestones", [])
    if sorted(set(milestones)) != milestones:
        parser.error(f"--milestones must rise, got {' '.join(map(str, milestones))}")
    return args


def default_learning_rate(args):
    """Return the recipe's initial learning rate of an architecture."""
    if models.is_imagenet(args.arch):
        return 0.1
    return 0.01 if args.arch.lower().startswith(LIGHT_NETWORKS) else 0.05


def require_aux(parser, args, *names):
    """Exit with one line unless each architecture named (`arch`, `tarch`) has auxiliary classifiers."""
    for name in names:
        value = getattr(args, name)
        if not models.is_aux(value):
            near = f"{value}_aux" if f"{value}_aux" in models.names() else "wrn_16_2_aux"
            parser.error(f"--{name} {value} has no auxiliary classifiers: use one such as {near}")


def require_pair(parser, args):
    """Exit with one line unless `--arch` is a mutual pair."""
    if not models.is_pair(args.arch):
        half = models.backbone_name(args.arch)
        parser.error(f"--arch {args.arch} is one network, not a mutual pair: name it twice, {half}_{half}")


def check_output(parser, flag, path):
    """Exit with one line where the file `path` that `flag` names, if it is given, could not be written."""
    if path is None:
        return
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        parser.error(f"{flag}: cannot write {path}: no such folder: {folder}")
    if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):  # a folder, a device
        parser.error(f"{flag}: cannot write {path!r}: expected the name of a file")


def check_export(parser, path, weights):
    """Exit with one line where the backbone could not be written to `path`, or would overwrite `weights` or a run."""
    check_output(parser, "--export-backbone", path)
    target = os.path.realpath(path)
    if os.path.realpath(weights) in (target, os.path.realpath(f"{target}.tmp")):
        parser.error("--export-backbone would overwrite --student-weights")
    folder = os.path.dirname(target)
    if os.path.exists(target) and os.path.exists(os.path.join(folder, "args.json")):
        parser.error(f"--export-backbone would overwrite a file of the run in {folder}")
