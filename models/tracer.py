"""Recording one forward pass of a network (torch.fx).

Every value of the graph is known, as a tensor on the meta device or a number, so control flow that depends on sizes
follows the example; a module whose forward cannot be followed stands in the graph as one call.
"""

import copy
import operator
import pickle
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
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
        operations = (item for item in vars(torchvision.ops).values() if isinstance(item, type))
        self.leaf_modules = tuple(item for item in operations if issubclass(item, nn.Module))
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
        """Keep modules of torch.nn and torchvision.ops whole, and what timm says cannot be traced."""
        return isinstance(m, self.leaf_modules) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> ValueProxy:
        """Return the proxy for a node's value."""
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
            return operator.attrgetter(node.target)(self.root).detach().to(META)
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
        generators = _host_generators()
        try:
            result = super().call_module(m, forward, args, kwargs)
            if _host_generators() != generators:  # as in some stochastic depths: the graph would hold this one draw
                raise TraceError("draws random numbers in Python")
        except Exception as error:  # whatever the module's own code raises on meeting a proxy
            _restore_host_generators(generators)  # else the modules around it would seem to draw
            self.module_stack = stack
            del self.outputs[found:]
            while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                self.graph.erase_node(node)
            result = self.create_proxy("call_module", path, args, kwargs)
            self.reasons[path] = first_line(error)
        if isinstance(result, fx.Proxy):
            self.outputs.append((path, result.node))
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        """Return a proxy for a parameter or buffer of the network, any other attribute itself."""
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
        """Return proxies for the items of a traced sequence or tensor."""
        return iter([obj[index] for index in range(len(obj.node.meta["value"]))])


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


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened, with the error's type if it has no letters."""
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return text if re.search("[a-zA-Z]", text) else f"{type(error).__name__} {text}".strip()


def _host_generators() -> bytes:
    """Return the states of the generators that Python code draws from."""
    return pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), np.random.get_state()))


def _restore_host_generators(states: bytes) -> None:
    of_torch, of_python, of_numpy = pickle.loads(states)
    torch.set_rng_state(torch.from_numpy(of_torch))
    random.setstate(of_python)
    np.random.set_state(of_numpy)


def _meta_argument(value: Any) -> Any:
    """Return an argument as it is on the meta device."""
    if isinstance(value, fx.Node):
        return value.meta["value"]
    return META if isinstance(value, torch.device) else value
