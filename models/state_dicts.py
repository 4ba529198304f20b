"""The layouts of files of weights: find the state dict in a file's content, clean it, and load it."""

import hashlib
import math
import os
import re

import torch
from torch import Tensor, nn

HEAD_WEIGHT = re.compile(r"(fc|linear|classifier|head)\.weight$")  # the last layer of every published network
LIBRARY_HEADS = re.compile(r"(aux[12]|AuxLogits)\.")  # GoogLeNet's and Inception's own, which this project leaves out
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
DENSENETS = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")  # torchvision's files are older than its names
COUNTERS = re.compile(r"(^|\.)(total_ops|total_params|n_averaged)$")  # thop's and AveragedModel's: no weights
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")  # timm's, torchvision's and others' scripts'
WEIGHT_KEYS = ("net", "state_dict", "model")  # the authors', most others', the CRD and mdistiller teacher zoos'


def find(content: dict, key: str | None = None) -> tuple[dict, str | None]:
    """Return the dict of weights in a file's `content`, and the name of the EMA weights if they were preferred.

    `key` names one of several dicts, or a prefix of the keys of one. ValueError if there is none, or several.
    """
    found = tensor_dicts(content)
    known = [name for name in (*WEIGHT_KEYS, "") if name in found] or list(found)
    if not known:
        raise ValueError("holds no weights")
    if key is None:
        ema = [name for name in EMA_KEYS if len(found.get(name, ())) >= len(found[known[0]])]  # not parameters alone
        if not ema and len(known) > 1 and known == list(found):
            raise ValueError(f"holds {', '.join(found)}: choose one with --weights-key")
        chosen = (ema or known)[0]
        return found[chosen], chosen if ema else None
    if key in found:
        return found[key], None
    weights = {WRAPPERS.sub("", name): value for name, value in found[known[0]].items() if isinstance(name, str)}
    prefix = WRAPPERS.sub("", key) + "."
    part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not part:
        raise ValueError(f"holds no weights under {key!r}, but under {', '.join(map(repr, found))}")
    return part, None


def tensor_dicts(content: dict, prefix: str = "") -> dict[str, dict]:
    """Return key -> dict for each dict of tensors within `content`, `outer.inner` for nested ones, "" for itself."""
    found = {}
    if any(torch.is_tensor(value) and value.is_floating_point() and value.dim() for value in content.values()):
        found[prefix] = content
    for key, value in content.items():
        if isinstance(value, dict) and isinstance(key, str) and "optim" not in key and prefix.count(".") < 2:
            found.update(tensor_dicts(value, f"{prefix}.{key}".lstrip(".")))
    return found


def clean(state: dict) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of a state dict without wrappers' prefixes, and the names of counters that are left out.

    ValueError if a weight is not finite.
    """
    weights, counters = {}, []
    for name, value in state.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            continue
        key = WRAPPERS.sub("", name)
        if COUNTERS.search(key):
            counters.append(key)
        elif value.is_floating_point() and not finite_or_mask(value.float()):
            raise ValueError(f"{key} holds values that are not finite")
        else:
            weights[key] = value
    return weights, counters


def finite_or_mask(value: Tensor) -> Tensor:
    """Return whether a tensor is finite, or a mask of 0 and -inf as networks of windows keep, as a scalar bool."""
    return value.isfinite().all() | ((value == 0) | (value == -math.inf)).all()


def digest(state: dict[str, Tensor]) -> str:
    """Return a hash of the weights' names and values."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def widths(state: dict[str, Tensor], num_classes: int | None = None) -> tuple[int, int | None]:
    """Return the number of classes, and the views that the heads tell apart (None for a plain backbone).

    They are read off the classifiers' widths where `num_classes` is not given; ValueError if there is no classifier.
    """
    layers = {key: value for key, value in state.items() if value.dim() == 2 or value.shape[2:] == (1, 1)}
    joint = [len(value) for key, value in layers.items() if re.search(r"auxiliary_classifier\.fc\d+\.weight$", key)]
    own = {key: value for key, value in layers.items() if "auxiliary_classifier" not in key}
    # SqueezeNet's classifier is a 1 x 1 convolution.
    matrices = {key: value for key, value in own.items() if value.dim() == 2} or own
    plain = [key for key in matrices if HEAD_WEIGHT.search(key)] or list(matrices)
    names = [key for key, value in state.items() if value.is_floating_point()]
    if names == sorted(names):  # safetensors: the last key need not be the last layer, the outermost may
        plain = [key for key in plain if key.count(".") == min(key.count(".") for key in plain)]
    classes = num_classes or (len(matrices[plain[-1]]) if plain else 0)
    if not classes:
        raise ValueError("holds no classifier")
    if joint and joint[-1] not in (classes, 4 * classes):
        raise ValueError(f"its heads have {joint[-1]} outputs for {classes} classes: neither 1 nor 4 rotations")
    return classes, joint[-1] // classes if joint else None


