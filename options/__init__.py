"""The command line that the scripts share: flags, and their defaults by recipe."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
from options.data import REPEATS, add_augmentation, add_data, add_statistics, check_data, test_settings
from options.networks import add_networks, create, named, own_reading, own_statistics
from options.parser import (
    Parser,
    above_zero,
    architecture,
    below_one,
    given,
    gpu_ids,
    natural,
    not_negative,
    part,
    path,
    positive,
    seed,
    share,
    shown,
    tag,
)
from utils import read_json, warn

__all__ = ["Parser", "above_zero", "architecture", "below_one", "given", "natural", "not_negative", "path", "positive"]
__all__ += ["add_networks", "add_statistics", "create", "named", "own_reading", "own_statistics", "share", "shown"]
__all__ += ["test_settings"]

# As published: the light networks start at 0.01, all others at 0.05.
LIGHT_NETWORKS = ("mobilenet", "mbv2", "shuffle")


def base_parser(script: str, description: str, arch: str | None, dataset_name: str = "cifar100") -> Parser:
    """Return a parser with the flags that every script reads: data, network, device. `script` is its file."""
    parser = Parser(description, prog=Path(script).name)
    parser.set_defaults(script=Path(script).stem)
    add_data(parser, dataset_name)
    add = parser.add_argument_group("network and device").add_argument
    listed = f"network, such as wrn_16_2_aux (default: {arch or 'that of the file'})"
    add("--arch", type=architecture, default=arch, help=listed)
    add("--gpu-id", type=gpu_ids, help="GPU to use, or several: 0,1,2,3")
    precisions = ["auto", "off", "bf16", "fp16"]
    add("--amp", choices=precisions, default="auto", help="precision; auto: 16 bits on hardware that has them")
    return parser


def training_parser(
    script: str,
    description: str,
    arch: str,
    dataset_name: str = "cifar100",
    epochs: int = 240,
    milestones: tuple[int, ...] = (150, 180, 210),
) -> Parser:
    """Return the parser of a training script: the base flags, the recipe, run folder and processes."""
    parser = base_parser(script, description, arch, dataset_name)
    parser.recipe = {"weight_decay": 5e-4, "nesterov": True}
    add = parser.add_argument_group("recipe").add_argument
    add("--epochs", type=positive, default=epochs, help="passes over the training images (default: %(default)s)")
    add("--manual_seed", type=seed, default=0, help="seed of weights, data order and augmentation (default: 0)")
    add("--optimizer", choices=["sgd", "adamw"], default="sgd", help="default: sgd, as published")
    add("--schedule", choices=["multistep", "cosine"], default="multistep", help="default: multistep, as published")
    add("--init-lr", type=above_zero, help="initial learning rate; default by the recipe of the architecture")
    add("--weight-decay", type=not_negative, help="of all parameters; default by the recipe")
    add("--nesterov", action=argparse.BooleanOptionalAction, help="Nesterov momentum of sgd; default by the recipe")
    rates = "epochs at which the rate is x0.1 (default: %(default)s)"
    add("--milestones", type=positive, nargs="+", default=list(milestones), help=rates)
    add("--warmup-epoch", type=natural, default=0, help="epochs of linear warm-up before the schedule (default: 0)")
    add("--val-split", type=below_one, default=0.0, help="select the best epoch on this share of the training images")
    average = "decay of a moving average of the weights, such as 0.999, tested in their place and saved beside them"
    add("--ema-decay", type=part, metavar="SHARE", help=average)
    add("--class-weights", choices=["balanced"], help="weight the classes inversely to their number of images")
    add("--label-smoothing", type=below_one, default=0.0, help="share of the hard labels spread over all classes")
    add("--accumulate", type=positive, default=1, help="split each batch into so many parts, to save memory")
    add("--compile", action="store_true", help="compile the training step")
    add = parser.add_argument_group("run folder").add_argument
    add("--checkpoint-dir", type=path, default="./checkpoint", help="folder of the run folders (default: %(default)s)")
    add("--tag", type=tag, help="suffix of the run folder's name")
    add("--resume", action="store_true", help="resume the run in the run folder")
    listed = "with --resume, change these settings from here on, such as init_lr=0.01"
    add("--override", nargs="+", metavar="NAME=VALUE", help=listed)
    add("--evaluate", action="store_true", help="test the run folder's best weights and stop")
    add("--save-minutes", type=above_zero, default=15, help="minutes between saves inside an epoch (default: 15)")
    add = parser.add_argument_group("several processes (torchrun needs none of the published flags)").add_argument
    add("--multiprocessing-distributed", action="store_true", help="one process for each id of --gpu-id")
    add("--dist-url", default="tcp://127.0.0.1:23456", help="tcp://HOST:PORT of the first machine")
    add("--dist-backend", choices=["nccl", "gloo"], help="collectives; default nccl on GPUs, gloo on CPUs")
    add("--dist-timeout", type=above_zero, default=10, help="minutes that a process waits for the others (default: 10)")
    add("--world-size", type=positive, default=1, help="number of machines")
    add("--rank", type=natural, default=0, help="number of this machine, from 0")
    add("--sync-bn", action="store_true", help="BatchNorm statistics over all processes")
    return parser


def add_choice(add: Callable, weights: str) -> None:
    """Add which weights of the flag `weights` are meant if its file holds several."""
    add("--net", type=int, choices=[1, 2], help=f"network of a mutual pair in {weights}; default: the better one")
    add_weights_key(add, weights)


def add_weights_key(add: Callable, weights: str) -> None:
    """Add the name of the weights meant if the file of the flag `weights` holds several."""
    add("--weights-key", metavar="KEY", help=f"which weights to take if {weights} holds several; default: EMA's")


def add_start(parser: Parser) -> None:
    """Add what shapes a network that is trained, what it starts from, and how its images are augmented."""
    add_networks(parser)
    add_augmentation(parser)
    add = parser.add_argument_group("start").add_argument
    add("--pretrained-backbone", type=path, help="weights to start from (of any classes), or hub: the library's")
    if "--weights-key" not in parser._option_string_actions:
        add_weights_key(add, "--pretrained-backbone")


def add_few_ratio(parser: Parser, default: float | None = None) -> None:
    """Add the share of the training set to train on."""
    parser.add_argument("--few-ratio", type=share, default=default, help="stratified share of the training images")


def imagenet_parser(script: str, description: str, arch: str) -> Parser:
    """Return the parser of an ImageNet training script: `training_parser` with that recipe's defaults."""
    parser = training_parser(script, description, arch, "imagenet", epochs=100, milestones=(30, 60, 90))
    parser.recipe = {"init_lr": 0.1, "weight_decay": 1e-4, "nesterov": False, "batch_size": 256}
    parser.set_defaults(data="./data/ImageNet", batch_size=None)
    return parser


