"""What every method is made of: its constants, what it reads of the networks, and the base class `Objective`."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import models
import options
from losses import cross_entropy, rotate
from models.adapted import Adapted
from utils import unwrap


class Batch(NamedTuple):
    """The inputs of one step: un-rotated images, and what belongs to them."""

    images: Tensor  # (B, C, H, W)
    labels: Tensor  # (B,) int64
    epoch: int | Tensor = 0  # from 0
    index: Tensor | None = None  # (B,) int64: the images' numbers in the training set
    teacher_outputs: "Outputs | None" = None  # in place of the teacher's forward pass

    def rows(self, rows: slice) -> "Batch":
        """Return the part of the batch with the images in `rows`."""
        taught = None if self.teacher_outputs is None else self.teacher_outputs.rows(rows, len(self.images))
        index = None if self.index is None else self.index[rows]
        return Batch(self.images[rows], self.labels[rows], self.epoch, index, taught)


class Outputs(NamedTuple):
    """One network's outputs: class logits (rows, N), auxiliary logits, each (rows, N * M), and its features."""

    logits: Tensor
    aux_logits: list[Tensor] = []
    features: list[Tensor] = []  # of the stages, each (rows, C, H, W)
    embedding: Tensor | None = None  # (rows, D): what the classifier sees

    def rows(self, rows: slice, images: int) -> "Outputs":
        """Return the logits of the images in `rows`, all views included; the outputs are for `images` images."""
        views = len(self.logits) // images
        rows = slice(rows.start * views, rows.stop * views)
        return Outputs(self.logits[rows], [aux[rows] for aux in self.aux_logits])


@dataclass
class Constant:
    """A constant of a method: a class attribute that becomes a keyword argument and a flag of the command line.

    `family` holds other defaults by network: the key is a prefix of the teacher's name, `imagenet` for ImageNet data
    or networks, or `teacher->student`; the longest matching key wins.
    """

    default: Any
    help: str
    kind: Callable[[str], Any] = options.not_negative
    flag: str = ""  # by default the attribute's name
    family: dict[str, Any] = field(default_factory=dict)
    pair: bool = False  # two numbers, the lower one first

    def __set_name__(self, owner: type, name: str) -> None:
        self.flag = self.flag or f"--{name.replace('_', '-')}"

    @property
    def dest(self) -> str:
        """The attribute of parsed arguments that holds it."""
        return self.flag.lstrip("-").replace("-", "_")

    def default_for(self, teacher: str | None, student: str | None = None, imagenet: bool = False) -> Any:
        """Return the default for a teacher and a student, by the names of their architectures, or for ImageNet."""
        fitting = [key for key in self.family if _fits(key, teacher, student) or (imagenet and key == "imagenet")]
        return self.family[max(fitting, key=len)] if fitting else self.default


STANDARDIZE = Constant(False, "standardize both networks' logits before the temperature (CVPR 2024)", kind=bool)


def _fits(key: str, teacher: str | None, student: str | None) -> bool:
    """Return whether the networks are of the families that a key names: of a teacher's, or of a teacher->student's."""
    teachers, arrow, students = key.partition("->")
    return _of_family(teachers, teacher) and (not arrow or _of_family(students, student))


def _of_family(beginning: str, arch: str | None) -> bool:
    if not isinstance(arch, str):
        return False
    try:
        return models.is_imagenet(arch) if beginning == "imagenet" else models.backbone_name(arch).startswith(beginning)
    except ValueError:  # a network of the user's own, with a name of its own
        return False


def split_outputs(outputs: Any) -> Outputs:
    """Return one network's outputs, a tensor of logits or (logits, [aux logits]), as `Outputs`."""
    return Outputs(outputs) if torch.is_tensor(outputs) else Outputs(outputs[0], list(outputs[1]))


