"""The stages of any network that can be traced: its classifier, its taps and what its last branch repeats.

The rule: of each resolution, the last output of a block through which all data flow is a tap; where all blocks have one
resolution, as in a ViT, every n-th block is.
"""

import math
import operator

import torch
from torch import Tensor, fx, nn

from models.tracer import META, TraceError, first_line, has_tensor, meta_copy
from models.tracing import Trace

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_LARGE_IMAGE = 64  # pixels a side above which a tensor of one position belongs to the head, not to a stage


class FeatureMap:
    """The size of a tapped tensor: `layout` is "tokens" (B, N, C), "last" (B, H, W, C) or "first" (B, C, H, W)."""

    def __init__(self, shape: torch.Size, image: torch.Size):
        """Read the layout of `shape` off the proportions of the image's (B, 3, H, W); None where none fits."""
        self.shape = tuple(shape[1:])
        self.layout = None
        if len(shape) == 3:
            self.layout = "tokens"
        elif len(shape) == 4 and _same_proportions(shape[2:], image[2:]):
            self.layout = "first"
        elif len(shape) == 4 and _same_proportions(shape[1:3], image[2:]):
            self.layout = "last"
        self.width = shape[1] if self.layout == "first" else shape[-1]
        self.positions = math.prod(self.shape) // self.width
        self.level = round(math.log2(image[2] * image[3] / self.positions) / 2)  # binary logarithm of the stride


def _same_proportions(size: torch.Size, image: torch.Size) -> bool:
    """Say whether a height and width are the image's, each divided by one number and rounded."""
    return abs(size[0] * image[1] - size[1] * image[0]) < max(image) or size[0] == size[1] == 1


