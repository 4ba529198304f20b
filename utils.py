"""User errors, seeds, ranks, and reading and writing weights."""

import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import pickle
import platform
import random
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import models
from models import hub, state_dicts
from models.state_dicts import digest
from models.tracer import first_line


class UserError(Exception):
    """An error that the user can fix: printed as one line, exit status 2."""


class World(NamedTuple):
    """This process's place in a run: `rank` of `size` processes, computing on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0


def available_cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def seed_all(seed: int) -> None:
    """Seed every generator that initial weights or data could draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def print_main(text: object, file: TextIO | None = None) -> None:
    """Print `text` on rank 0 only. The rank is torchrun's RANK, so this works before the process group exists."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file, flush=True)


def warn(text: object) -> None:
    """Print `text` as one line on stderr, in the first process only."""
    print_main(" ".join(str(text).splitlines()), sys.stderr)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the bare network inside DataParallel (`.module`) and torch.compile (`._orig_mod`), in any order."""
    while hasattr(model, "_orig_mod") or isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return {"python": platform.python_version(), **{name: str(version) for name, version in found.items()}}


def safe_globals() -> list:
    """Return what a checkpoint may hold beside tensors: numpy's numbers, parsed arguments, paths, default dicts."""
    kinds = [np.dtype(code) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "U1")]
    allowed = [np.dtype, np.ndarray, *(type(kind) for kind in kinds), argparse.Namespace, dict, list, int]
    allowed += [(lambda *_: {}, "collections.defaultdict")]  # torch.load fills plain dicts alone
    scalar, array = (value.__reduce__()[0] for value in (np.float64(), np.zeros(1)))
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of numpy 1 and of numpy 2
        allowed += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    for module in ("pathlib", "pathlib._local"):  # the latter in Python 3.13; the pure paths open nothing
        allowed += [(pathlib.PurePosixPath, f"{module}.PosixPath"), (pathlib.PureWindowsPath, f"{module}.WindowsPath")]
    return allowed


def read_file(path: str | os.PathLike) -> dict:
    """Return the dict stored at `path`, read without executing anything; UserError if it is missing or broken."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is a folder, not a file" if os.path.isdir(path) else f"no such file: {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        if start[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a git-lfs pointer, not the weights: fetch them with `git lfs pull`")
        if start.lstrip().startswith(b"<"):
            raise UserError(f"{path}: a web page, not weights: download the file itself")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not compare the checksums
            if damaged:
                raise UserError(f"{path}: corrupt (the checksum of {damaged} does not fit)")
        with torch.serialization.safe_globals(safe_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {refusal(error)}") from None
    except Exception as error:  # damaged files fail in a dozen ways
        raise UserError(f"{path}: corrupt or not a checkpoint ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def hub_content(arch: str | None) -> dict:
    """Return a checkpoint's content for the library's own weights of a network; ValueError if they are unavailable."""
    if arch is None:
        raise ValueError("a library's own weights do not name their network: give --arch")
    mean, std = models.normalisation(arch) or (None, None)
    return {"state_dict": models.hub_weights(arch), "info": {"mean": mean, "std": std}}


def refusal(error: pickle.UnpicklingError) -> str:
    """Return why PyTorch's safe reader refused a file, without its advice to switch the safety off."""
    asked = re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)", str(error))
    if not asked:
        return "damaged, or not a checkpoint that torch.save wrote"
    name = asked[1] or asked[2]
    advice = (
        "for a whole pickled model, run `torch.save(model.state_dict(), FILE)` where its code is, and load that file"
    )
    return f"refused: it asks to run {name}; {advice}"


