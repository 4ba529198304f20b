"""A traced network: the tensors through which all data flow, and the functions between two of them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.tracer import TraceError, Tracer, first_line, has_tensor


class Trace:
    """The graph of a network in one mode, and what is known of its nodes."""

    def __init__(self, net: nn.Module, example: Tensor, training: bool):
        self.net = net
        tracer = Tracer(example)
        modes = {module: module.training for module in net.modules()}
        net.train(training)
        try:
            self.graph = tracer.record(net)
        except Exception as error:  # whatever the network's own code raises on meeting a proxy
            raise TraceError(f"{type(net).__name__} cannot be traced: {first_line(error)}") from None
        finally:
            for module, mode in modes.items():
                module.training = mode
        self.reasons = tracer.reasons
        self.output = next(iter(reversed(self.graph.nodes))).args[0]
        if not isinstance(self.output, fx.Node) or not isinstance(self.output.meta["value"], Tensor):
            raise ValueError(
                f"{type(net).__name__} returns a {type(self.output).__name__} of tensors, not logits (B, N)"
            )
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.modules: dict[fx.Node, list[str]] = {}  # the modules that return a node's value, innermost first
        for path, node in tracer.outputs:
            self.modules.setdefault(node, []).append(path)
        self.keys = self._name_nodes()
        self.nodes = {key: node for node, key in self.keys.items()}
        self._find_data()

    def _name_nodes(self) -> dict[fx.Node, str]:
        """Return a name for each node that the graphs of both modes share: a module's path, or `scope:operation`."""
        names, seen = {}, Counter()
        for node in self.graph.nodes:
            if node in self.modules:
                name = self.modules[node][-1]
            else:
                operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "call")
                name = f"{node.meta.get('scope', '')}:{operation}"
            seen[name] += 1
            names[node] = name if seen[name] == 1 else f"{name}#{seen[name]}"
        return names

    def _find_data(self) -> None:
        """Find the tensors that derive from the image, and those that lead to the logits; sizes do not count."""
        self.derived = set()
        for node in self.graph.nodes:
            tensor = has_tensor(node.meta.get("value"))
            if node.op == "placeholder" or (tensor and self.derived.intersection(node.all_input_nodes)):
                self.derived.add(node)
        used, waiting = set(), [self.output]
        while waiting:
            node = waiting.pop()
            if node in self.derived and node not in used:
                used.add(node)
                waiting += node.all_input_nodes
        self.data = [node for node in self.graph.nodes if node in used]

    def cuts(self) -> list[fx.Node]:
        """Return the tensors through which all data flow, from the image to the logits."""
        data, found, reach = set(self.data), [], 0
        for node in self.data:  # in the order of execution: at a cut, no earlier tensor is needed later
            if reach <= self.order[node] and isinstance(node.meta["value"], Tensor):
                found.append(node)
            reach = max([reach, *(self.order[user] for user in node.users if user in data)])
        return found

    def reader(self, taps: list[str], embedding: str) -> Callable:
        """Return a function `(net, image) -> ([tap, ...], embedding, logits)` that runs what `net` runs."""
        graph, copies = fx.Graph(), {}
        wanted = {self.nodes[key]: None for key in taps}
        for node in self.graph.nodes:
            if node.op == "output":
                graph.output((list(wanted.values()), copies[self.nodes[embedding]], copies[self.output]))
                break
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node in wanted:  # what changes a tap in place must not change the branches' input
                changed = any(_in_place(self.net, user) for user in node.users)
                wanted[node] = graph.call_method("clone", (copies[node],)) if changed else copies[node]
        return function_of(self.net, graph)

    def between(self, start: str, end: str) -> fx.Graph:
        """Return the graph of a function `start -> end` of two keys; TraceError if it needs other data of the image.

        Sizes that come from before `start` are the example's, but for the number of images.
        """
        first, last = self.nodes[start], self.nodes[end]
        later = {first}
        for node in self.graph.nodes:
            if later.intersection(node.all_input_nodes):
                later.add(node)
        needed, sizes, waiting = set(), set(), [last, *self._statements(first)]
        while waiting:
            node = waiting.pop()
            if node is first or node in needed or node in sizes:
                continue
            if node in self.derived and node not in later:
                raise TraceError(f"{end} needs more than {start}: {self.keys[node]}")
            if node not in self.derived and any(given in self.derived - later for given in node.all_input_nodes):
                sizes.add(node)
                continue
            needed.add(node)
            waiting += node.all_input_nodes
            waiting += self._statements(node) if node is not last else []
        graph = fx.Graph()
        copies = {first: graph.placeholder("x")}
        if any(_in_place(self.net, user) for user in first.users):  # `x` belongs to others
            copies[first] = graph.call_method("clone", (copies[first],))
        for node in self.graph.nodes:
            if node in sizes:
                copies[node] = _known_size(graph, node, copies[first])
            elif node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[last])
        return graph

    def _statements(self, node: fx.Node) -> list[fx.Node]:
        """Return what changes the value of `node` in place, as `y.relu_()`, whose result nothing need read."""
        return [user for user in node.users if user.all_input_nodes[0] is node and _in_place(self.net, user)]


def _known_size(graph: fx.Graph, node: fx.Node, x: fx.Node) -> Any:
    """Return what stands for a size of a tensor that is not at hand, `x` being another one of the same images."""
    value = node.meta["value"]
    if node.target is getattr and not isinstance(value, (int, tuple)):
        return graph.call_function(getattr, (x, node.args[1]))  # its device or dtype
    source = node.args[0].meta["value"] if isinstance(node.args[0], fx.Node) else None
    batch = source.shape[:1] if isinstance(source, Tensor) else ()
    if isinstance(value, torch.Size) and value[:1] == batch:
        return graph.call_function(with_length_of, (x, tuple(value[1:])))
    if node.target == "size" and node.args[1:] == (0,):
        return graph.call_method("size", (x, 0))
    return value


def with_length_of(x: Tensor, size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (B, *size), of the B of `x`."""
    return (x.shape[0], *size)


def function_of(net: nn.Module, graph: fx.Graph) -> Callable:
    """Return the function `(net, ...)` of a graph whose modules and weights are those of `net`."""
    return type(fx.GraphModule(net, graph)).forward


def _in_place(net: nn.Module, node: fx.Node) -> bool:
    """Say whether a node may change its input."""
    if node.op == "call_module":
        module = net.get_submodule(node.target)
        while isinstance(module, nn.Sequential) and len(module):
            module = module[0]
        return any(getattr(part, "inplace", False) for part in module.modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace")) or name.endswith("_") or name in fx.graph.inplace_methods
