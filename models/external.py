"""Auxiliary branches for any network that can be traced.

Branch l is a new copy of what follows tap l up to the embedding (`copy`, the method's own), or depthwise-separable
blocks of the same strides and widths (`light`). The last branch first repeats the blocks of the last tap's shape.
"""

import copy
import operator
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.auxiliary import AuxiliaryClassifier, AuxiliaryNet, StageReader, as_map
from models.stages import FeatureMap, Stages
from models.tracer import META, TraceError, first_line, meta_copy
from models.tracing import function_of

BRANCHES = ("copy", "light")


class Branch(nn.Module):
    """A part of a traced network, x -> y, which owns the modules and weights that it runs."""

    def __init__(self, source: nn.Module, graphs: dict[bool, fx.Graph]):
        """Take what the graphs (training or not -> graph) use out of `source`."""
        super().__init__()
        self._functions = {mode: function_of(source, graph) for mode, graph in graphs.items()}
        nodes = (node for graph in graphs.values() for node in graph.nodes)
        used = dict.fromkeys(node.target for node in nodes if node.op in ("call_module", "get_attr"))
        for path in used:  # but parts of a module that one of the graphs calls as a whole
            if not any(path.startswith(f"{other}.") for other in used):
                self._take(source, path)

    def _take(self, source: nn.Module, path: str) -> None:
        """Make a module or weight of `source` this module's own, under the same path."""
        *parents, name = path.split(".")
        owner: nn.Module = self
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        item = operator.attrgetter(path)(source)
        if isinstance(item, Tensor) and not isinstance(item, nn.Parameter):
            owner.register_buffer(name, item, persistent=path in source.state_dict(keep_vars=True))
        else:
            setattr(owner, name, item)

    def forward(self, x: Tensor) -> Tensor:
        """Return what this part of the network makes of `x`."""
        return self._functions[self.training](self, x)


class LightBlock(nn.Module):
    """Depthwise 3x3 and pointwise convolution, each with BatchNorm, then ReLU."""

    def __init__(self, in_width: int, width: int, stride: int = 1):
        super().__init__()
        self.depthwise = nn.Conv2d(in_width, in_width, 3, stride, 1, groups=in_width, bias=False)
        self.bn1 = nn.BatchNorm2d(in_width)
        self.pointwise = nn.Conv2d(in_width, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, H / stride, W / stride) of (B, in_width, H, W)."""
        return torch.relu(self.bn2(self.pointwise(self.bn1(self.depthwise(x)))))


class ToMap(nn.Module):
    """Bring a tapped tensor to (B, C, H, W), as `as_map`."""

    def __init__(self, layout: str):
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        return as_map(x, self.layout)


class FromMap(ToMap):
    """The reverse of `ToMap`, but for "tokens"."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the layout."""
        if self.layout == "row":
            return x.squeeze(3).transpose(1, 2)
        return x.permute(0, 2, 3, 1) if self.layout == "last" else x


def attach_auxiliary(
    net: nn.Module,
    num_classes: int,
    rotations: int = 4,
    taps: int = 4,
    example: Tensor | None = None,
    branches: str = "copy",
    classifier: str | None = None,
    fresh: Callable[[], nn.Module] | None = None,
    made_for: Tensor | None = None,
) -> AuxiliaryNet:
    """Return `net` with an auxiliary classifier per stage: x -> (logits (B, N), [aux logits (B, N * rotations), ...]).

    `net` is any network of logits that torch.fx can trace at the size of `example` (1, 3, H, W), by default 224 x 224;
    it is kept unchanged, as `backbone`. `taps` is the largest number of branches, `classifier` the name of the
    layer that makes the logits, where several do. `fresh()` returns a newly initialised network like `net`, whose parts
    the branches take; without it they are copies of `net`'s, newly initialised where a module has `reset_parameters`.
    `made_for` is an image of the size at which the taps are chosen, by default `example`.
    Raises ValueError, in one line, for a network that cannot be traced or cut, or of another number of classes.
    """
    example = torch.zeros(1, 3, 224, 224) if example is None else example
    stages = Stages(net, example if made_for is None else made_for, taps, classifier)
    if made_for is not None and made_for.shape != example.shape:
        stages.trace(example)
    if branches not in BRANCHES:
        raise ValueError(f"branches are {' or '.join(BRANCHES)}, not {branches!r}")
    if stages.num_classes != num_classes:
        raise ValueError(f"{type(net).__name__} has {stages.num_classes} classes, not {num_classes}")
    if branches == "copy":
        parts, width = copied_branches(net, stages, fresh), stages.width
    else:
        parts, width = light_branches(stages), stages.maps[-1].width
    net.stage_reader = reader_of(stages)
    auxiliary = AuxiliaryClassifier(parts, width, num_classes * rotations)
    network = AuxiliaryNet(net, auxiliary.to(next(net.parameters()).device), num_classes, rotations)
    check_batches(network, stages.example)
    return network