class Checkpoint:
    """A file of weights, read once and safely, in any published layout; its properties are what the file records.

    `content` is the file's dict, `state` its plain state dict without wrappers' prefixes. `key` names the dict of
    weights in a file that holds several (`--weights-key`). The path `hub` stands for a library's own weights of `arch`.
    """

    def __init__(self, path: str | os.PathLike, key: str | None = None, arch: str | None = None):
        self.path = path
        with self.errors_named():
            self.content = hub_content(arch) if path == "hub" else read_file(path)
            found, self.ema = state_dicts.find(self.content, key)
            self.state, counters = state_dicts.clean(found)
        if self.ema:
            warn(f"{path}: using the EMA weights, {self.ema} (--weights-key chooses others)")
        if counters:
            warn(f"{path}: left out {len(counters)} counters that are no weights ({counters[0]})")

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Turn a ValueError about the weights into a UserError that names the file."""
        try:
            yield
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None

    @property
    def arch(self) -> str | None:
        """The network's name, if the file records it."""
        return self.content.get("arch") if isinstance(self.content.get("arch"), str) else None

    @property
    def info(self) -> dict[str, Any]:
        """What the file says of its training images: class names, size, mean, std; empty for other people's files."""
        if isinstance(self.content.get("info"), dict):
            return self.content["info"]
        older = self.content if "versions" in self.content else {}  # of this project, before it recorded more
        return {name: older[name] for name in ("dataset", "size") if older.get(name)}

    @property
    def best_net(self) -> int | None:
        """The better network of a mutual pair, 1 or 2, if the file names it."""
        best = self.content.get("best")
        return best.get("net") if isinstance(best, dict) else None

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the weights' names and values."""
        return digest(self.state)

    @functools.cached_property
    def widths(self) -> tuple[int, int | None]:
        """The number of classes, and the views that the heads tell apart (None for a plain backbone)."""
        recorded = self.content.get("num_classes")
        with self.errors_named():
            return state_dicts.widths(self.state, recorded if isinstance(recorded, int) else None)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.widths[0]

    @property
    def rotations(self) -> int | None:
        """The views that the auxiliary heads tell apart, 4 (HSAKD) or 1 (DPCD); None for a plain backbone."""
        return self.widths[1]

    @property
    def recorded(self) -> dict[str, float]:
        """Epoch and accuracy that the file records, as numbers."""
        found = {}
        for key in ("epoch", "acc"):
            value = self.content.get(f"ema_{key}" if self.ema and f"ema_{key}" in self.content else key)
            if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
                value = value.item()
            if isinstance(value, (int, float)):
                found[f"recorded_{key}"] = value
        return found

    def load_into(self, model: nn.Module, net: int | None = None, renew: bool = False) -> None:
        """Load the weights into `model`, strictly; a backbone takes its part of an auxiliary network or of a pair.

        `net` (1 or 2) chooses the network of a mutual pair, by default the better one if the file names it, else 1.
        With `renew` the model keeps its own classifier if the file's is of another number of classes. `model.source`
        is what the file records. UserError names the first keys that do not fit, or the file's other architecture.
        """
        if net == 2 and not any(key.startswith("net2.") for key in self.state):
            raise UserError(f"{self.path}: --net 2: these weights are not a mutual pair's")
        model = unwrap(model)
        with self.errors_named():
            own, net = model.state_dict(), net or self.best_net or 1
            part = state_dicts.part_of(self.state, own, net)
            state_dicts.load(model, state_dicts.keep_classifier(part, own, self.num_classes) if renew else part)
        model.source = {"acc": self.recorded.get("recorded_acc"), "own": bool(self.info)}
        with contextlib.suppress(ValueError, AttributeError, TypeError):  # a name that is not known here
            theirs, ours = (models.backbone_name(arch, net) for arch in (self.arch, model.arch))
            files = models.is_file(theirs) or models.is_file(ours)  # which may be renamed
            if not files and hub.base_name(theirs) != hub.base_name(ours):  # mobilenetV2's weights fit mobilenetV2_s2
                raise UserError(f"{self.path}: weights of {theirs}, not of {ours}")


def load_weights(model: nn.Module, path: str | os.PathLike) -> Checkpoint:
    """Load the file at `path` into `model`, strictly, from any published layout (see Checkpoint); return the file."""
    checkpoint = Checkpoint(path)
    checkpoint.load_into(model)
    return checkpoint


def read_json(path: pathlib.Path) -> dict | None:
    """Return the dict in a JSON file, or None if there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "wb") -> Iterator:
    """Yield a file that takes the place of `path` once the block has written it; UserError if it cannot be written.

    A crash at any moment leaves the old file or the new one.
    """
    path = os.path.realpath(path)  # a link stays one
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        with contextlib.suppress(OSError):
            os.remove(temporary)
        reason = getattr(error, "strerror", None) or f"{first_line(error)}; is the disk full?"
        raise UserError(f"cannot write {path}: {reason}") from None


def save_checkpoint(content: dict, path: str | os.PathLike) -> None:
    """Write `content` to `path` as torch.save does, whole or not at all; UserError if it cannot be written."""
    with replacing(path) as file:
        torch.save(content, file)
