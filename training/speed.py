"""Speed-ups that change results by rounding alone: memory that is kept, converted weights, a compiled step."""

import copy
import ctypes
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

import models
from training.metrics import networks as networks_of


def inference_copy(teacher: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    """Return a frozen copy of a teacher with the weights that autocast to `dtype` would convert in every step."""
    network = copy.deepcopy(teacher).eval().requires_grad_(False).to(memory_format=layout)
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):  # a subclass may need float32
            module.to(dtype)
    return network


def common_layout(networks: Iterable[nn.Module], batches: Iterable) -> torch.memory_format:
    """Return the memory format of networks and images: channels-last, unless a network refuses it.

    A network that refuses it gets a hook that makes its input contiguous. This project's own networks take
    channels-last; others are tried on two images of `batches`: `view` across such an image's channels fails, as do
    weights of five dimensions.
    """
    layout, images = torch.channels_last, None
    for network in networks:
        members = networks_of(network).values()
        if all(isinstance(models.backbone_of(member), models.Backbone) for member in members):
            continue
        if images is None:
            images = next(iter(batches))[0][:2].to(memory_format=torch.channels_last)
        try:
            with torch.no_grad():
                device = next(network.parameters(), images).device
                copy.deepcopy(network).eval().to(memory_format=torch.channels_last)(images.to(device))
        except RuntimeError:
            layout = torch.contiguous_format
            for part in {network, *members, *map(models.backbone_of, members)}:
                part.register_forward_pre_hook(made_contiguous)
    return layout


def made_contiguous(_: nn.Module, given: tuple) -> tuple:
    """Forward pre-hook: return the module's input tensors contiguous."""
    return tuple(value.contiguous() if torch.is_tensor(value) else value for value in given)


def keep_memory() -> None:
    """Let glibc keep the memory that tensors free: page faults on new memory cost more than the arithmetic in it.

    A BatchNorm of 60 MB takes 9 ms instead of 122, a test of ResNet-20 9 to 14 % less. Elsewhere nothing changes.
    """
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 2**26)):
            mallopt(option, value)


class Float32Conv2d(nn.Conv2d):
    """A convolution in float32 also under autocast; the result has the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x (B, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


def suit_cpu(model: nn.Module) -> None:
    """Train strided depthwise convolutions in float32: a CPU's bfloat16 backward pass takes 10 to 50 times as long."""
    for module in model.modules():
        depthwise = type(module) is nn.Conv2d and module.groups == module.in_channels > 1
        if depthwise and max(module.stride) > 1 and module.weight.requires_grad:
            module.__class__ = Float32Conv2d


class CompiledStep:
    """A training step (images, labels, epoch, ...) compiled for the largest batch so far, with `graphs` as CUDA graphs.

    A smaller one, such as an epoch's last, runs uncompiled. `state` are tensors that the step updates in place.
    """

    def __init__(self, step: Callable, device: torch.device, graphs: bool = False, state: Iterable[Tensor] = ()):
        self.uncompiled, self.size = step, 0
        self.compiled = torch.compile(step, mode="reduce-overhead" if graphs else None, dynamic=False)
        for value in state:
            torch._dynamo.mark_static_address(value)  # else no CUDA graph is made of a step that changes them
        # As a plain number the epoch would be a constant of the compiled code, which each epoch would compile anew.
        self.epoch = torch.zeros((), device=device)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, *rest: Any) -> Any:
        """Return what the step returns."""
        self.size = max(self.size, len(images))
        if len(images) < self.size:
            return self.uncompiled(images, labels, epoch, *rest)
        return self.compiled(images, labels, self.epoch.fill_(epoch), *rest)