def check_outputs(outputs: Any, num_classes: int, plain: bool = False) -> None:
    """Raise ValueError unless a network returned logits (1, N), or (logits, [auxiliary logits, ...]) if not `plain`."""
    kind, heads = type(outputs).__name__, []
    if not plain and isinstance(outputs, (tuple, list)) and len(outputs) == 2:
        outputs, heads = outputs
    if not all(torch.is_tensor(part) and part.ndim == 2 for part in (outputs, *heads)):
        raise ValueError(f"returns a {kind}, not logits (B, {num_classes})")
    if outputs.shape[1] != num_classes:
        raise ValueError(f"returns {outputs.shape[1]} logits for {num_classes} classes")


def read_stages(net: nn.Module, example: Tensor, taps: int = 4, classifier: str | None = None) -> StageReader:
    """Trace a plain network, so that `stage_features` can read its stages; ValueError in one line if that fails."""
    net.stage_reader = reader_of(Stages(net, example, taps, classifier))
    return net.stage_reader


def reader_of(stages: Stages) -> StageReader:
    """Return the function that runs a network and hands out its stages."""
    functions = {mode: trace.reader(stages.taps, stages.embedding) for mode, trace in stages.traces.items()}
    taps = {name: found.shape for name, found in zip(stages.names, stages.maps, strict=True)}
    return StageReader(functions, taps, [found.layout for found in stages.maps])


def copied_branches(net: nn.Module, stages: Stages, fresh: Callable[[], nn.Module] | None) -> list[list[nn.Module]]:
    """Return the modules of each branch, parts of a new network each."""
    branches = []
    for tap in stages.taps:
        source = (fresh() if fresh is not None else reset_copy(net)).requires_grad_(True)
        constants = {name: value for name, value in vars(net).items() if name.startswith("_tensor_constant")}
        vars(source).update(constants)  # tensors that the forward pass makes, which torch.fx stores on the network
        ways = [(tap, stages.embedding)]
        if tap == stages.taps[-1] and stages.repeated is not None:
            ways.insert(0, (stages.repeated, tap))
        parts = [Branch(source, {mode: trace.between(*way) for mode, trace in stages.traces.items()}) for way in ways]
        if tap == stages.taps[-1] and stages.repeated is None:
            parts.insert(0, same_shape_block(stages.maps[-1]))
        branches.append(parts)
    if fresh is None:
        warn_of_kept_values(branches)
    return branches


def same_shape_block(found: FeatureMap) -> nn.Sequential:
    """Return the block that the last branch begins with where the network has none of equal input and output shape."""
    layout = "row" if found.layout == "tokens" else found.layout
    return nn.Sequential(ToMap(layout), LightBlock(found.width, found.width), FromMap(layout))


def light_branches(stages: Stages) -> list[list[nn.Module]]:
    """Return the modules of each branch: one block for each later tap, and at the last tap one of its shape."""
    branches = []
    for index, first in enumerate(stages.maps):
        parts: list[nn.Module] = [ToMap(first.layout)]
        for before, after in pairwise(stages.maps[index:]):
            stride = round((before.positions / after.positions) ** 0.5)
            parts.append(LightBlock(before.width, after.width, max(stride, 1)))
        if len(parts) == 1:
            parts.append(LightBlock(first.width, first.width))
        branches.append(parts)
    return branches


def reset_copy(net: nn.Module) -> nn.Module:
    """Return a copy of a network, newly initialised as far as its modules have `reset_parameters`."""
    found = copy.deepcopy(net)
    for module in found.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return found


def warn_of_kept_values(branches: list[list[nn.Module]]) -> None:
    """Warn of weights that no `reset_parameters` reached: they begin with the network's values."""
    kept = {}
    for part in (part for parts in branches for part in parts):
        for module in part.modules():
            if not hasattr(module, "reset_parameters"):
                kept.update({id(weight): weight for weight in module.parameters(recurse=False)})
    if kept:
        total = sum(weight.numel() for weight in kept.values())
        warnings.warn(f"{total} weights of the branches keep the network's values: no reset_parameters", stacklevel=4)


def check_batches(network: AuxiliaryNet, example: Tensor) -> None:
    """Raise ValueError unless the traced network takes any number of images: the example's may be fixed in it."""
    images = torch.empty((3, *example.shape[1:]), device=META)
    copied = meta_copy(network)
    for mode in (True, False):
        try:
            with torch.no_grad(), META:
                copied.train(mode).backbone.train(mode)  # else in eval mode: no weight of the copy is trained
                logits, aux_logits = copied(images)
        except Exception as error:  # whatever the network's own code raises
            raise TraceError(f"{type(network.backbone).__name__} cannot be cut: {first_line(error)}") from None
        if any(len(output) != len(images) or output.ndim != 2 for output in (logits, *aux_logits)):
            raise TraceError(f"{type(network.backbone).__name__} cannot be traced for any number of images")
