"""Optimizers by name with the published settings, the schedule of their rate, and the loading of their state."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

DEFAULTS = {
    "sgd": {"lr": 0.05, "weight_decay": 5e-4, "momentum": 0.9, "nesterov": True},
    "adamw": {"lr": 1e-3, "weight_decay": 0.05},
}
Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def optimizer_factory(optimizer: str | Factory, **given: Any) -> Factory:
    """Return what makes the optimizer of some parameters: one by name, with the settings `given`, or the user's own.

    Settings that are None have their defaults. ValueError for a setting that the optimizer does not take.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if callable(optimizer):
        if given:
            raise ValueError(f"{', '.join(given)}: for optimizers by name; a callable sets its own")
        return optimizer
    if optimizer not in DEFAULTS:
        raise ValueError(f"unknown optimizer {optimizer!r}: {', '.join(DEFAULTS)}, or a callable of the parameters")
    foreign = given.keys() - DEFAULTS[optimizer].keys()
    if foreign:
        raise ValueError(f"{optimizer} takes no {', '.join(sorted(foreign))}")
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]

    def make(parameters):
        parameters = list(parameters)
        fused = parameters[0].device.type in ("cpu", "cuda")
        return kind(parameters, **{**DEFAULTS[optimizer], **given}, fused=fused)

    return make


def rate_factor(
    schedule: str | Callable[[float], float],
    epoch: int,
    step: int,
    steps: int,
    epochs: int,
    milestones: Iterable[int] = (),
    warmup: int = 0,
) -> float:
    """Return the factor on the learning rate at `step` of `steps` of an `epoch`, all counted from 0.

    Linear warm-up for `warmup` epochs, the first step counting as done; then x0.1 at each milestone ("multistep"), or
    half a cosine down to 0 ("cosine"). The warm-up shifts the milestones, as in the published code. A callable is given
    the progress of the whole run, from 0 to 1.
    """
    if callable(schedule):
        return schedule((epoch + step / steps) / epochs)
    if epoch < warmup:
        return (epoch + (step + 1) / steps) / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (epoch - warmup + step / steps) / (epochs - warmup)))
    if schedule == "multistep":
        return 0.1 ** sum(epoch >= milestone + warmup for milestone in milestones)
    raise ValueError(f"unknown schedule {schedule!r}: multistep, cosine, or a callable of the progress from 0 to 1")


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every parameter group to `factor` times its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def load_state(optimizer: torch.optim.Optimizer, factory: Factory, saved: dict) -> None:
    """Copy the state that `optimizer.state_dict()` gave into a new optimizer that `factory` made.

    Each tensor is copied into one that the optimizer itself would make, of the same shape and memory layout: a state
    from elsewhere trains to the same weights, or is refused with a ValueError.
    """
    if not saved["state"]:
        return
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, (parameter, state) in enumerate(zip(own, blank_states(factory, own), strict=True)):
        if number not in saved["state"]:  # it has had no gradient yet
            continue
        found = saved["state"][number]
        if found.keys() != state.keys():
            raise ValueError(f"an optimizer's state of {sorted(found)}, not of {sorted(state)}")
        for name, value in found.items():
            if not torch.is_tensor(value) or not torch.is_tensor(state[name]):
                state[name] = value
            elif value.shape != state[name].shape:
                raise ValueError(f"{name} of shape {list(value.shape)}, not {list(state[name].shape)}")
            else:
                state[name].copy_(value)
        optimizer.state[parameter] = state


def blank_states(factory: Factory, parameters: list[Tensor]) -> list[dict]:
    """Return the optimizer's state of each parameter after one step with zero gradients."""
    copies = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    optimizer = factory(copies)
    for parameter in copies:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return [optimizer.state[parameter] for parameter in copies]
