"""What networks answer on the test images, and figures of it: pure functions of their class logits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import joint_labels, rotate
from methods.base import split_outputs, with_features
from training.metrics import class_logits

BINS = 15


@dataclass
class Answers:
    """One network's answers on n test images of N classes."""

    name: str
    logits: Tensor  # (n, N), of upright images
    by_rotation: dict[str, list[float]]  # of each classifier: accuracy in percent by quarter turns of the input
    log: list[dict] = field(default_factory=list)  # of its epochs
    embeddings: Tensor | None = None  # (n, D)

    @property
    def classes(self) -> Tensor:
        """The answers (n,)."""
        return self.logits.argmax(1)

    def hits(self, labels: Tensor) -> Tensor:
        """Return (n,) bool, whether the answers are right."""
        return self.classes == labels


@torch.no_grad()
def ask(
    name: str, network: nn.Module, batches: Iterable, device: torch.device, embed: bool = False
) -> tuple[Answers, Tensor]:
    """Return a network's answers on all test images, if asked for with their embeddings, and the labels (n,)."""
    logits, embeddings, labels, right = [], [], [], {}
    for images, targets in batches:
        images, targets = images.to(device).contiguous(), targets.to(device)
        outputs, repeated = split_outputs(network(rotate(images))), targets.repeat_interleave(4)
        hits = {"classes": outputs.logits.argmax(1) == repeated}
        for number, aux in enumerate(outputs.aux_logits, 1):
            hits[f"head {number}, class"] = class_logits(aux, network.rotations).argmax(1) == repeated
            if network.rotations == 4:
                hits[f"head {number}, class and rotation"] = aux.argmax(1) == joint_labels(targets)
        for key, found in hits.items():
            right.setdefault(key, []).append(found.view(-1, 4).cpu())
        logits.append(outputs.logits[::4].float().cpu())
        embeddings += [with_features(network, images).embedding.float().cpu()] if embed else []
        labels.append(targets.cpu())
    shares = {key: (100 * torch.cat(found).double().mean(0)).tolist() for key, found in right.items()}
    embedded = torch.cat(embeddings) if embed else None
    return Answers(name, torch.cat(logits), shares, embeddings=embedded), torch.cat(labels)


def reliability(answers: Answers, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return each bin's mean confidence, accuracy and share of images (15,), and the expected calibration error.

    The confidence is the probability of the answer; the bins are of equal width (Guo et al., ICML 2017).
    """
    confidence = answers.logits.softmax(1).amax(1).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    count = bins.bincount(minlength=BINS)
    means = [bins.bincount(values, BINS) / count.clamp(min=1) for values in (confidence, answers.hits(labels).double())]
    share = count / len(labels)
    return *means, share, (share * (means[0] - means[1]).abs()).sum().item()


def agreement(student: Answers, teacher: Answers, labels: Tensor) -> dict[str, float]:
    """Return the shares, in percent, of images that both, one or none of two networks answer rightly."""
    ours, theirs = student.hits(labels), teacher.hits(labels)
    same = student.classes == teacher.classes
    found = {
        "both right": ours & theirs,
        "student alone right": ours & ~theirs,
        "teacher alone right": ~ours & theirs,
        "same mistake": ~ours & same,
        "different mistakes": ~ours & ~theirs & ~same,
    }
    return {name: 100 * share.double().mean().item() for name, share in found.items()}


def confusion(answers: Answers, labels: Tensor) -> Tensor:
    """Return the confusion matrix (N, N): images of a row's class that are taken for a column's."""
    count = answers.logits.shape[1]
    return (labels * count + answers.classes).bincount(minlength=count**2).view(count, count)


def divergence(first: Answers, second: Answers) -> Tensor:
    """Return the Jensen-Shannon divergence (n,) of two networks' class probabilities, in bits: from 0 to 1."""
    logs = [answers.logits.double().log_softmax(1) for answers in (first, second)]
    middle = torch.logaddexp(*logs) - math.log(2)
    each = [F.kl_div(middle, log, reduction="none", log_target=True).sum(1) for log in logs]
    return (sum(each) / 2 / math.log(2)).clamp(0, 1)


def overview(answers: Answers, teacher: Answers, labels: Tensor) -> dict[str, float]:
    """Return a network's main figures: in percent, but for the loss in nats and the mean divergence in bits."""
    top5 = answers.logits.topk(min(5, answers.logits.shape[1])).indices
    return {
        "top-1": 100 * answers.hits(labels).double().mean().item(),
        "top-5": 100 * (top5 == labels[:, None]).any(1).double().mean().item(),
        "loss": F.cross_entropy(answers.logits, labels).item(),
        "ECE": 100 * reliability(answers, labels)[3],
        "agreement": 100 * (answers.classes == teacher.classes).double().mean().item(),
        "divergence": divergence(answers, teacher).mean().item(),
    }
