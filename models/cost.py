"""What a network costs: parameters and multiply-adds, without the weights' memory where it can be."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.auxiliary import backbone_of
from models.tracer import META, meta_copy


def multiply_adds(network: nn.Module, size: int) -> int:
    """Return the multiply-adds of one forward pass of an image of `size` pixels a side."""
    try:
        return counted(meta_copy(network), torch.empty(1, 3, size, size, device=META))
    except Exception:  # whatever the network's own code raises if it looks at values
        return counted(network, torch.zeros(1, 3, size, size, device=next(network.parameters()).device))


def counted(network: nn.Module, images: Tensor) -> int:
    """Return the multiply-adds of one forward pass of `images` (B, 3, H, W)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return counter.get_total_flops() // 2


def cost(network: nn.Module, size: int) -> dict[str, dict[str, int]]:
    """Return name -> parameters and multiply-adds, of the backbone and with the auxiliary classifiers."""
    parts = {"backbone": backbone_of(network), "with_heads": network}
    return {
        name: {"parameters": sum(p.numel() for p in part.parameters()), "multiply_adds": multiply_adds(part, size)}
        for name, part in parts.items()
    }


def branch_costs(name: str, num_classes: int, size: int, **options: Any) -> dict[str, dict[str, int]]:
    """Return the `cost` of a library's or a file's `_aux` network: "plain", with "copy" and with "light" branches.

    `options` are those of `models.create`.
    """
    found = {}
    for branches in ("copy", "light"):
        costs = cost(without_values(name, num_classes, size=size, **{**options, "branches": branches}).eval(), size)
        found |= {"plain": costs["backbone"], branches: costs["with_heads"]}
    return found


def without_values(*args: Any, **options: Any) -> nn.Module:
    """Return a network of `models.create` on the meta device, or on the CPU if it reads values while it is built.

    The random numbers of the process stay where they are.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with META:
                return models.create(*args, **options)
        except Exception:  # whatever the network's own code raises on meeting a tensor without values
            return models.create(*args, **options)
