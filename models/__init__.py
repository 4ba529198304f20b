"""Every architecture by its name: `create`, `names`, and what a name stands for.

`<backbone>` is a plain network, `<backbone>_aux` adds the auxiliary classifiers, `<a>_<a>` is a mutual pair of two
`_aux` networks, where `a` is a backbone, its `_aux` name or one of the short names of the published pairs. A backbone
is one of this package, `torchvision/NAME`, `timm/NAME` or `FILE.py:FUNCTION`; `<a>+<b>` is a pair of any two networks.
"""

import difflib

import torch
import torchvision
from torch import nn
from torch.nn.parameter import UninitializedParameter

from models import hub, mobilenetv2, resnet, resnet_cifar, shufflenetv1, shufflenetv2, vgg, wrn
from models.auxiliary import AuxiliaryNet, MutualPair, backbone_of, stage_features
from models.external import attach_auxiliary, check_outputs, read_stages
from models.hub import hub_weights, is_external, is_file, normalisation
from models.layers import Backbone

__all__ = ["AuxiliaryNet", "Backbone", "MutualPair", "attach_auxiliary", "backbone_of", "hub_weights", "is_external"]
__all__ += ["check_outputs", "is_file", "normalisation", "read_stages", "stage_features"]

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
    **{name.upper(): name for name in wrn.BACKBONES},
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
    return name.endswith(_SUFFIX) and _is_backbone(name.removesuffix(_SUFFIX))


def is_pair(name: str) -> bool:
    """Say whether `name` is a mutual pair."""
    return bool(_pair_backbones(name))


def is_imagenet(name: str) -> bool:
    """Say whether `name` is of the family for 224x224 images; ValueError for an unknown name."""
    return backbone_name(name).endswith("_imagenet")


def backbone_name(name: str, net: int = 1) -> str:
    """Return the backbone of an architecture, for a pair that of its network `net`; ValueError for an unknown name."""
    bare = name.removesuffix(_SUFFIX)
    backbones = (bare,) if _is_backbone(bare) else _pair_backbones(name)
    if not backbones:
        raise ValueError(_unknown(name))
    backbone = backbones[min(net, len(backbones)) - 1]
    if hub.is_external(backbone):
        hub.check(backbone)
    return backbone


def create(
    name: str,
    num_classes: int,
    rotations: int = 4,
    *,
    size: int | None = None,
    taps: int = 4,
    branches: str = "copy",
    classifier: str | None = None,
) -> nn.Module:
    """Return a freshly initialised network; ValueError listing the nearest names for an unknown one.

    The output forms are those of `Backbone`, `AuxiliaryNet` and `MutualPair`; a plain backbone ignores `rotations`.
    `arch` of the network, and of every network within it, is its name. The keywords serve networks of torchvision, timm
    and files: the images' size in pixels, and `attach_auxiliary`'s. A file is executed.
    """
    options = {"size": size, "taps": taps, "branches": branches, "classifier": classifier}
    if is_pair(name):
        members = (backbone + _SUFFIX for backbone in _pair_backbones(name))
        network = MutualPair(*(create(member, num_classes, rotations, **options) for member in members))
    elif hub.is_external(name):
        network = _create_external(name, num_classes, rotations, **options)
    elif is_aux(name):
        backbone = create(backbone_name(name), num_classes)
        network = AuxiliaryNet(backbone, backbone.build_auxiliary(num_classes * rotations), num_classes, rotations)
    else:
        network = _BACKBONES[backbone_name(name)](num_classes=num_classes)
    network.arch = name
    return network


def _create_external(name: str, num_classes: int, rotations: int, size: int | None, **options) -> nn.Module:
    """Return a network of torchvision, timm or a file, cut at the size it was made for and traced at `size`."""
    bare = name.removesuffix(_SUFFIX)
    make = hub.builder(bare, num_classes, size)

    def build() -> nn.Module:
        net = make()
        if any(isinstance(weight, UninitializedParameter) for weight in net.parameters()):  # of lazy layers
            side = hub.default_size(bare, size)
            with torch.no_grad():
                net.eval()(torch.zeros(1, 3, side, side))
            net.train()
        return net

    net = build()
    net.arch = bare
    if bare == name:
        return net
    usual = hub.default_size(bare, size)
    made_for, example = (torch.empty(1, 3, side, side) for side in (usual, size or usual))
    return attach_auxiliary(net, num_classes, rotations, example=example, made_for=made_for, fresh=build, **options)


def _is_backbone(name: str) -> bool:
    """Say whether `name` is a plain network: one of this package, or of the form of a library's or a file's."""
    return name in _BACKBONES or (hub.is_external(name) and "+" not in name)


def _pair_backbones(name: str) -> tuple[str, ...]:
    """Return the backbones of `<a>_<a>` or `<a>+<b>`, or () if `name` has neither form."""
    middle = len(name) // 2
    halves = name.split("+") if "+" in name else [name[:middle], name[middle + 1 :]]
    if "+" not in name and name != "_".join(halves):
        return ()
    backbones = tuple(_SHORT_NAMES.get(half, half).removesuffix(_SUFFIX) for half in halves)
    equal = "+" in name or backbones[0] == backbones[1]
    return backbones if len(backbones) == 2 and equal and all(map(_is_backbone, backbones)) else ()


def _unknown(name: str) -> str:
    """Return one line that names the architectures nearest in spelling, whatever their case."""
    candidates = {known.lower(): known for known in names()}
    nearest = difflib.get_close_matches(name.lower(), candidates, n=5, cutoff=0.0)
    listed = [candidates[match] for match in nearest]
    if name.removesuffix(_SUFFIX) in torchvision.models.list_models(torchvision.models):
        listed.insert(0, f"torchvision/{name}")
    return f"unknown architecture {name!r}; nearest: {', '.join(listed)}"
