"""The exponential moving average of the weights, tested and saved beside the weights themselves."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import state_dicts
from utils import unwrap


class Average:
    """The moving average of a model's weights: `decay` is the share of the old value that each optimizer step keeps.

    After n steps it is (1 + n) / (10 + n) at most, so that a short run forgets the weights that it began with, which
    are those of the first step. BatchNorm's statistics are averaged too, as in torchvision's and timm's recipes: those
    of the present weights would be ahead of weights that lag behind by 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, decay: float):
        model = unwrap(model)
        self.top1: float | None = None  # of the last test, in percent

        def average(own: list[Tensor], present: list[Tensor], count: Tensor | int) -> None:
            """Take tensors of one type; counts and indices, which would be rounded down, have no average."""
            if own[0].is_floating_point():
                kept = min(decay, (1 + self.steps) / (10 + self.steps))
                get_ema_multi_avg_fn(kept)(own, present, count)
            else:
                torch._foreach_copy_(own, present)

        self.averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        optimizer.register_step_post_hook(lambda *_: self.averaged.update_parameters(model))

    @property
    def model(self) -> nn.Module:
        """The network with the averaged weights."""
        return self.averaged.module

    @property
    def steps(self) -> int:
        """The optimizer's steps so far; the count lies on the CPU."""
        return int(self.averaged.n_averaged)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the average; whoever reads its weights prefers `state_dict_ema`."""
        return {"state_dict_ema": self.model.state_dict(), "ema_steps": self.steps, "ema_acc": self.top1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy what `state_dict` gave; a run without an average so far begins one at the next step."""
        state_dicts.load(self.model, state.get("state_dict_ema", state["net"]))
        self.averaged.n_averaged.fill_(state.get("ema_steps", 0))
        self.top1 = state.get("ema_acc", state["acc"])