def paired(first: list[Tensor], second: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pair the tensors of two networks' stages, shallow to deep; if one has more, only its deepest ones are used."""
    count = min(len(first), len(second))
    return list(zip(first[len(first) - count :], second[len(second) - count :], strict=True))


def rotations_of(model: nn.Module) -> int:
    """Return the number of rotations that a network's auxiliary heads predict."""
    return getattr(unwrap(model), "rotations", 4)


def check_heads(outputs: Outputs) -> None:
    """Raise ValueError unless there are auxiliary heads, without which a sum over them would be 0."""
    if not outputs.aux_logits:
        raise ValueError("the network has no auxiliary heads: this objective needs a *_aux network")


def ramp(epoch: int | Tensor, warmup_epochs: float) -> float | Tensor:
    """Return the linear warm-up weight min(epoch / warmup_epochs, 1), and 1 without warm-up."""
    if warmup_epochs <= 0:
        return 1.0
    share = epoch / warmup_epochs
    return share.clamp(max=1.0) if torch.is_tensor(share) else min(share, 1.0)


def gather_rows(tensor: Tensor) -> Tensor:
    """Return the rows of all processes' `tensor`, of one shape in each, joined in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:  # CUDA graphs of one process hold no collective
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


class Objective:
    """What a training step minimises: named scalar terms whose sum is the loss.

    A method is a subclass in a file of its own. It sets the attributes below and its `Constant`s, and writes `step`.
    It is not an nn.Module, so `model.train()` and the optimizer never reach the teacher.
    """

    name: str  # as --method and `methods.find` know it
    networks = "plain"  # what it trains: "plain", "auxiliary" or "pair"
    rotations = 4  # views that its auxiliary networks' heads tell apart
    reads: str | None = None  # of the teacher: "logits", "heads" (+ logits, all views), "features" (+ logits)
    needs_index = False  # whether a batch must number its images
    whole_batches = False  # whether its terms are of whole batches, which --accumulate would split
    imagenet_batch = 256  # images of a step on ImageNet, as published

    def __init__(
        self,
        teacher: nn.Module | None = None,
        *,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        **constants: Any,
    ):
        """Take the teacher and the constants, by default those of the teacher's family.

        `class_weights` (N,) and `label_smoothing` shape the cross-entropy of class logits; see `cross_entropy`.
        """
        self.class_weights, self.label_smoothing = class_weights, label_smoothing
        if self.reads is not None and teacher is None:
            raise TypeError(f"{type(self).__name__} needs a teacher")
        self.teacher = teacher
        self.state: dict[str, Tensor] = {}  # running state, saved and resumed
        self.trained = nn.ModuleDict()  # trainable parts of its own, such as a projector; they join the optimizer
        for name, constant in self.constants().items():
            arch = getattr(unwrap(teacher), "arch", None)
            setattr(self, name, constants.pop(name) if name in constants else constant.default_for(arch))
        if constants:
            raise TypeError(f"{type(self).__name__} has no constant {', '.join(constants)}")
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)

    @classmethod
    def constants(cls) -> dict[str, Constant]:
        """Return name -> Constant, in the order in which they are written."""
        found = {}
        for base in reversed(cls.__mro__):
            found = {name: value for name, value in found.items() if name not in vars(base)}  # a plain value fixes it
            found.update({name: value for name, value in vars(base).items() if isinstance(value, Constant)})
        return found

    def fresh(self) -> "Objective":
        """Return a copy with a state and trained parts of its own, and the same teacher."""
        found = copy.copy(self)
        found.state = {name: value.clone() for name, value in self.state.items()}
        found.trained = copy.deepcopy(self.trained)
        return found

    def adapt(self, model: nn.Module) -> None:
        """Change the network that is to be trained, such as which parts are; called once, before `prepare`."""

    def prepare(self, model: nn.Module, images: Tensor, num_images: int = 0) -> None:
        """Build what depends on the networks' shapes; called once before training, with a few `images` (B, C, H, W).

        `num_images` is the number of the training images, 0 if it is not known.
        """

    def step(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Outputs]]:
        """Return the terms of a batch, and of each trained network its outputs, the logits of un-rotated rows alone."""
        raise NotImplementedError

    def best_by(self, model: nn.Module) -> str:
        """Return what the best epoch is chosen by: "top1", the backbone's, or "joint", that of the best head."""
        return "top1"

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        epoch: int | Tensor = 0,
        index: Tensor | None = None,
        teacher_outputs: Outputs | None = None,
    ) -> dict[str, Tensor]:
        """Return the terms of un-rotated images (B, C, H, W) with labels (B,); see `Batch`."""
        return self.step(model, Batch(images, labels, epoch, index, teacher_outputs))[0]

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of class logits (B, N) and labels (B,), by this objective's weights and smoothing.

        Joint logits of class and rotation have neither.
        """
        return cross_entropy(logits, labels, self.class_weights, self.label_smoothing)

    def teach(self, batch: Batch) -> Outputs:
        """Return the teacher's outputs for a batch; call it first, while no activations are held."""
        return self.read_teacher(batch.images) if batch.teacher_outputs is None else batch.teacher_outputs

    def read_teacher(self, images: Tensor) -> Outputs:
        """Return what the method reads of the teacher, without gradient."""
        with torch.no_grad():  # not inference_mode, whose tensors torch.compile handles badly
            return self.read(self.teacher, images)

    def read(self, network: nn.Module, images: Tensor) -> Outputs:
        """Return what the method reads of a network, for un-rotated images; of heads the outputs of all views."""
        if self.reads == "features":
            return with_features(network, images)
        if self.reads == "heads":
            return split_outputs(network(rotate(images, rotations_of(network))))
        return Outputs(split_outputs(network(images)).logits)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the running state and of the trained parts; empty for an objective without any."""
        trained = {f"trained.{name}": value for name, value in self.trained.state_dict().items()}
        return {name: value.detach().clone() for name, value in {**self.state, **trained}.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy what `state_dict` gave into the present state; KeyError if a part is missing."""
        for name, value in self.state.items():
            value.copy_(state[name])
        self.trained.load_state_dict({name: state[f"trained.{name}"] for name in self.trained.state_dict()})

    def to(self, device: torch.device) -> "Objective":
        """Move the teacher, the running state and the trained parts to the device; return self."""
        self.state = {name: value.to(device) for name, value in self.state.items()}
        self.trained.to(device)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(device)
        if isinstance(self.teacher, nn.Module):
            self.teacher.to(device)
        return self


class Imitation(Objective):
    """Cross-entropy, and terms that match the teacher's outputs on the same un-rotated images.

    A subclass says in `reads` what is compared, and writes `imitation`.
    """

    ce_weight: float = 1.0

    def step(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], list[Outputs]]:
        """Return the terms of a batch, and the student's outputs."""
        teacher = self.teach(batch)
        student = self.read(model, batch.images)
        terms = self.imitation(student, teacher, batch)
        task = self.ce_weight * self.cross_entropy(student.logits, batch.labels)
        return {"task": task, **terms}, [Outputs(student.logits)]

    def imitation(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of the outputs of student and teacher."""
        raise NotImplementedError


def with_features(model: nn.Module, images: Tensor) -> Outputs:
    """Return a network's class logits, its stages' features, shallow to deep, and its embedding; see `Outputs`."""
    model = unwrap(model)
    stages = model.stages if isinstance(model, Adapted) else functools.partial(models.stage_features, model)
    features, embedding, logits = stages(images)
    return Outputs(logits, features=features, embedding=embedding)
