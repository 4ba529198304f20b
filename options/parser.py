"""How a command line is read: one-line errors, `-` and `_` alike, other projects' flags, and the kinds of values."""

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import models
import utils

DATASETS = ["cifar100", "cifar10", "digits", "tinyimagenet", "stl10", "imagefolder", "imagenet"]
# Flags of other projects, and those that mean the same here.
SYNONYMS = {
    "--lr": "--init-lr",
    "--learning-rate": "--init-lr",
    "--seed": "--manual_seed",
    "--workers": "--num-workers",
    "--wd": "--weight-decay",
    "--model": "--arch",
    "--student": "--arch",
    "--teacher": "--tarch",
    "--teacher-weights": "--tcheckpoint",
    "--pretrained": "--pretrained-backbone",
    "--output-dir": "--checkpoint-dir",
    "--lr-decay-epochs": "--milestones",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit status 2, and for which `-` and `_` within a flag are the same."""

    def __init__(self, description: str, **kwargs: Any):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.recipe: dict[str, Any] = {}  # defaults that depend on other flags, for `finish`

    def error(self, message: str) -> None:
        """Print `message` as one line, from the first process of a machine, and exit with status 2."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{self.prog}: error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
        sys.exit(2)

    def parse_known_args(self, args=None, namespace=None):
        """Parse the words as argparse does, once their flags are spelled as they are known here."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([self.respelled(word) for word in words], namespace)

    def respelled(self, word: str) -> str:
        """Return a word of the command line with the flag in it, or its beginning, spelled as it is known here."""
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            return word
        plain = name.replace("_", "-")
        known = [flag for flag in self._option_string_actions if flag.replace("_", "-").startswith(plain)]
        if plain in SYNONYMS and len(known) != 1 and name not in known:
            self.error(f"unknown flag {name}: here it is {SYNONYMS[plain]}")
        exact = [flag for flag in known if len(flag) == len(plain)]
        return (exact or known or [name])[0][: len(plain)] + equals + value

    def overridden(self, argv: list[str] | None, args: argparse.Namespace) -> argparse.Namespace:
        """Return the arguments of `argv` with the settings NAME=VALUE of --override; `override` becomes their names."""
        if not args.resume:
            self.error("--override needs --resume: it changes a setting of the run that is resumed")
        flags = {a.dest: a for a in self._actions if a.nargs != 0 and a.option_strings and a.dest != "override"}
        words, names = list(sys.argv[1:] if argv is None else argv), []
        for text in args.override:
            name, _, value = text.partition("=")
            if name not in flags or not value:
                near = difflib.get_close_matches(name, flags, 3)
                self.error(f"--override {text}: expected NAME=VALUE of a setting; nearest: {', '.join(near) or 'none'}")
            words += [flags[name].option_strings[0], *(value.split(",") if flags[name].nargs else [value])]
            names.append(name)
        args = self.parse_args(words)
        args.override = names
        return args


def shown(value: Any) -> str:
    """Return a default as the help shows it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def given(argv: list[str] | None, flag: str, **kwargs: Any) -> Any:
    """Return the value of one flag of a command line whose other flags are not known yet."""
    parser = Parser(None, add_help=False)
    parser.add_argument(flag, dest="value", **kwargs)
    return parser.parse_known_args(argv)[0].value


def checked(kind: type, expected: str, accepts: Callable[[Any], Any]) -> Callable[[str], Any]:
    """Return an argparse type: a `kind` that `accepts` is true of; its error names what is `expected`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


positive = checked(int, "a whole number from 1 to 2^31 - 1", lambda value: 1 <= value < 2**31)
natural = checked(int, "a whole number from 0 to 2^31 - 1", lambda value: 0 <= value < 2**31)
seed = checked(int, "a whole number from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
above_zero = checked(float, "a number above 0", lambda value: 0 < value < 1e30)
not_negative = checked(float, "a number of at least 0", lambda value: 0 <= value < 1e30)
below_one = checked(float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)
part = checked(float, "a share above 0 and below 1", lambda value: 0 < value < 1)
share = checked(float, "a share above 0 and at most 1", lambda value: 0 < value <= 1)
average = checked(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
gpu_ids = checked(str, "GPU numbers such as 0 or 0,1", lambda text: re.fullmatch(r"\d+(,\d+)*", text))
tag = checked(str, "letters, digits and any of . _ + = , -", lambda text: re.fullmatch(r"[\w.+=,-]+", text))
path = checked(os.path.expanduser, "a path", bool)  # a shell leaves the ~ in --data=~/images


class Channels(argparse.Action):
    """Takes a number for each of three channels, or one for all of them."""

    def __call__(self, parser, args, values, flag=None):
        """Note three values, or the word auto."""
        if len(values) not in (1, 3) or "auto" in values[1:]:
            parser.error(f"argument {flag}: expected 1 or 3 numbers, got {' '.join(map(str, values))}")
        setattr(args, self.dest, "auto" if values == ["auto"] else values * (3 // len(values)))


def line_list(file: str) -> list[str]:
    """Return the lines of a text file, without empty ones."""
    try:
        with open(path(file), encoding="utf-8-sig") as opened:
            return [line.strip() for line in opened if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {file} ({utils.first_line(error)})") from None


def architecture(name: str) -> str:
    """Check that an architecture exists; the error lists the nearest names."""
    try:
        models.backbone_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def dataset(name: str) -> str:
    """Map a data set's name, or a published spelling of it, to the name used here."""
    plain = name.lower().replace("-", "").replace("_", "")
    if plain not in DATASETS:
        near = difflib.get_close_matches(plain, DATASETS, 3, 0.3)
        raise argparse.ArgumentTypeError(f"unknown data set {name!r}; nearest: {', '.join(near or DATASETS)}")
    return plain
