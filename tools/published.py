"""What a run trained, and the published number that belongs to it."""

import functools
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import models
from models import state_dicts
from utils import UserError, read_file, read_json

TABLE = Path(__file__).resolve().parent.parent / "results" / "published_results.json"


class Label(NamedTuple):
    """What a run trained. Runs with equal labels differ at most in their settings."""

    script: str
    network: str  # "teacher -> student", or the one network
    method: str  # with a star: of a jointly trained teacher
    data: str


def label_of(args: dict) -> Label:
    """Return the Label of a run from its args.json."""
    script, arch = Path(args["script"]).stem, args["arch"]
    origin = source_args(args["s_path"]) if args.get("s_path") else args
    tarch, data, method = origin.get("tarch"), args["dataset"], ""
    if script.startswith("train_teacher"):
        method = ("frozen" if args.get("freezed") else "joint") + ", one view" * (args.get("rotations") == 1)
    elif tarch:
        method = Path(origin.get("method") or "hsakd").name + "*" * has_joint_teacher(origin)
    if args.get("s_path"):
        data = f"{origin.get('dataset')} -> {data}"
    elif args.get("few_ratio"):
        data += f" ({args['few_ratio']:.0%})"
    return Label(script, f"{tarch} -> {arch}" if tarch else arch, method, data)


@functools.cache
def source_args(path: str) -> dict:
    """Return the arguments of the run that wrote the weights at `path`: from its args.json, the file, or the path."""
    known, guess = read_json(Path(path).parent / "args.json"), {}
    if known is None and Path(path).is_file():  # a copy of weights, or somebody else's
        with suppress(UserError, ValueError):
            content = read_file(path)
            known = content.get("args")
            if not any("auxiliary_classifier" in name for name in state_dicts.find(content)[0]):
                guess = {"script": "train_baseline"}
    if isinstance(known, dict):
        return known
    names = re.search(r"(train_\w+?)(?:_tarch_(\w+?))?_arch_(\w+)_dataset_([a-z0-9]+)", path)
    found = dict(zip(("script", "tarch", "arch", "dataset"), names.groups(), strict=True)) if names else {}
    return guess | found | {"freezed": "freezed" in path, "rotations": 1 if "one_view" in path else 4}


def has_joint_teacher(args: dict) -> bool:
    """Return whether a student's teacher trained jointly with its auxiliary classifiers on rotated views."""
    if not args.get("tcheckpoint") or not args["tarch"].endswith("_aux"):
        return False
    source = source_args(args["tcheckpoint"])
    other = not Path(source.get("script") or "train_teacher").name.startswith("train_teacher")  # such as an assistant's
    return not (other or source.get("freezed") or source.get("rotations") == 1)


def plain(arch: str) -> str:
    """Return the published name of an architecture: no auxiliary classifiers, one network of a mutual pair."""
    with suppress(ValueError):  # a network of another library
        arch = models.backbone_name(arch)
    return arch.removesuffix("_imagenet").removesuffix("_bn")


@functools.cache
def published() -> dict[tuple, float | list]:
    """Return {(kind of script, data, plain network, method): top-1, or [mean, std]} of all published results."""
    found = {}
    for table in json.loads(TABLE.read_text())["tables"].values():
        for method, values in table["rows"].items():
            for network, value in zip(table["networks"], values, strict=True):
                found.setdefault((table["kind"], table["data"], network, method), value)
    return found


def lookup(label: Label) -> str:
    """Return the published top-1 of what a run trained, empty if there is none."""
    if "+" in label.network:  # a pair of two different networks
        return ""
    kind = label.script.removeprefix("train_").split("_")[0]
    network = " -> ".join(plain(name) for name in label.network.split(" -> "))
    starred = label.method.endswith("*")
    other = label.method[:-1] if starred else label.method + "*"
    for method, note in ((label.method, ""), (other, " (plain teacher)" if starred else " (joint teacher)")):
        value = published().get((kind, label.data, network, method))
        if value:
            return ("{:.2f}±{:.2f}".format(*value) if isinstance(value, list) else f"{value:.2f}") + note
    return ""
