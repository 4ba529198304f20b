"""The stages of any network that can be traced: its classifier, its taps and what its last branch repeats.

The rule: of each resolution, the last output of a block through which all data flow is a tap; where all blocks have one
resolution, as in a ViT, every n-th block is.
"""

import math
import operator

import torch
from torch import Tensor, fx, nn

from models.tracing import META, Trace, TraceError, attribute, meta_copy, one_line

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_LARGE_IMAGE = 64  # pixels a side above which a tensor of one position belongs to the head, not to a stage


class Stages:
    """Where a network is cut. `traces` (training or not -> Trace), `taps` and the like as keys of the traces."""

    def __init__(self, net: nn.Module, example: Tensor, taps: int = 4, classifier: str | None = None):
        """Trace `net` at the size of `example`; ValueError in one line if it cannot be traced or cut."""
        example = torch.empty((2, *example.shape[1:]), device=META)
        try:
            with torch.no_grad():
                meta_copy(net).eval()(example)
        except Exception as error:  # in the network's own words
            size = " x ".join(map(str, example.shape[2:]))
            raise ValueError(f"{type(net).__name__} refuses images of {size} pixels: {one_line(error)}") from None
        self.traces = {mode: Trace(net, example, training=mode) for mode in (False, True)}
        self._net, self._trace = net, self.traces[False]
        self.num_classes = self._trace.output.meta["value"].shape[-1]
        self.classifier, embedding = self._find_classifier(classifier)
        self.embedding = self._trace.keys[embedding]
        self.width = _width(embedding.meta["value"])
        cuts = [node for node in self._trace.cuts() if self._is_feature_map(node, embedding)]
        blocks = self._blocks(cuts)
        nodes = self._find_taps(cuts, blocks, taps)
        if not nodes:
            raise TraceError(f"{type(net).__name__} cannot be cut: no tensor between two blocks carries all data{self._reason()}")
        self.taps = [self._trace.keys[node] for node in nodes]
        self.shapes = [tuple(node.meta["value"].shape[1:]) for node in nodes]
        same = [node for node in blocks if node.meta["value"].shape == nodes[-1].meta["value"].shape]
        same = [node for node in same if self._before(nodes[-2:-1], node) and self._before([node], nodes[-1])]
        self.repeated = self._trace.keys[same[0]] if same else None  # the last branch begins with what lies from here

    def _reason(self) -> str:
        """Return why modules of the network stand as one call, if some do."""
        return "".join(f" ({path or 'the network'}: {why})" for path, why in list(self._trace.reasons.items())[:1])

    def _find_classifier(self, name: str | None) -> tuple[list[str], fx.Node]:
        """Return the names of the layers that make the logits, and the node that they read."""
        found, seen, waiting = {}, set(), [self._trace.output]
        while waiting:
            node = waiting.pop()
            if node in seen or node not in self._trace.derived:
                continue
            seen.add(node)
            layer = self._layer(node)
            if layer is None or (name is not None and layer != name):
                waiting += node.all_input_nodes
            else:
                found[layer] = node
        if not found:
            what = "has no classifier" if name is None else f"has no layer {name} on the way to its logits"
            raise TraceError(f"{type(self._net).__name__} {what}")
        inputs = {given: None for node in found.values() for given in node.all_input_nodes if given in self._trace.derived}
        if len(inputs) != 1:
            names = ", ".join(sorted(found))
            raise TraceError(f"{type(self._net).__name__} has several classifiers ({names}): name one with --classifier")
        return list(found), next(iter(inputs))

    def _layer(self, node: fx.Node) -> str | None:
        """Return the name of the layer with a weight matrix that makes a node, or None."""
        if node.op == "call_module":
            return node.target if _heavy(self._net.get_submodule(node.target)) else None
        weights = [given for given in node.all_input_nodes if given.op == "get_attr"]
        return next((given.target for given in weights if attribute(self._net, given.target).ndim >= 2), None)

    def _is_feature_map(self, node: fx.Node, embedding: fx.Node) -> bool:
        """Say whether a cut is a map or a row of tokens of the image, before the head."""
        value, example = node.meta["value"], self._trace.data[0].meta["value"]
        if node.op == "placeholder" or value.ndim not in (3, 4) or len(value) != len(example):
            return False
        alone = _positions(value) == 1 and max(example.shape[2:]) > _LARGE_IMAGE
        return not alone and self._before([node], embedding, equal=True)

    def _before(self, earlier: list[fx.Node], node: fx.Node, equal: bool = False) -> bool:
        """Say whether `node` comes after all of `earlier`; itself counts where `equal`."""
        order = self._trace.order
        return all(order[other] < order[node] or (equal and other is node) for other in earlier)

    def _level(self, node: fx.Node) -> int:
        """Return the binary logarithm of the stride at a node."""
        image = self._trace.data[0].meta["value"]
        return round(math.log2(image.shape[2] * image.shape[3] / _positions(node.meta["value"])) / 2)

    def _blocks(self, cuts: list[fx.Node]) -> list[fx.Node]:
        """Return those cuts that are the output of a block: a module of several layers, or a residual sum.

        A module that holds several blocks is a stage or more: what ends it counts only if a block does.
        """
        candidates = {}  # path of a module with several layers -> the cut it returns
        for node in cuts:
            for path in self._trace.modules.get(node, ()):
                if _heavy(self._net.get_submodule(path)) > 1:
                    candidates[path] = node
        within = {path: [other for other in candidates if other.startswith(f"{path}.")] for path in candidates}
        atoms = {path for path in candidates if not within[path]}
        single = {path for path in candidates if len(atoms.intersection(within[path])) <= 1}
        ends = {candidates[path] for path in single if not any(path in within[outer] for outer in single)}
        sums = {node for node in cuts if self._is_sum(node)} if len(ends) < 2 else set()
        return [node for node in cuts if node in ends or node in sums]

    def _is_sum(self, node: fx.Node) -> bool:
        """Say whether a node adds two tensors of the image, of one shape."""
        addends = [given for given in node.all_input_nodes if given in self._trace.derived]
        shapes = {given.meta["value"].shape for given in addends if isinstance(given.meta["value"], Tensor)}
        return node.target in _SUMS and len(addends) == 2 and len(shapes) == 1

    def _find_taps(self, cuts: list[fx.Node], blocks: list[fx.Node], count: int) -> list[fx.Node]:
        """Return at most `count` taps, the deepest, shallow to deep."""
        if len(blocks) > 1 and len({self._level(node) for node in blocks}) == 1:
            count = min(count, len(blocks))
            return [blocks[round(len(blocks) * part / count) - 1] for part in range(1, count + 1)]
        last = {self._level(node): node for node in cuts} | {self._level(node): node for node in blocks}
        taps = []
        for level in sorted(last):
            if self._before(taps, last[level]) and self._has_layers(taps[-1:], last[level]):
                taps.append(last[level])
        return taps[-count:]

    def _has_layers(self, start: list[fx.Node], end: fx.Node) -> bool:
        """Say whether some layer lies between a node, or the image, and another one."""
        between = [node for node in self._trace.data if self._before(start, node) and self._before([node], end, equal=True)]
        return any(self._layer(node) for node in between)


def layout(shape: tuple[int, ...]) -> str:
    """Return how a tensor of this shape (without the batch) is laid out: "tokens" (N, C), "last" (H, W, C) or "first"."""
    if len(shape) == 2:
        return "tokens"
    return "last" if shape[0] == shape[1] != shape[2] else "first"


def width_of(shape: tuple[int, ...]) -> int:
    """Return the number of channels of a shape without the batch."""
    return shape[0] if layout(shape) == "first" else shape[-1]


def positions_of(shape: tuple[int, ...]) -> int:
    """Return the number of positions, or tokens, of a shape without the batch."""
    return math.prod(shape) // width_of(shape)


def _positions(value: Tensor) -> int:
    return positions_of(tuple(value.shape[1:]))


def _width(value: Tensor) -> int:
    return value.shape[1] if value.ndim == 2 else width_of(tuple(value.shape[1:]))


def _heavy(module: nn.Module) -> int:
    """Return the number of layers with a weight matrix or kernel in a module."""
    return sum(any(weight.ndim > 1 for weight in layer.parameters(recurse=False)) for layer in module.modules())