class Stages:
    """Where a network is cut. `traces` (training or not -> Trace), `taps` and the like as keys of the traces."""

    def __init__(self, net: nn.Module, example: Tensor, taps: int = 4, classifier: str | None = None):
        """Trace `net` at the size of `example`; ValueError in one line if it cannot be traced or cut."""
        self._net = net
        self.trace(example)
        self._trace = self.traces[False]
        self.num_classes = self._trace.output.meta["value"].shape[-1]
        embedding = self._find_classifier(classifier)
        self.embedding = self._trace.keys[embedding]
        self.width = embedding.meta["value"].shape[1 if embedding.meta["value"].ndim == 4 else -1]
        cuts = [node for node in self._trace.cuts() if self._is_feature_map(node, embedding)]
        blocks = self._blocks(cuts)
        nodes = self._find_taps(cuts, blocks, taps)
        if not nodes:
            reasons = [f" ({path or 'the network'}: {why})" for path, why in self._trace.reasons.items()]
            what = "cannot be cut: no tensor between two blocks carries all data"
            raise TraceError(f"{type(net).__name__} {what}{''.join(reasons[:1])}")
        self.taps = [self._trace.keys[node] for node in nodes]
        self.maps = [self._map(node) for node in nodes]
        self.names = self._names(nodes)
        same = self._same_shape(blocks, nodes) or self._same_shape(cuts, nodes)
        self.repeated = self._trace.keys[same[0]] if same else None  # the last branch begins with what lies from here

    def trace(self, example: Tensor) -> None:
        """Trace the network at the size of `example`, with the same taps; ValueError if the network rejects it."""
        self.example = torch.empty((2, *example.shape[1:]), device=META)
        try:
            with torch.no_grad():
                meta_copy(self._net).eval()(self.example)
        except Exception as error:  # in the network's own words
            if "meta tensor" not in str(error):  # else it looks at values, and cannot be traced
                size = " x ".join(map(str, example.shape[2:]))
                reason = f"refuses images of {size} pixels: {first_line(error)}"
                raise ValueError(f"{type(self._net).__name__} {reason}") from None
        self.traces = {mode: Trace(self._net, self.example, training=mode) for mode in (False, True)}

    def _names(self, taps: list[fx.Node]) -> list[str]:
        """Return a name for each tap: the outermost module that ends there and holds no other tap."""
        paths = [self._trace.modules.get(node, [self._trace.keys[node]]) for node in taps]
        inner = {path[0] for path in paths}
        return [
            next(
                (name for name in reversed(path) if sum(other.startswith(f"{name}.") for other in inner) <= 1), path[0]
            )
            for path in paths
        ]

    def _find_classifier(self, name: str | None) -> fx.Node:
        """Return the input node of the layers that make the logits, or of the layer `name` if given."""
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
        derived = self._trace.derived
        inputs = {given: None for node in found.values() for given in node.all_input_nodes if given in derived}
        if len(inputs) > 1:
            inputs = self._common_embedding(list(found.values()))
        if len(inputs) != 1:
            several = f"has several classifiers ({', '.join(sorted(found))}): name one with --classifier"
            raise TraceError(f"{type(self._net).__name__} {several}")
        return next(iter(inputs))

    def _common_embedding(self, classifiers: list[fx.Node]) -> list[fx.Node]:
        """Return the embedding (B, D) that several classifiers read, each after a norm of its own at most, if any."""
        order = self._trace.order
        first = min(map(order.get, classifiers))
        cuts = [node for node in self._trace.cuts() if order[node] < first and node.meta["value"].ndim == 2]
        return cuts[-1:] if self._layers_between(cuts[-1:], self._trace.output) == set(classifiers) else []

    def _layer(self, node: fx.Node) -> str | None:
        """Return the name of the layer with a weight matrix that makes a node, or None."""
        if node.op == "call_module":
            return node.target if _heavy(self._net.get_submodule(node.target)) else None
        weights = [given for given in node.all_input_nodes if given not in self._trace.derived]
        for given in weights:  # which grows: weights may be standardised before they are used
            if given.op == "get_attr" and operator.attrgetter(given.target)(self._net).ndim > 1:
                return given.target
            weights += [
                other for other in given.all_input_nodes if has_tensor(other.meta["value"]) and other not in weights
            ]
        return None

    def _is_feature_map(self, node: fx.Node, embedding: fx.Node) -> bool:
        """Say whether a cut is a map or a row of tokens of the image, before the head."""
        value, image = node.meta["value"], self._trace.data[0].meta["value"]
        if node.op == "placeholder" or value.ndim not in (3, 4) or len(value) != len(image):
            return False
        found = self._map(node)
        alone = found.positions == 1 and max(image.shape[2:]) > _LARGE_IMAGE
        return found.layout is not None and not alone and self._trace.order[node] <= self._trace.order[embedding]

    def _map(self, node: fx.Node) -> FeatureMap:
        """Return what is known of the tensor of a node."""
        return FeatureMap(node.meta["value"].shape, self._trace.data[0].meta["value"].shape)

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
        if len(blocks) > 1 and len({self._map(node).level for node in blocks}) == 1:
            count = min(count, len(blocks))
            return [blocks[round(len(blocks) * part / count) - 1] for part in range(1, count + 1)]
        last = {self._map(node).level: node for node in cuts} | {self._map(node).level: node for node in blocks}
        taps = []
        for level in sorted(last):
            if self._layers_between(taps[-1:], last[level]):
                taps.append(last[level])
        return taps[-count:]

    def _same_shape(self, candidates: list[fx.Node], taps: list[fx.Node]) -> list[fx.Node]:
        """Return the candidates between the last two taps that have the shape of the last one."""
        *earlier, last = taps
        first = self._trace.order[earlier[-1]] if earlier else -1
        same = [node for node in candidates if node.meta["value"].shape == last.meta["value"].shape]
        return [node for node in same if self._trace.order[node] >= first and self._layers_between([node], last)]

    def _layers_between(self, start: list[fx.Node], end: fx.Node) -> set[fx.Node]:
        """Return the nodes that a layer makes after `start`, or from the image on if it is empty, up to `end`."""
        order, first = self._trace.order, self._trace.order[start[0]] if start else -1
        between = (node for node in self._trace.data if first < order[node] <= order[end])
        return {node for node in between if self._layer(node)}


def _heavy(module: nn.Module) -> int:
    """Return the number of layers with a weight matrix or kernel in a module."""
    return sum(any(weight.ndim > 1 for weight in layer.parameters(recurse=False)) for layer in module.modules())
