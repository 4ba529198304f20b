"""Every architecture by its published name: `create`, `names`, and what a name stands for.

`<backbone>` is a plain network, `<backbone>_aux` adds the auxiliary classifiers, `<a>_<a>` is a mutual pair of two
`_aux` networks, where `a` is a backbone, its `_aux` name or one of the short names of the published pairs.
"""

import difflib

from torch import nn

from models import mobilenetv2, resnet, resnet_cifar, shufflenetv1, shufflenetv2, vgg, wrn
from models.auxiliary import AuxiliaryClassifier, AuxiliaryNet, MutualPair, stage_features
from models.external import attach_auxiliary, read_stages
from models.layers import Backbone

__all__ = [
    "AuxiliaryClassifier",
    "AuxiliaryNet",
    "Backbone",
    "MutualPair",
    "backbone_name",
    "create",
    "is_aux",
    "is_imagenet",
    "is_pair",
    "member_name",
    "names",
]

_FAMILIES = (resnet_cifar, wrn, vgg, resnet, mobilenetv2, shufflenetv1, shufflenetv2)
_BACKBONES = {name: build for family in _FAMILIES for name, build in family.BACKBONES.items()}
_SUFFIX = "_aux"

# How the published code calls one half of a mutual pair, where that is not the backbone's own name.
_SHORT_NAMES = {
    "mbv2": "mobilenetV2",
    "shufflev1": "ShuffleV1",
    "shufflev2": "ShuffleV2",
    "vgg8": "vgg8_bn",
    "vgg13": "vgg13_bn",
    "WRN_16_1": "wrn_16_1",
    "WRN_16_2": "wrn_16_2",
    "WRN_40_1": "wrn_40_1",
    "WRN_40_2": "wrn_40_2",
    "resnet18": "resnet18_imagenet",
    "resnet34": "resnet34_imagenet",
}
_PUBLISHED_HALVES = (
    *("mbv2", "shufflev1", "shufflev2", "vgg13", "WRN_16_2", "WRN_40_1", "WRN_40_2", "resnet18"),
    *("resnet20", "resnet56", "resnet8x4", "resnet32x4"),
)


def names() -> list[str]:
    """Return all backbones, all `_aux` networks and the published mutual pairs; `create` takes every other pair too."""
    return [*_BACKBONES, *(name + _SUFFIX for name in _BACKBONES), *(f"{half}_{half}" for half in _PUBLISHED_HALVES)]


def is_aux(name: str) -> bool:
    """Say whether `name` is one network with auxiliary classifiers."""
    return name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in _BACKBONES


def is_pair(name: str) -> bool:
    """Say whether `name` is a mutual pair."""
    return _pair_backbone(name) is not None


def is_imagenet(name: str) -> bool:
    """Say whether `name` is of the family for 224x224 images; ValueError for an unknown name."""
    return backbone_name(name).endswith("_imagenet")


def backbone_name(name: str) -> str:
    """Return the backbone of an architecture, for a pair that of one member; ValueError for an unknown name."""
    bare = name.removesuffix(_SUFFIX)
    backbone = bare if bare in _BACKBONES else _pair_backbone(name)
    if backbone is None:
        raise ValueError(_unknown(name))
    return backbone


def member_name(pair: str) -> str:
    """Return the `_aux` architecture of either network of a mutual pair; ValueError where `pair` is none."""
    backbone = _pair_backbone(pair)
    if backbone is None:
        raise ValueError(_unknown(pair, "mutual pair"))
    return backbone + _SUFFIX


def create(name: str, num_classes: int, rotations: int = 4) -> nn.Module:
    """Return a freshly initialised network; ValueError listing the nearest names for an unknown one.

    The output forms are those of `Backbone`, `AuxiliaryNet` and `MutualPair`; a plain backbone ignores `rotations`.
    `arch` of the network, and of every network within it, is its name.
    """
    if is_pair(name):
        member = member_name(name)
        network = MutualPair(create(member, num_classes, rotations), create(member, num_classes, rotations))
    elif is_aux(name):
        network = AuxiliaryNet(create(backbone_name(name), num_classes), num_classes, rotations)
    else:
        network = _BACKBONES[backbone_name(name)](num_classes=num_classes)
    network.arch = name
    return network


def _pair_backbone(name: str) -> str | None:
    """Return the backbone of both halves of `<a>_<a>`, or None where `name` has not that form."""
    middle = len(name) // 2
    half = name[:middle]
    if name != f"{half}_{half}":
        return None
    half = _SHORT_NAMES.get(half, half).removesuffix(_SUFFIX)
    return half if half in _BACKBONES else None


def _unknown(name: str, kind: str = "architecture") -> str:
    """Return one line that names the architectures nearest in spelling, whatever their case."""
    candidates = {known.lower(): known for known in names() if kind == "architecture" or is_pair(known)}
    nearest = difflib.get_close_matches(name.lower(), candidates, n=5, cutoff=0.0)
    return f"unknown {kind} {name!r}; nearest: {', '.join(candidates[match] for match in nearest)}"
