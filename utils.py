"""Weights, checkpoints, seeds, users' mistakes and the learning-rate schedule."""

import hashlib
import math
import os
import pickle
import platform
import random
import re
import sys
import warnings
import zipfile
from contextlib import contextmanager, suppress

import numpy as np
import torch

import models
import pickles
from objective import unwrap

HEAD_WEIGHT = r"(fc\d?|linear|classifier)\.weight$"  # the last layer of every network here


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2."""


def is_first_process():
    """Return whether this is rank 0 or a process without a launcher; known before the process group exists."""
    return os.environ.get("RANK", "0") == "0"


def available_cores():
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def seed_all(seed):
    """Seed every generator that initial weights or data could draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def learning_rate(args, epoch, progress=0.0):
    """Return the rate at `epoch` (from 0), a share `progress` of it done: linear warm-up, then x0.1 at each milestone.

    A step counts as done, so that the first one of a warm-up has a rate above 0.
    """
    if epoch < args.warmup_epoch:
        return args.init_lr * (epoch + progress) / args.warmup_epoch
    return args.init_lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)


def first_line(error):
    """Return the first line of an error's message, shortened, with its type before one without letters: `KeyError 101`."""
    if isinstance(error, EOFError) and not str(error):
        return "it ends too early"
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)  # torch's own message begins with advice
    text = (text.strip().splitlines() or [""])[0][:120]
    return text if re.search("[a-zA-Z]", text) else f"{type(error).__name__} {text}".strip()


def warn(text):
    """Print `text` on stderr at once, in one line: the name of a class, a file or a key of foreign weights may have several."""
    print(" ".join(str(text).splitlines()), file=sys.stderr, flush=True)


def check_format(path):
    """Raise UserError unless the file at `path` begins as PyTorch's do: a zip archive or, before PyTorch 1.6, a pickle."""
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise UserError(f"{path}: an empty file")
    if not start.startswith((b"PK", b"\x80")):
        raise UserError(f"{path}: not a PyTorch file (it begins with {str(start)[1:]})")


