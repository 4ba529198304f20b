"""One optimizer step: forward and backward pass in one precision, on one process or many, eager or compiled."""

import contextlib
import inspect
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from methods import Batch, Objective
from training import speed
from training.metrics import Totals, training_sums
from training.precision import autocast
from utils import World

if TYPE_CHECKING:
    from training.trainer import Trainer


class StepModule(nn.Module):
    """An objective's step on a model, as a module that holds all that is trained, for DistributedDataParallel."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.trained, self.objective = model, objective.trained, objective

    def forward(self, *batch: Any) -> tuple[dict[str, Tensor], Any]:
        return self.objective.step(self.model, Batch(*batch))


class TrainingStep:
    """What trains a Trainer's model by its objective: the optimizer, and the step that it takes on a batch.

    The objective's teacher is replaced by a copy for inference.
    """

    def __init__(self, trainer: "Trainer"):
        objective, world, precision = trainer.objective, trainer.world, trainer.precision
        self.precision, self.world, self.layout = precision, world, trainer.layout
        self.accumulate, self.compiled = trainer.accumulate, trainer.compile
        module = StepModule(trainer.model, objective)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = trainer.factory(trained)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == torch.float16)
        if self.scaler.is_enabled() and self.optimizer.defaults.get("momentum") and isinstance(self.optimizer, SGD):
            # A fused first step that the scaler skips would leave momentum that nothing has written.
            for parameter in trained:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if world.device.type == "cpu":
            speed.keep_memory()
            if precision == torch.bfloat16:
                speed.suit_cpu(trainer.model)
        self.wrapped = module if world.size == 1 else distribute(module, world, trainer.sync_bn)
        if isinstance(objective.teacher, nn.Module):
            objective.teacher = speed.inference_copy(objective.teacher, precision, self.layout)
        self.forward = self.forward_eager
        if self.compiled:
            # DistributedDataParallel's hooks split the step into several graphs; CUDA graphs of these would hold their
            # gradients at fixed addresses, which its buckets replace.
            graphs = world.device.type == "cuda" and world.size == 1
            state = objective.state.values()
            self.forward = speed.CompiledStep(self.forward_eager, world.device, graphs, state)

    def forward_eager(self, images: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and its training sums (name -> scalar)."""
        with autocast(images.device, self.precision):
            terms, outputs = self.wrapped(images, labels, *rest)
        return sum(terms.values()), training_sums(terms, outputs, labels)

    def __call__(self, batch: Batch, totals: Totals) -> None:
        """Take one optimizer step on a batch, and add its sums to `totals`."""
        count = len(batch.images)
        chunks = self.parts(batch)
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be overwritten from here on
        for number, part in enumerate(chunks, 1):
            waiting = self.world.size > 1 and number < len(chunks)
            with self.wrapped.no_sync() if waiting else contextlib.nullcontext():
                loss, sums = self.forward(*part)
                self.scaler.scale(loss * (len(part.images) / count)).backward()
            totals.add(sums, len(part.images))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def parts(self, batch: Batch) -> list[Batch]:
        """Return the parts of a batch, on the device and in the layout of the networks; of two images at least each."""
        device, overlaps = self.world.device, self.world.device.type == "cuda"  # Apple's GPUs may read freed memory
        images = batch.images.to(device, memory_format=self.layout, non_blocking=overlaps)
        labels = batch.labels.to(device, non_blocking=overlaps)
        batch = batch._replace(images=images, labels=labels if labels.is_floating_point() else labels.long())
        size = max(math.ceil(len(images) / self.accumulate), 2)
        bounds = [*range(0, max(len(images) - 1, 1), size), len(images)]
        return [batch.rows(slice(*pair)) for pair in itertools.pairwise(bounds)]


def distribute(module: StepModule, world: World, sync_bn: bool) -> DistributedDataParallel:
    """Return the module with its gradients averaged over all processes."""
    if sync_bn:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    # Training reads no running statistics, and evaluation shares the first process's: no broadcast in each step.
    names = inspect.signature(DistributedDataParallel).parameters
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # its older name
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True, **{broadcast: False})
