"""Weights, checkpoints, run folders, logs and the learning-rate schedule."""

import argparse
import fcntl
import hashlib
import json
import os
import pickle
import platform
import random
import re
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

# What a published checkpoint may hold beside tensors: numpy numbers (an accuracy) and the parsed arguments.
SAFE_TYPES = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype("float64")),
    type(np.dtype("float32")),
    type(np.dtype("int64")),
]
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    SAFE_TYPES.append((type(np.float64(0)).__reduce__(np.float64(0))[0], f"{_module}.scalar"))

# Arguments that may differ between a run and its resumption: where and how it runs, how long, and paths, whose files may
# have moved. (That the teacher is the same one is checked by its weights, see `digest`.)
FREE_ARGUMENTS = {
    "data", "checkpoint_dir", "num_workers", "gpu_id", "resume", "evaluate", "epochs", "dist_url", "dist_backend",
    "world_size", "rank", "multiprocessing_distributed", "decode", "tcheckpoint", "pretrained_backbone", "skip_bad_images",
}  # fmt: skip


LOCK_PATIENCE = 10  # seconds that --resume waits for a killed run to let go of its folder


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2."""


def seed_all(seed):
    """Seed every generator that initial weights or data could draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def learning_rate(args, epoch, progress=0.0):
    """Return the rate at `epoch` (from 0) plus `progress` in [0, 1): linear warm-up, then x0.1 at each milestone."""
    if epoch < args.warmup_epoch:
        return args.init_lr * (epoch + progress) / args.warmup_epoch
    return args.init_lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)


def first_line(error):
    """Return the first line of an error's message, shortened; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def read_checkpoint(path):
    """Return the dict stored at `path`, read without executing anything; raise UserError when it is missing or broken."""
    if not path or not os.path.isfile(path):
        raise UserError(f"no such file: {path}")
    try:
        with torch.serialization.safe_globals(SAFE_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: not a checkpoint that loads safely ({first_line(error)})") from None
    except Exception as error:  # damaged files make the unpickler fail in a dozen ways
        raise UserError(f"{path}: corrupt or not a checkpoint ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def state_dict_of(content, path):
    """Return the plain state dict within a checkpoint: under `net`, `state_dict` or `model`, or the dict itself."""
    for key in ("net", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    named = {k: v for k, v in content.items() if isinstance(k, str) and torch.is_tensor(v)}
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in named.items()}
    if not state:
        raise UserError(f"{path}: holds no weights")
    return state


def part_of(state, wanted, net=1):
    """Return the part of `state` that has a network's keys `wanted`: all of it, one network of a pair, or a backbone."""
    for prefix in ("", f"net{net}.", "backbone.", f"net{net}.backbone."):
        part = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if wanted & part.keys():
            return part
    return state


def load_weights(model, path, net=1):
    """Load `path` into `model`, strictly, from any published layout; return the checkpoint's dict.

    Layouts: ours and the authors' `{'net': ...}`, `{'state_dict': ...}`, `{'model': ...}`, a bare state dict, with or
    without `module.` prefixes. A backbone takes its part of an auxiliary network's weights, and a single network that
    of one network (`net`, 1 or 2) of a mutual pair. Raises UserError naming the first keys that do not fit.
    """
    content = read_checkpoint(path)
    state = part_of(state_dict_of(content, path), model.state_dict().keys(), net)
    expected = model.state_dict()
    wrong = [k for k, v in state.items() if k in expected and v.shape != expected[k].shape]
    # Files older than PyTorch 0.4.1 (torchvision's ResNets) do not count batches.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    if wrong or missing or unexpected:
        shapes = [f"{k} {list(state[k].shape)} instead of {list(expected[k].shape)}" for k in wrong]
        parts = [("wrong shape", shapes), ("missing", missing), ("unexpected", unexpected)]
        told = "; ".join(f"{what}: {', '.join(keys[:3])}{' ...' * (len(keys) > 3)}" for what, keys in parts if keys)
        raise UserError(f"{path}: weights do not fit {type(model).__name__}: {told}")
    model.load_state_dict({**{k: v for k, v in expected.items() if k not in state}, **state}, strict=True)
    return content