def read_checkpoint(path):
    """Return the dict stored at `path`, read without executing anything; raise UserError when it is missing or broken."""
    if not path or not os.path.isfile(path):
        raise UserError(f"{path} is a folder, not a file" if path and os.path.isdir(path) else f"no such file: {path}")
    try:
        check_format(path)
        damaged = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch reads without comparing checksums
        known = [(stand_in, name) for name, stand_in in pickles.CHECKPOINT.items()]
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        # PyTorch's message hides the name in advice, and gives the number of an opcode, no more.
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else first_line(error)
        reason = re.sub(r"^Unsupported operand.*", "damaged, or no checkpoint that torch.save wrote", reason)
        raise UserError(f"{path}: not a checkpoint that loads safely ({reason})") from None
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # damaged files make the unpickler fail in a dozen ways
        raise UserError(f"{path}: corrupt or not a checkpoint ({first_line(error)})") from None
    if damaged:
        raise UserError(f"{path}: corrupt (the checksum of {damaged} does not fit)")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def state_dict_of(content, path):
    """Return the plain state dict within a checkpoint: under `net`, `state_dict` or `model`, or the dict itself."""
    for key in ("net", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {}
    for name, value in content.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            continue
        key = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
        if key in state:
            raise UserError(f"{path}: holds {key} twice, under several prefixes")
        state[key] = value
    if not state:
        raise UserError(f"{path}: holds no weights")
    check_values(state, path)
    return state


def check_values(state, path):
    """Raise UserError unless a state dict from `path` holds plain tensors of finite floating-point numbers."""
    for key, value in state.items():
        plain = value.layout == torch.strided and not (value.is_nested or value.is_meta or value.is_quantized)
        if not plain or not (value.is_floating_point() or key.endswith("num_batches_tracked")):
            raise UserError(f"{path}: {key} is no plain tensor of floating-point numbers")
        value = value.float()  # float8 has neither isfinite nor comparisons
        if not value.isfinite().all():
            raise UserError(f"{path}: {key} holds values that are not finite")
        if key.endswith("running_var") and (value < 0).any():
            raise UserError(f"{path}: {key} holds negative variances")


def part_of(state, wanted, net=1):
    """Return the part of `state` that has a network's keys `wanted`: all of it, one network of a pair, or a backbone.

    Other keys stay, to be reported as unexpected, unless they belong to the rest of an auxiliary network or a pair.
    """
    for prefix in ("", f"net{net}.", "backbone.", f"net{net}.backbone."):
        part = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if wanted & part.keys():
            rest = r"net[12]\.|backbone\.|auxiliary_classifier\."
            return {**{k: v for k, v in state.items() if not (prefix and re.match(rest, k))}, **part}
    return state


def load_weights(model, path, net=1):
    """Load `path` into `model`, strictly, from any published layout; return the checkpoint's dict.

    Layouts: ours and the authors' `{'net': ...}`, `{'state_dict': ...}`, `{'model': ...}`, a bare state dict, with or
    without `module.` prefixes. A backbone takes its part of an auxiliary network's weights, and a single network that
    of one network (`net`, 1 or 2) of a mutual pair. Raises UserError naming the first keys that do not fit, and where
    the file says that the weights are another architecture's. The model may be wrapped, as by DataParallel.
    """
    model = unwrap(model)
    content = read_checkpoint(path)
    state = state_dict_of(content, path)
    if net > 1 and not any(key.startswith(f"net{net}.") for key in state):
        raise UserError(f"{path}: --net {net}: these weights are not a mutual pair's")
    state = part_of(state, model.state_dict().keys(), net)
    expected = model.state_dict()
    wrong = [k for k, v in state.items() if k in expected and v.shape != expected[k].shape]
    # Files older than PyTorch 0.4.1 (torchvision's ResNets) do not count batches.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    if wrong or missing or unexpected:
        shapes = [f"{k} {list(state[k].shape)} instead of {list(expected[k].shape)}" for k in wrong]
        parts = [("wrong shape", shapes), ("missing", missing), ("unexpected", unexpected)]
        listed = "; ".join(f"{what}: {', '.join(keys[:3])}{' ...' * (len(keys) > 3)}" for what, keys in parts if keys)
        raise UserError(f"{path}: weights do not fit {getattr(model, 'arch', type(model).__name__)}: {listed}")
    check_arch(model, content, path)
    model.load_state_dict({**{k: v for k, v in expected.items() if k not in state}, **state}, strict=True)
    return content


def check_arch(model, content, path):
    """Raise UserError where the file names another backbone than the model's: mobilenetV2's weights fit mobilenetV2_s2."""
    with suppress(AttributeError, TypeError, ValueError):  # a model made by hand, a name unknown here
        theirs, ours = models.backbone_name(content.get("arch")), models.backbone_name(model.arch)
        if theirs != ours:
            raise UserError(f"{path}: weights of {theirs}, not of {ours}")


def recorded(content):
    """Return the epoch and accuracy that a checkpoint's dict holds, whether as numbers or as arrays of one."""
    found = {}
    for key in ("epoch", "acc"):
        value = content.get(key)
        if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
            value = value.item()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"recorded_{key}"] = value
    return found


def json_ready(value):
    """Return `value` with None for every number within its dicts that JSON has no word for: NaN and infinity."""
    if isinstance(value, dict):
        return {key: json_ready(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    widths = {key: value.shape[0] for key, value in state.items() if value.dim() and re.search(HEAD_WEIGHT, key)}
    classes = [width for key, width in widths.items() if "auxiliary_classifier" not in key]
    joint = [width for key, width in widths.items() if "auxiliary_classifier" in key]
    if not classes or not classes[0]:
        raise UserError(f"{path}: holds no classifier of an architecture known here")
    if joint and joint[0] not in (classes[0], 4 * classes[0]):
        raise UserError(f"{path}: its heads have {joint[0]} outputs for {classes[0]} classes, neither 1 nor 4 rotations")
    return classes[0], joint[0] // classes[0] if joint else None


@contextmanager
def replacing(path, mode="wb"):
    """Yield a file that is put at `path` when the block has written it; UserError if it cannot be.

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
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            os.remove(temporary)
        # On a full disk torch.save reports a position in the file alone.
        reason = getattr(error, "strerror", None) or f"{first_line(error)}; is the disk full?"
        raise UserError(f"cannot write {path}: {reason}") from None


def save_checkpoint(content, path):
    """Write `content` to `path` as torch.save does, whole or not at all; UserError if it cannot be written."""
    with replacing(path) as file:
        torch.save(content, file)


def to_cpu(value):
    """Return `value` with every tensor in its dicts and lists copied to the CPU."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_cpu(v) for v in value]
    return value


def versions():
    """Return the versions that a result depends on."""
    import torchvision

    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
