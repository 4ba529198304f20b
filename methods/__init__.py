"""The distillation methods, one file each: found by name, and the flags of their constants."""

import argparse
import importlib
import inspect
import pkgutil
import sys
from types import ModuleType
from typing import Any

from torch import nn

import models
import options
from methods.base import Batch, Constant, Imitation, Objective, Outputs  # noqa: F401
from models import hub
from utils import Checkpoint, UserError


def defined_in(module: ModuleType) -> type[Objective] | None:
    """Return the method that a module defines, the most derived one; None if there is none or several."""
    classes = {value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Objective)}
    own = {method for method in classes if method.__module__ == module.__name__}
    last = own - {base for method in own for base in method.__mro__[1:]}
    return last.pop() if len(last) == 1 else None


# Every file of this folder but the base is a method: METHODS by name, and `methods.HSAKD` by class.
_MODULES = [importlib.import_module(f"methods.{file.name}") for file in pkgutil.iter_modules(__path__)]
METHODS = {method.name: method for method in map(defined_in, _MODULES) if hasattr(method, "name")}
globals().update({method.__name__: method for method in METHODS.values()})
RECIPES = {"published": "hsakd", "plus": "hsakd_dist"}


def names() -> list[str]:
    """Return the names of the methods that learn from a trained teacher."""
    return [name for name, method in METHODS.items() if method.reads is not None]


def find(name: str) -> type[Objective]:
    """Return the method `name`, one of this folder or the user's own `FILE.py`; UserError if there is none."""
    if not name.endswith(".py"):
        if name not in METHODS:
            raise UserError(f"--method {name}: unknown; there are {', '.join(names())}, or FILE.py, one of your own")
        return METHODS[name]
    try:
        found = defined_in(hub.load_file(name))
    except FileNotFoundError:
        raise UserError(f"--method {name}: no such file") from None
    except ValueError as error:
        raise UserError(f"--method {error}") from None
    if found is None:
        raise UserError(f"--method {name}: defines no subclass of methods.Objective, or several, none from the others")
    return found


def add_constants(parser: argparse.ArgumentParser, method: type[Objective]) -> None:
    """Add the flags of a method's constants, in a group of their own."""
    add = parser.add_argument_group(f"method {method.name}").add_argument
    for constant in method.constants().values():
        if constant.kind is bool:
            add(constant.flag, action=argparse.BooleanOptionalAction, help=constant.help)
            continue
        pair = {"nargs": 2, "metavar": ("LOW", "HIGH")} if constant.pair else {}
        default = options.shown(constant.default) + " or by family" * bool(constant.family)
        add(constant.flag, type=constant.kind, help=f"{constant.help} (default: {default})", **pair)


def refuse_others(parser: options.Parser, argv: list[str] | None, method: type[Objective]) -> None:
    """Exit with one line for a flag of another method, which argparse might take for the beginning of a flag."""
    own = {constant.dest for constant in method.constants().values()}
    others = {constant.dest for other in METHODS.values() for constant in other.constants().values()} - own
    for word in sys.argv[1:] if argv is None else argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag[2:].replace("-", "_") in others:
            parser.error(f"{flag} has no part in --method {method.name}")


def finish_student(parser: options.Parser, argv: list[str] | None, tarch: str = "wrn_40_2_aux") -> argparse.Namespace:
    """Parse a student script's command line: trained teacher, `--method`, and the constants of the method chosen."""
    default = RECIPES[options.given(argv, "--recipe", choices=RECIPES, default="published")]
    group = parser.add_argument_group("teacher and method")
    add = group.add_argument
    add("--tarch", type=options.architecture, default=tarch, help="architecture of the teacher")
    add("--tcheckpoint", type=options.path, required=True, help="weights of the teacher, or hub: the library's own")
    options.add_choice(add, "--tcheckpoint")
    options.add_statistics(add, "teacher-", "for the teacher's images; default: its file's, else the student's")
    add("--teacher-cache", type=options.path, metavar="DIR", help="store of teachers' outputs; needs --views")
    add("--cache-dtype", choices=["exact", "float16"], help="type of the stored outputs (default: exact)")
    listed = f"{', '.join(names())}, or FILE.py, one of your own (default: hsakd); --method NAME --help lists its flags"
    one = group.add_mutually_exclusive_group()
    one.add_argument("--method", default=default, help=listed)
    plus = "plus: --method hsakd_dist, for a teacher far better than the student; see docs/results.md"
    one.add_argument("--recipe", choices=RECIPES, help=plus)
    options.add_start(parser)
    try:
        method = find(options.given(argv, "--method", default=default))
    except UserError as error:
        parser.error(str(error))
    if method.reads is None:
        parser.error(f"--method {method.name} learns from no trained teacher")
    if "batch_size" in parser.recipe:
        parser.recipe["batch_size"] = method.imagenet_batch
    refuse_others(parser, argv, method)
    add_constants(parser, method)
    args = options.finish(parser, argv)
    del args.recipe  # `method` says it
    for name in ("arch", "tarch"):
        if models.is_pair(getattr(args, name)):
            parser.error(f"--{name} {getattr(args, name)} is a mutual pair: name one of its networks")
    if method.networks == "plain":  # the name of an auxiliary network stands for its backbone
        args.arch = models.backbone_name(args.arch)
    else:
        options.require_aux(parser, args, *(["arch", "tarch"] if method.reads == "heads" else ["arch"]))
    fill_constants(args, method)
    return args


def finish_pair(parser: options.Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of a script that trains a mutual pair."""
    method = METHODS["hssakd"]
    options.add_start(parser)
    add_constants(parser, method)
    parser.add_argument("--arch2", type=options.architecture, help="second network of a pair of two different ones")
    args = options.finish(parser, argv)
    if args.arch2:
        args.arch = "+".join(models.backbone_name(name) for name in (args.arch, args.arch2))
    if not models.is_pair(args.arch):
        half = models.backbone_name(args.arch)
        parser.error(f"--arch {args.arch} is one network, not a mutual pair: name it twice, {half}_{half}")
    fill_constants(args, method)
    return args


def fill_constants(args: argparse.Namespace, method: type[Objective]) -> None:
    """Fill in the method's constants that the command line leaves open, by the names of the networks."""
    for constant in method.constants().values():
        if getattr(args, constant.dest) is None:
            value = constant.default_for(getattr(args, "tarch", None), args.arch, args.dataset == "imagenet")
            setattr(args, constant.dest, list(value) if constant.pair else value)


def constants_of(args: argparse.Namespace, method: type[Objective]) -> dict[str, Any]:
    """Return the keyword arguments of `method` that the command line gives."""
    return {name: getattr(args, constant.dest) for name, constant in method.constants().items()}


def load_teacher(args: argparse.Namespace, checkpoint: Checkpoint, num_classes: int, size: int) -> nn.Module:
    """Return the teacher with a file's weights: with its heads if the method reads them, else its backbone.

    UserError if the weights do not fit.
    """
    method = find(args.method)
    if method.reads == "heads" and checkpoint.rotations != 4:
        found = "1 rotation" if checkpoint.rotations else "no heads"
        advice = "train_teacher_cifar.py trains them (--freezed --pretrained-backbone), --method kd reads none"
        raise UserError(f"{checkpoint.path}: {method.name} reads heads of 4 rotations, this has {found}: {advice}")
    name = args.tarch if method.reads == "heads" else models.backbone_name(args.tarch)
    teacher = options.create(args, name, num_classes, size, checkpoint.rotations or 4, checkpoint)
    checkpoint.load_into(teacher, args.net)
    return teacher
