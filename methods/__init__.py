"""The distillation methods, one file each: found by name, and the flags of their constants."""

import argparse
import importlib
import importlib.util
import inspect
import pkgutil
from types import ModuleType
from typing import Any

from torch import nn

import models
import options
from methods.base import Batch as Batch
from methods.base import Constant, Objective
from methods.base import Outputs as Outputs
from methods.base import Predictions as Predictions
from utils import Checkpoint, UserError, print_main


def defined_in(module: ModuleType) -> type[Objective] | None:
    """Return the method that a module defines, if it does."""
    classes = (value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Objective))
    return next((method for method in classes if method.__module__ == module.__name__), None)


# Every file of this folder but the base is a method: METHODS by name, and `methods.HSAKD` by class.
_MODULES = [importlib.import_module(f"methods.{file.name}") for file in pkgutil.iter_modules(__path__)]
METHODS = {method.name: method for method in map(defined_in, _MODULES) if method not in (None, Objective)}
globals().update({method.__name__: method for method in METHODS.values()})


def names() -> list[str]:
    """Return the names of the methods that learn from a trained teacher."""
    return [name for name, method in METHODS.items() if method.reads is not None]


def find(name: str) -> type[Objective]:
    """Return the method `name`, one of this folder or the user's own `FILE.py`; UserError if there is none."""
    if not name.endswith(".py"):
        if name not in METHODS:
            raise UserError(f"--method {name}: unknown; there are {', '.join(names())}, or FILE.py, one of your own")
        return METHODS[name]
    spec = importlib.util.spec_from_file_location("user_method", name)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise UserError(f"--method {name}: no such file") from None
    if defined_in(module) is None:
        raise UserError(f"--method {name}: defines no subclass of methods.Objective")
    return defined_in(module)


def flag_of(name: str, constant: Constant) -> str:
    """Return the flag of a constant."""
    return constant.flag or f"--{name.replace('_', '-')}"


def dest_of(name: str, constant: Constant) -> str:
    """Return the attribute of parsed arguments that holds a constant."""
    return flag_of(name, constant).lstrip("-").replace("-", "_")


def add_constants(parser: argparse.ArgumentParser, methods: list[type[Objective]]) -> None:
    """Add the flags of the methods' constants, in a group for each method; one that several have, once for all."""
    uses: dict[str, list] = {}
    for method in methods:
        for name, constant in method.constants().items():
            uses.setdefault(flag_of(name, constant), []).append((method, constant))
    groups = {method.name: parser.add_argument_group(f"method {method.name}") for method in methods}
    for flag, users in uses.items():
        first = users[0][1]
        add = groups[users[0][0].name].add_argument
        if first.kind is bool:
            add(flag, action="store_true", default=None, help=first.help)
            continue
        default = ", ".join(
            f"{options.shown(constant.default)}{' or by family' * bool(constant.family)}"
            + f" for {method.name}" * (len(users) > 1)
            for method, constant in users
        )
        pair = {"nargs": 2, "metavar": ("LOW", "HIGH")} if first.pair else {}
        add(flag, type=first.kind, help=f"{first.help} (default: {default})", **pair)


def add_method(parser: options.Parser, argv: list[str] | None, tarch: str = "wrn_40_2_aux") -> None:
    """Add the trained teacher, `--method` and all methods' constants to a student script's parser."""
    add = parser.add_argument_group("teacher and method").add_argument
    add("--tarch", type=options.architecture, default=tarch, help="architecture of the teacher")
    add("--tcheckpoint", type=options.path, required=True, help="trained weights of the teacher")
    options.add_choice(add, "--tcheckpoint")
    options.add_statistics(add, "teacher-", "of the teacher's images; default: its file's, else the student's")
    add("--teacher-cache", type=options.path, metavar="DIR", help="store of teachers' outputs; needs --views")
    add("--cache-dtype", choices=["exact", "float16"], help="of stored outputs (default: exact)")
    add("--method", default="hsakd", help=f"{', '.join(names())}, or FILE.py: what the student learns of the teacher")
    try:
        method = find(options.given(argv, "--method", default="hsakd"))
    except UserError as error:
        parser.error(str(error))
    if "batch_size" in parser.recipe:
        parser.recipe["batch_size"] = method.imagenet_batch
    known = [METHODS[name] for name in names()]
    options.add_start(parser)
    parser.set_defaults(methods=known if method in known else [*known, method])
    add_constants(parser, parser.get_default("methods"))