def part_of(state: dict[str, Tensor], expected: dict[str, Tensor], net: int = 1) -> dict[str, Tensor]:
    """Return the part of `state` for a network with the keys `expected`: all, one network of a pair, or a backbone.

    A prefix that all keys share, such as Lightning's `model.`, is stripped. Other keys are kept, to be reported,
    unless they belong to the rest of an auxiliary network or of a pair.
    """
    state = {k: v for k, v in state.items() if k in expected or not LIBRARY_HEADS.match(k)}
    if not any(".module." in key for key in expected):  # PyTorch's ImageNet example wraps the features of a VGG alone
        state = {key.replace(".module.", "."): value for key, value in state.items()}
    shared = os.path.commonprefix([key.split(".") for key in state])
    common = [".".join(shared[:count]) + "." for count in range(1, len(shared) + 1)]
    for prefix in ("", f"net{net}.", "backbone.", f"net{net}.backbone.", *common):
        part = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        part = {k if k in expected else DENSENETS.sub(r"\1\2.", k): v for k, v in part.items()}
        if expected.keys() & part.keys():
            own = re.compile(f"{re.escape(prefix)}|net[12]\\.|backbone\\.|auxiliary_classifier\\.")
            return part if not prefix else {**{k: v for k, v in state.items() if not own.match(k)}, **part}
    return state


def keep_classifier(state: dict[str, Tensor], own: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    """Return `state` with a network's `own` classifier in place of one of another number of `classes`, or of none."""
    others = [name for name in state.keys() & own.keys() if state[name].shape != own[name].shape]
    last = [name for name in others if [classes, *own[name].shape[1:]] == list(state[name].shape)]
    missing = {name for name in own if name not in state and not name.endswith("num_batches_tracked")}
    matrices = [name.removesuffix("weight") for name, value in own.items() if value.dim() == 2]
    if missing <= {f"{layer}{kind}" for layer in matrices[-1:] for kind in ("weight", "bias")}:
        last += missing
    return {**state, **{name: own[name] for name in last}}


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load `state` into `model`, strictly; ValueError names the first keys that do not fit."""
    expected = model.state_dict()
    wrong = [k for k, v in state.items() if k in expected and v.shape != expected[k].shape]
    # Files older than PyTorch 0.4.1 (torchvision's ResNets) do not count batches.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in expected]
    if wrong or missing or unexpected:
        shapes = [f"{k} {list(state[k].shape)} instead of {list(expected[k].shape)}" for k in wrong]
        parts = [("wrong shape", shapes), ("missing", missing), ("unexpected", unexpected)]
        listed = "; ".join(f"{what}: {', '.join(keys[:3])}{' ...' * (len(keys) > 3)}" for what, keys in parts if keys)
        outer = sorted({key.partition(".")[0] for key in state})
        if len(unexpected) == len(state) and 1 < len(outer) < 4:  # such as a student and its teacher
            listed += f"; --weights-key chooses of {', '.join(outer)}"
        if any("pos" in key for key in wrong):  # of a ViT or a Swin
            listed += "; --image-size chooses the size that a network is built for"
        raise ValueError(f"weights do not fit {getattr(model, 'arch', type(model).__name__)}: {listed}")
    expected.update(state)  # and not a plain dict: it knows the versions of modules, which MNASNet asks for
    model.load_state_dict(expected, strict=True)