def finish(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse `argv` and fill in the recipe's defaults; a mistake is one line and exit status 2."""
    args = parser.parse_args(argv)
    if getattr(args, "override", None):
        args = parser.overridden(argv, args)
    check_data(parser, args)
    if "optimizer" not in args:
        return args
    if getattr(args, "views", None) == "auto":
        args.views = -(-args.epochs // REPEATS)
    if args.optimizer == "sgd":
        defaults = {"init_lr": default_learning_rate(args.arch), **parser.recipe}
    else:
        defaults = {**parser.recipe, "init_lr": 1e-3, "weight_decay": 0.05, "nesterov": False}
        if args.nesterov is not None:
            parser.error(f"--nesterov has no part in --optimizer {args.optimizer}")
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if sorted(set(args.milestones)) != args.milestones:
        parser.error(f"--milestones must rise, got {' '.join(map(str, args.milestones))}")
    first = args.warmup_epoch + args.milestones[0]
    if args.schedule == "multistep" and first >= args.epochs > 1:
        warn(f"--milestones: the first is {first}, of {args.epochs} epochs: the learning rate is never lowered")
    return args


def default_learning_rate(arch: str) -> float:
    """Return the published initial learning rate of an architecture."""
    if models.is_imagenet(arch):
        return 0.1
    return 0.01 if arch.lower().startswith(LIGHT_NETWORKS) else 0.05


def require_aux(parser: Parser, args: argparse.Namespace, *names: str) -> None:
    """Exit with one line unless each architecture named (`arch`, `tarch`) has auxiliary classifiers."""
    for name in names:
        value = getattr(args, name)
        if not models.is_aux(value):
            near = f"{value}_aux" if models.is_aux(f"{value}_aux") else "wrn_16_2_aux"
            parser.error(f"--{name} {value} has no auxiliary classifiers: use one such as {near}")


def finish_teacher(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of a script that trains a teacher, jointly or on a frozen backbone."""
    add_start(parser)
    add = parser.add_argument_group("teacher").add_argument
    add("--rotations", type=int, choices=[1, 4], default=4, help="rotations that each head predicts (DPCD: 1)")
    add("--freezed", action="store_true", help="freeze the backbone (100 epochs, x0.1 at 30/60/90)")
    if given(argv, "--freezed", action="store_true"):
        parser.set_defaults(epochs=100, milestones=[30, 60, 90])
    args = finish(parser, argv)
    require_aux(parser, args, "arch")
    if args.freezed and not args.pretrained_backbone:
        parser.error("--freezed needs --pretrained-backbone: an untrained backbone would stay untrained")
    return args


def run_folder(args: argparse.Namespace) -> str:
    """Return a run folder's path, as the published commands spell it (`_imagenet` is said by the data set's name)."""
    parts = [args.script]
    for key in ("tarch", "arch"):
        if getattr(args, key, None):
            parts += [key, re.sub("[/:]", "-", getattr(args, key).replace("_imagenet", ""))]
    parts += ["dataset", args.dataset]
    if getattr(args, "few_ratio", None):
        parts += ["few_ratio", f"{args.few_ratio:g}"]
    name = "_".join(parts) + f"_seed{args.manual_seed}" + (f"_{args.tag}" if args.tag else "")
    return os.path.join(args.checkpoint_dir, name)


def data_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of `imagesets.load` that the command line gives, or else the run that is resumed."""
    started = read_json(Path(run_folder(args), "args.json")) if args.resume else None
    keep = (started or {}).get("image_set", {}).get("keep")
    more = {"seed": args.manual_seed, "val_split": args.val_split, "few_ratio": getattr(args, "few_ratio", None)}
    more |= {"augment": getattr(args, "augment", None), "flip": False if getattr(args, "no_flip", False) else None}
    more |= {"views": getattr(args, "views", None), "views_seed": getattr(args, "views_seed", 0)}
    own = own_statistics(args.arch) if args.dataset in ("imagefolder", "imagenet") else {}
    return {"keep": keep, **own, **test_settings(args), **more}


def loss_settings(args: argparse.Namespace, data: Any) -> dict[str, Any]:
    """Return the keyword arguments of an objective by which the command line shapes its cross-entropy on `data`."""
    weights = data.class_weights if args.class_weights else None
    return {"class_weights": weights, "label_smoothing": args.label_smoothing}


def trainer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of `Trainer` that the command line gives."""
    sgd = {"nesterov": args.nesterov} if args.optimizer == "sgd" else {}
    multistep = {"milestones": args.milestones} if args.schedule == "multistep" else {}
    same = ("epochs", "optimizer", "schedule", "weight_decay", "amp", "accumulate", "compile", "sync_bn", "resume")
    return {
        **{name: getattr(args, name) for name in (*same, "evaluate", "save_minutes", "dist_timeout", "ema_decay")},
        **sgd,
        **multistep,
        "lr": args.init_lr,
        "warmup": args.warmup_epoch,
        "seed": args.manual_seed,
        "folder": run_folder(args),
        "settings": vars(args),
        "teacher_cache": getattr(args, "teacher_cache", None),
        "cache_dtype": getattr(args, "cache_dtype", None) or "exact",
    }
