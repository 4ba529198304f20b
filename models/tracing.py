"""A network as a graph (torch.fx): the tensors through which all data flow, and the programs between two of them.

Every value of the graph is known, as a tensor on the meta device or a number, so control flow that depends on sizes
follows the example; a module whose forward cannot be followed stands in the graph as one call.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn

from models import layers

META = torch.device("meta")


class TraceError(ValueError):
    """A network cannot be followed; the message is one line."""


class ValueProxy(fx.Proxy):
    """A traced value that answers what Python asks of numbers and sequences from its value for the example."""

    def __getattr__(self, name: str) -> "ValueAttribute":
        return ValueAttribute(self, name)

    def __index__(self) -> int:
        return int(self.tracer.number(self))

    def __int__(self) -> int:
        return int(self.tracer.number(self))

    def __float__(self) -> float:
        return float(self.tracer.number(self))

    def __len__(self) -> int:
        return len(self.node.meta["value"])


class ValueAttribute(ValueProxy, fx.proxy.Attribute):
    """An attribute or a method of a traced value."""

    def __init__(self, root: fx.Proxy, name: str):
        fx.proxy.Attribute.__init__(self, root, name)


class Tracer(fx.Tracer):
    """Record one forward pass of a network; each node's `meta` holds its value, and its `scope` (a module's path)."""

    def __init__(self, example: Tensor):
        leaf_functions = [layers.global_pool, layers.channel_shuffle]
        self.leaf_modules = tuple(item for item in vars(torchvision.ops).values() if _is_module_class(item))
        if "timm" in sys.modules:
            from timm.layers import get_notrace_functions, get_notrace_modules

            self.leaf_modules += tuple(get_notrace_modules())
            leaf_functions += get_notrace_functions()
        super().__init__(autowrap_functions=tuple(leaf_functions))
        self.example = example
        self.evaluating = False
        self.reasons: dict[str, str] = {}  # modules that stand as one call -> why
        self.outputs: list[tuple[str, fx.Node]] = []  # module path, the node it returned

    def record(self, net: nn.Module) -> fx.Graph:
        """Return the graph of `net(image)`, in the mode that `net` is in."""
        self.meta_net = meta_copy(net)
        self.tensor_names = {id(tensor): name for name, tensor in (*net.named_parameters(), *net.named_buffers())}
        # Leaf functions are replaced in the files of all classes of the network, not in that of `forward` alone.
        classes = {parent for module in net.modules() for parent in type(module).__mro__}
        self._autowrap_search += [sys.modules[owner.__module__] for owner in classes if owner.__module__ in sys.modules]
        with torch.no_grad():
            return self.trace(net)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple:
        """Return the one argument, the image; optional ones take their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "image", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep torch's and torchvision's modules whole, and those that timm says cannot be traced."""
        return isinstance(m, self.leaf_modules) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> ValueProxy:
        """Return the stand-in for a node's value."""
        return ValueProxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, and find its value for the example."""
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["scope"] = self.scope.module_path
        self.evaluating = True
        try:
            with META:
                node.meta["value"] = self.evaluate(node)
        except Exception:
            self.graph.erase_node(node)
            raise
        finally:
            self.evaluating = False
        return node

    def evaluate(self, node: fx.Node) -> Any:
        """Return what a node computes from the values of its arguments."""
        if node.op == "placeholder":
            return self.example
        if node.op == "get_attr":
            return attribute(self.root, node.target).detach().to(META)
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _meta_argument)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.meta_net.get_submodule(node.target)(*args, **kwargs)
        return node.target(*args, **kwargs) if node.op == "call_function" else None

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Trace a module, or record one call of it where that fails."""
        if self.evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        last, stack, found = next(iter(reversed(self.graph.nodes))), self.module_stack.copy(), len(self.outputs)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:  # whatever the module's own code raises on meeting a stand-in
            self.module_stack = stack
            del self.outputs[found:]
            while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                self.graph.erase_node(node)
            result = self.create_proxy("call_module", path, args, kwargs)
            self.reasons[path] = one_line(error)
        if isinstance(result, fx.Proxy):
            self.outputs.append((path, result.node))
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        """Return a stand-in for a parameter or buffer of the network, any other attribute itself."""
        name = None if self.evaluating else self.tensor_names.get(id(attr_val))
        return attr_val if name is None else self.create_proxy("get_attr", name, (), {})

    def number(self, proxy: fx.Proxy) -> Any:
        """Return the value of a traced number; TraceError for a tensor, whose values depend on the image."""
        value = proxy.node.meta["value"]
        if has_tensor(value):
            raise TraceError("control flow depends on the values of a tensor")
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return the truth of a traced number."""
        return bool(self.number(obj))

    def iter(self, obj: fx.Proxy) -> Iterator:
        """Return stand-ins for the items of a traced sequence or tensor."""
        return iter([obj[index] for index in range(len(obj.node.meta["value"]))])


class Trace:
    """The graph of a network in one mode, and what is known of its nodes."""

    def __init__(self, net: nn.Module, example: Tensor, training: bool):
        tracer = Tracer(example)
        modes = {module: module.training for module in net.modules()}
        net.train(training)
        try:
            self.graph = tracer.record(net)
        except Exception as error:  # whatever the network's own code raises on meeting a stand-in
            raise TraceError(f"{type(net).__name__} cannot be traced: {one_line(error)}") from None
        finally:
            for module, mode in modes.items():
                module.training = mode
        self.reasons = tracer.reasons
        self.output = next(iter(reversed(self.graph.nodes))).args[0]
        if not isinstance(self.output, fx.Node) or not isinstance(self.output.meta["value"], Tensor):
            raise TraceError(f"{type(net).__name__} returns a {type(self.output).__name__} of tensors, not logits (B, N)")
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
        """Find the tensors that derive from the image, and those of them on a way to the logits; sizes carry no data."""
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

    def reader(self, net: nn.Module, taps: list[str], embedding: str) -> Callable:
        """Return a function `(net, image) -> ([tap, ...], embedding, logits)` that runs what `net` runs, in its order."""
        graph, copies = fx.Graph(), {}
        wanted = {self.nodes[key]: None for key in taps}
        for node in self.graph.nodes:
            if node.op == "output":
                graph.output((list(wanted.values()), copies[self.nodes[embedding]], copies[self.output]))
                break
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node in wanted:  # what changes a tap in place must not change the branch's input, nor the reverse
                changed = any(_in_place(net, user) for user in node.users)
                wanted[node] = graph.call_method("clone", (copies[node],)) if changed else copies[node]
        return function_of(net, graph)

    def between(self, start: str, end: str) -> fx.Graph:
        """Return the graph of a function `start -> end` of two keys; TraceError where `start` does not suffice."""
        start, end = self.nodes[start], self.nodes[end]
        needed, waiting = set(), [end]
        while waiting:
            node = waiting.pop()
            if node is start or node in needed:
                continue
            if node in self.derived and self.order[node] < self.order[start] or node.op == "placeholder":
                raise TraceError(f"{self.keys[end]} needs more than {self.keys[start]}: {self.keys[node]}")
            needed.add(node)
            waiting += node.all_input_nodes
        graph = fx.Graph()
        copies = {start: graph.placeholder("x")}
        for node in self.graph.nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[end])
        return graph


def function_of(net: nn.Module, graph: fx.Graph) -> Callable:
    """Return the function `(net, ...)` of a graph whose modules and weights are those of `net`."""
    return type(fx.GraphModule(net, graph)).forward


def _in_place(net: nn.Module, node: fx.Node) -> bool:
    """Say whether a node may change its input."""
    if node.op == "call_module":
        return any(getattr(module, "inplace", False) for module in net.get_submodule(node.target).modules())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace")) or name.endswith("_") or name in ("iadd", "imul", "isub", "setitem")


def meta_copy(net: nn.Module) -> nn.Module:
    """Return a copy of a network without its weights' memory."""
    memo = {}
    for module in net.modules():
        tensors = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in tensors:
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach().to(META), requires_grad=False)
            elif isinstance(tensor, Tensor):
                memo[id(tensor)] = tensor.detach().to(META)
    return copy.deepcopy(net, memo)


def has_tensor(value: Any) -> bool:
    """Say whether a value is a tensor or a sequence with one."""
    if isinstance(value, (tuple, list)):
        return any(has_tensor(item) for item in value)
    return isinstance(value, Tensor)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _is_module_class(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, nn.Module)


def attribute(root: nn.Module, path: str) -> Any:
    """Return `root.a.b` of the path `a.b`."""
    for name in path.split("."):
        root = getattr(root, name)
    return root


def _meta_argument(value: Any) -> Any:
    """Return an argument as it is on the meta device."""
    if isinstance(value, fx.Node):
        return value.meta["value"]
    return META if isinstance(value, torch.device) else value