def digest(state):
    """Return a short text that tells state dicts apart by their names and values."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def weights_layout(path):
    """Return (number of classes, rotations) of the weights at `path`, read off the widths of their classifiers.

    `rotations` is None for a plain backbone.
    """
    state = state_dict_of(read_checkpoint(path), path)
    widths = {key: value.shape[0] for key, value in state.items() if re.search(r"(fc\d?|linear|classifier)\.weight$", key)}
    classes = [width for key, width in widths.items() if "auxiliary_classifier" not in key]
    joint = [width for key, width in widths.items() if "auxiliary_classifier" in key]
    if not classes:
        raise UserError(f"{path}: holds no classifier of an architecture known here")
    if joint and joint[0] not in (classes[0], 4 * classes[0]):
        raise UserError(f"{path}: its heads have {joint[0]} outputs for {classes[0]} classes, neither 1 nor 4 rotations")
    return classes[0], joint[0] // classes[0] if joint else None


def save_checkpoint(content, path):
    """Write `content` to `path` so that a crash at any moment leaves the old file or the new one; UserError if it cannot."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's writer
        raise UserError(f"cannot write {path}: {first_line(error)}") from None


def to_cpu(value):
    """Return `value` with every tensor in its dicts and lists copied to the CPU."""
    if torch.is_tensor(value):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_cpu(v) for v in value]
    return value


def versions():
    """Return the versions that a result depends on."""
    import torchvision

    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}


def run_name(script, args):
    """Return a run's folder name, as the published commands spell it (`_imagenet` is said by the data set's name)."""
    parts = [script]
    for key in ("tarch", "arch"):
        if getattr(args, key, None):
            parts += [key, getattr(args, key).replace("_imagenet", "")]
    parts += ["dataset", args.dataset]
    if getattr(args, "few_ratio", None):
        parts += ["few_ratio", f"{args.few_ratio:g}"]
    return "_".join(parts) + f"_seed{args.manual_seed}" + (f"_{args.tag}" if args.tag else "")


class RunFolder:
    """One run's folder: claimed by one process at a time, never overwritten by a run with other settings."""

    def __init__(self, script, args):
        self.path = Path(args.checkpoint_dir) / run_name(script, args)
        self.last = self.path / f"{args.arch}.pth.tar"
        self.best = self.path / f"{args.arch}_best.pth.tar"
        self.log = self.path / "log.jsonl"
        self.settings = {"script": script, **vars(args)}
        self.lock = None

    def claim(self, resume):
        """Create or reopen the folder; raise UserError where it holds another run or one in progress."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.path}: {error.strerror}") from None
        # The data workers of a killed run hold its lock until they notice, some seconds later.
        patience = time.monotonic() + (LOCK_PATIENCE if resume else 0)
        while not self.locked():
            if time.monotonic() > patience:
                raise UserError(f"{self.path}: another process is training in this folder")
            time.sleep(0.5)
        arguments = self.path / "args.json"
        if self.last.exists() or self.log.exists():
            changed = self.changed_settings(arguments)
            if not resume:
                raise UserError(f"{self.path} already holds a run: continue it with --resume or name this one with --tag")
            if changed:
                raise UserError(f"--resume: {self.path} was run with other settings ({', '.join(changed)}): use --tag")
        temporary = self.path / "args.json.tmp"
        temporary.write_text(json.dumps(self.settings, indent=1) + "\n")
        os.replace(temporary, arguments)

    def close(self):
        """Let go of the folder, so that this process too can open it again."""
        if self.lock:
            self.lock.close()

    def locked(self):
        """Try to lock the folder for this process; return whether it is."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def changed_settings(self, arguments):
        """Return 'name old -> new' for each setting that shapes the result and differs from the folder's."""
        try:
            old = json.loads(arguments.read_text())
        except (OSError, ValueError):
            return ["args.json is unreadable"]
        new = json.loads(json.dumps(self.settings))
        keys = sorted((old.keys() | new.keys()) - FREE_ARGUMENTS)
        return [f"{k} {old.get(k)} -> {new.get(k)}" for k in keys if old.get(k) != new.get(k)]


class RunLog:
    """A run's `log.jsonl` (one line an epoch) and TensorBoard events."""

    def __init__(self, folder, epochs_done=0):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder.log
        lines = self.lines()[:epochs_done]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temporary, self.path)
        self.events = SummaryWriter(str(folder.path), purge_step=epochs_done + 1)

    def lines(self):
        """Return the epochs logged so far; a line cut off by a crash is dropped."""
        found = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def write(self, record):
        """Append one epoch's flat record."""
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        for key, value in record.items():
            if isinstance(value, (int, float)) and key != "epoch":
                self.events.add_scalar(key, value, record["epoch"])
        self.events.flush()
