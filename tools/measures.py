"""What networks answer on the test images, and figures of it: pure functions of their class logits."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import joint_labels, rotate
from models import AuxiliaryNet, backbone_of
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
    def probabilities(self) -> Tensor:
        """The softmax of the logits."""
        return self.logits.softmax(1)

    @property
    def classes(self) -> Tensor:
        """The answers (n,)."""
        return self.logits.argmax(1)

    def hits(self, labels: Tensor) -> Tensor:
        """Return (n,) bool, whether the answers are right."""
        return self.classes == labels


@torch.no_grad()
def ask(name: str, network: nn.Module, batches: Iterable, device: torch.device) -> tuple[Answers, Tensor]:
    """Return a network's answers on all test images, and their labels (n,)."""
    backbone, heads = backbone_of(network), isinstance(network, AuxiliaryNet)
    logits, embeddings, labels, right = [], [], [], {}
    for images, targets in batches:
        views, targets = rotate(images.to(device)), targets.to(device)
        taps, embedding = backbone.features(views)
        answers = backbone.head(embedding)
        count_hits(right, "classes", answers.argmax(1) == targets.repeat_interleave(4))
        aux_logits = network.auxiliary_classifier(taps) if heads else []
        for number, aux in enumerate(aux_logits, 1):
            by_class = class_logits(aux, network.rotations)
            count_hits(right, f"head {number}, class", by_class.argmax(1) == targets.repeat_interleave(4))
            if network.rotations == 4:
                count_hits(right, f"head {number}, class and rotation", aux.argmax(1) == joint_labels(targets))
        logits.append(answers[::4].float().cpu())
        embeddings.append(embedding[::4].float().cpu())
        labels.append(targets.cpu())
    labels = torch.cat(labels)
    shares = {key: (100 * hits / len(labels)).tolist() for key, hits in right.items()}
    return Answers(name, torch.cat(logits), shares, embeddings=torch.cat(embeddings)), labels


def count_hits(right: dict[str, Tensor], name: str, hits: Tensor) -> None:
    """Add hits (4 * B,), of images in the order of `rotate`, to the sums by rotation."""
    right[name] = right.get(name, 0) + hits.view(-1, 4).sum(0).double().cpu()


def reliability(answers: Answers, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return each bin's mean confidence, accuracy and share of images (15,), and the expected calibration error.

    The confidence is the probability of the answer; the bins are of equal width (Guo et al., ICML 2017).
    """
    confidence = answers.probabilities.amax(1).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    count = bins.bincount(minlength=BINS)
    means = [
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, values) / count.clamp(min=1)
        for values in (confidence, answers.hits(labels).double())
    ]
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


def by_class(answers: Answers, labels: Tensor) -> Tensor:
    """Return each class's accuracy (N,) in percent; NaN for a class without images."""
    matrix = confusion(answers, labels)
    return 100 * matrix.diagonal() / matrix.sum(1)


def confusion(answers: Answers, labels: Tensor) -> Tensor:
    """Return the confusion matrix (N, N): images of a row's class that are taken for a column's."""
    count = answers.logits.shape[1]
    return (labels * count + answers.classes).bincount(minlength=count**2).view(count, count)


def divergence(first: Answers, second: Answers) -> Tensor:
    """Return the Jensen-Shannon divergence (n,) of two networks' class probabilities, in bits: from 0 to 1."""
    logs = [answers.logits.double().log_softmax(1) for answers in (first, second)]
    middle = torch.logaddexp(*logs) - torch.log(torch.tensor(2.0))
    each = [F.kl_div(middle, log, reduction="none", log_target=True).sum(1) for log in logs]
    return (sum(each) / 2 / torch.log(torch.tensor(2.0))).clamp(0, 1)


def class_correlation(answers: Answers) -> Tensor:
    """Return the correlations (N, N) of the classes' logits over the images."""
    return torch.corrcoef(answers.logits.T.double())


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