def finish(parser: options.Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse a student script's command line, reject other methods' constants, and fill in the method's own."""
    args = options.finish(parser, argv)
    methods = vars(args).pop("methods")
    known = {dest_of(*item): item for method in methods for item in method.constants().items()}
    method = METHODS.get(args.method, methods[-1])  # the last one is the user's own
    own = {dest_of(*item) for item in method.constants().items()}
    for dest in known.keys() - own:
        if getattr(args, dest) is not None:
            parser.error(f"{flag_of(*known[dest])} has no part in --method {args.method}")
        delattr(args, dest)
    for name in ("arch", "tarch"):
        if models.is_pair(getattr(args, name)):
            parser.error(f"--{name} {getattr(args, name)} is a mutual pair: name one of its networks")
    if method.networks == "pair" or method.reads is None:
        parser.error(f"--method {args.method} learns from no trained teacher")
    if method.networks == "plain":  # the name of an auxiliary network stands for its backbone
        args.arch = models.backbone_name(args.arch)
    else:
        options.require_aux(parser, args, *(["arch", "tarch"] if method.reads == "heads" else ["arch"]))
    fill_constants(args, method)
    for name, constant in method.constants().items():
        value = getattr(args, dest_of(name, constant))
        if constant.pair and value[0] > value[1]:
            parser.error(f"{flag_of(name, constant)}: {value[0]:g} is above {value[1]:g}")
    return args


def finish_online(parser: options.Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of a script that trains a mutual pair."""
    method = METHODS["hssakd"]
    options.add_start(parser)
    add_constants(parser, [method])
    parser.add_argument("--arch2", type=options.architecture, help="second network of a pair of two different ones")
    args = options.finish(parser, argv)
    if args.arch2:
        args.arch = "+".join(models.backbone_name(name) for name in (args.arch, args.arch2))
    options.require_pair(parser, args)
    fill_constants(args, method)
    return args


def fill_constants(args: argparse.Namespace, method: type[Objective]) -> None:
    """Fill in the method's constants that the command line leaves open, by the names of the networks."""
    for name, constant in method.constants().items():
        dest = dest_of(name, constant)
        if getattr(args, dest, None) is None:
            value = constant.default_for(getattr(args, "tarch", None), args.arch)
            setattr(args, dest, list(value) if constant.pair else value)


def constants_of(args: argparse.Namespace, method: type[Objective]) -> dict[str, Any]:
    """Return the keyword arguments of `method` that the command line gives."""
    return {name: getattr(args, dest_of(name, constant)) for name, constant in method.constants().items()}


def load_teacher(args: argparse.Namespace, checkpoint: Checkpoint, num_classes: int, size: int) -> nn.Module:
    """Return the teacher with a file's weights: with its heads if the method reads them, else its backbone.

    UserError if the weights do not fit, or are of another number of classes.
    """
    method = find(args.method)
    if checkpoint.num_classes != num_classes:
        classes = f"a teacher of {checkpoint.num_classes} classes, but the data set has {num_classes}"
        raise UserError(f"{checkpoint.path}: {classes}")
    if method.reads == "heads" and checkpoint.rotations == 1:
        raise UserError(f"{checkpoint.path}: {method.name} needs a teacher whose heads tell 4 rotations apart, not 1")
    name = args.tarch if method.reads == "heads" else models.backbone_name(args.tarch)
    teacher = options.create(args, name, num_classes, size, checkpoint.rotations or 4)
    checkpoint.load_into(teacher, args.net)
    return teacher


def print_pairs(student: nn.Module, teacher: nn.Module) -> None:
    """Print how heads are paired if two networks have different numbers of them."""
    counts = [network.auxiliary_classifier.num_branches for network in (student, teacher)]
    if counts[0] != counts[1]:
        heads = f"{counts[0]} auxiliary heads of the student, {counts[1]} of the teacher"
        print_main(f"{heads}: the {min(counts)} deepest are paired")
