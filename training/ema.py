"""The exponential moving average of the weights, tested and saved beside the weights themselves."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import state_dicts
from utils import unwrap

if TYPE_CHECKING:
    from training.trainer import Trainer


class Average:
    """The moving average of a model's weights: `decay` is the share of the old value that each optimizer step keeps.

    BatchNorm's statistics are averaged too, as in torchvision's and timm's recipes: those of the present weights would
    be ahead of weights that lag behind by 1 / (1 - decay) steps. The average begins with the weights of the first step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, decay: float):
        model = unwrap(model)
        average = get_ema_multi_avg_fn(decay)

        def averaged(own: list[Tensor], present: list[Tensor], count: Tensor | int) -> None:
            """Take tensors of one type; counts and indices, which it would round down, have no average."""
            average(own, present, count) if own[0].is_floating_point() else torch._foreach_copy_(own, present)

        self.averaged = AveragedModel(model, multi_avg_fn=averaged, use_buffers=True)
        self.top1: float | None = None  # of the last test, in percent
        optimizer.register_step_post_hook(lambda *_: self.averaged.update_parameters(model))

    def test(self, trainer: "Trainer") -> dict[str, float]:
        """Return the flat record of an epoch's tests: `val/ema_top1` if images are held out, and `test/ema_top1`."""
        tested = trainer.tests(self.averaged.module)
        self.top1 = tested["test"]["top1"]
        return {f"{name}/ema_top1": means["top1"] for name, means in tested.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the average; whoever reads its weights prefers `state_dict_ema`."""
        steps = int(self.averaged.n_averaged)
        return {"state_dict_ema": self.averaged.module.state_dict(), "ema_steps": steps, "ema_acc": self.top1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy what `state_dict` gave; a run without an average so far begins one at the next step."""
        if "state_dict_ema" in state:
            state_dicts.load(self.averaged.module, state["state_dict_ema"])
            self.averaged.n_averaged.fill_(state["ema_steps"])
            self.top1 = state["ema_acc"]
