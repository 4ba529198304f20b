"""The base of every objective: what a training step minimises, and the checks of networks' outputs."""

from typing import NamedTuple

import torch


def unwrap(model):
    """The bare network inside DistributedDataParallel (`.module`) and torch.compile (`._orig_mod`), in any order."""
    while hasattr(model, "_orig_mod") or hasattr(model, "module"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def split_outputs(outputs):
    """(logits, [aux logits]) of one network's outputs; a backbone's bare logits come with an empty list."""
    if torch.is_tensor(outputs):
        return outputs, []
    logits, aux_logits = outputs
    if not torch.is_tensor(logits):
        raise ValueError("a mutual pair's outputs: this objective trains one network")
    return logits, list(aux_logits)


def sum_terms(values, like):
    """Sum of scalar tensors, a float32 zero on the device of `like` for none (a plain `sum` would give an int)."""
    return sum(values, torch.zeros((), device=like.device))


def check_heads(logits, aux_logits, rotations):
    """ValueError unless there are auxiliary heads, each of N * M outputs for logits (rows, N)."""
    if not aux_logits:
        raise ValueError("the network has no auxiliary heads: this objective needs a *_aux network")
    expected = logits.shape[1] * rotations
    for aux in aux_logits:
        if aux.shape[1] != expected:
            raise ValueError(f"an auxiliary head has {aux.shape[1]} outputs, not classes x rotations = {expected}")


def check_pair(student, teacher, student_aux=(), teacher_aux=()):
    """ValueError unless student and teacher have one class count and, where they are given, one number of heads."""
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(f"the student has {student.shape[1]} classes, the teacher {teacher.shape[1]}")
    if len(student_aux) != len(teacher_aux):
        raise ValueError(f"the student has {len(student_aux)} auxiliary heads, the teacher {len(teacher_aux)}")


def ramp(epoch, warmup_epochs):
    """Linear warm-up weight min(epoch / warmup_epochs, 1), and 1 without warm-up; `epoch` a number or scalar tensor."""
    if warmup_epochs <= 0:
        return 1.0
    share = epoch / warmup_epochs
    return share.clamp(max=1.0) if torch.is_tensor(share) else min(share, 1.0)


class Predictions(NamedTuple):
    """Detached outputs of one step, for meters: one entry per trained network."""

    logits: list[torch.Tensor]  # (B, N), un-rotated rows only
    aux_logits: list[list[torch.Tensor]]  # (M*B, N*M), all rotated rows; empty where a network has no heads


def predictions(*networks):
    """`Predictions` of one (un-rotated logits, [aux logits]) per network."""
    return Predictions([z.detach() for z, _ in networks], [[aux.detach() for aux in heads] for _, heads in networks])


class Objective:
    """What a training step minimises: named scalar terms whose sum is the loss.

    No nn.Module, so that `model.train()` and the optimiser never reach the teacher.
    """

    def __init__(self, teacher=None):
        self.teacher = teacher
        self.state = {}  # running state: named tensors
        if isinstance(teacher, torch.nn.Module):
            teacher.eval().requires_grad_(False)

    def __call__(self, model, images, labels, epoch=0):
        """Terms of un-rotated images (B, C, H, W) and labels (B,); `epoch` counts from 0."""
        return self.step(model, images, labels, epoch)[0]

    def step(self, model, images, labels, epoch=0):
        """Terms and `Predictions` of un-rotated images (B, C, H, W) and labels (B,), with one forward call of model."""
        raise NotImplementedError

    def teacher_outputs(self, images):
        """The teacher's (logits, [aux logits]) without gradient; called first, while no activations are held."""
        with torch.no_grad():  # not inference_mode, whose tensors torch.compile handles badly
            return split_outputs(self.teacher(images))

    def outputs(self, model, images):
        """(logits, [aux logits], teacher logits) where the teacher's heads are not used."""
        teacher_logits, _ = self.teacher_outputs(images)
        logits, aux_logits = split_outputs(model(images))
        check_pair(logits, teacher_logits)
        return logits, aux_logits, teacher_logits

    def state_dict(self):
        """A copy of the running state; empty for an objective without any."""
        return {name: value.clone() for name, value in self.state.items()}

    def load_state_dict(self, state):
        """Restore what `state_dict` gave, onto the device of the present state."""
        for name, value in self.state.items():
            value.copy_(state[name])

    def to(self, device):
        """Move teacher and running state to the device; returns self."""
        self.state = {name: value.to(device) for name, value in self.state.items()}
        if isinstance(self.teacher, torch.nn.Module):
            self.teacher.to(device)
        return self
