"""What is measured: sums that stay on the device, accuracies of every classifier, evaluation, an epoch's line."""

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import joint_labels, rotate
from methods import Outputs
from methods.base import rotations_of, split_outputs
from models import MutualPair, backbone_of, state_dicts
from training.distributed import sum_over_ranks
from training.precision import autocast
from utils import unwrap


class Totals:
    """Named sums over images, kept on the device until they are read."""

    def __init__(self, device: torch.device):
        self.names: list[str] = []
        self.sums: Tensor | None = None
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
        self.count = torch.zeros((), dtype=dtype, device=device)

    def add(self, sums: dict[str, Tensor], count: int) -> None:
        """Add a batch's `sums` (name -> scalar tensor) over `count` images, without a host sync."""
        values = torch.stack([value.to(self.count) for value in sums.values()])
        if self.sums is None:
            self.names, self.sums = list(sums), torch.zeros_like(values)
        self.sums += values
        self.count += count

    def means(self, over_ranks: bool = True) -> dict[str, float]:
        """Return name -> mean over the images of all ranks (or of this one)."""
        if self.sums is None:
            return {}
        both = torch.cat([self.sums, self.count.view(1)])
        *sums, count = (sum_over_ranks(both) if over_ranks else both).tolist()
        return {name: value / count for name, value in zip(self.names, sums, strict=True)}

    def shown(self) -> dict[str, float]:
        """Return the loss and the accuracies of this rank's images so far."""
        means = self.means(over_ranks=False)
        return {name: value for name, value in means.items() if name == "loss" or name.endswith("top1")}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums over all ranks."""
        if self.sums is None:
            return {}
        return {"names": self.names, "sums": sum_over_ranks(self.sums), "count": sum_over_ranks(self.count)}

    def load_state_dict(self, state: dict[str, Any], is_main: bool) -> None:
        """Continue from saved sums, which one rank carries for all."""
        if state:
            keep = 1.0 if is_main else 0.0
            self.names = list(state["names"])
            self.sums = state["sums"].to(self.count) * keep
            self.count = state["count"].to(self.count) * keep


def is_finite(model: nn.Module, totals: Totals) -> bool:
    """Return whether the weights, and the mean loss in `totals`, are finite."""
    values = [state_dicts.finite_or_mask(value) for value in model.state_dict().values() if value.is_floating_point()]
    # The scaler of float16 skips steps that are not finite: there the loss shows it.
    return math.isfinite(totals.means()["loss"]) and bool(torch.stack(values).all())


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many rows of `logits` (B, C) have their maximum at `labels` (B,)."""
    return (logits.argmax(1) == labels).sum()


def class_logits(aux_logits: Tensor, rotations: int) -> Tensor:
    """Return class logits (B, N) of joint logits (B, N*M): the sum over each class's M rotations (HSAKD's code)."""
    return aux_logits.float().unflatten(1, (-1, rotations)).sum(2)


def head_hits(aux_logits: list[Tensor], labels: Tensor, rotations: int, upright: bool = False) -> dict[str, Tensor]:
    """Return name -> correct predictions of each auxiliary head, as shares of each image's views.

    `joint` and `class` are over all M*B views, as published; with `upright` the class on the B un-rotated ones too.
    """
    found = {}
    joint, repeated = joint_labels(labels, rotations), labels.repeat_interleave(rotations)
    for number, logits in enumerate(aux_logits, 1):
        by_class = class_logits(logits, rotations)
        found[f"aux{number}_joint"] = hits(logits, joint) / rotations
        found[f"aux{number}_class"] = hits(by_class, repeated) / rotations
        if upright:
            found[f"aux{number}_upright"] = hits(by_class[::rotations], labels)
    return found


@torch.no_grad()
def training_sums(terms: dict[str, Tensor], trained: list[Outputs], labels: Tensor) -> dict[str, Tensor]:
    """Return name -> sum over the batch of each loss term (and `loss`) and of each classifier's hits, in percent.

    `trained` are the outputs of each trained network, the class logits of un-rotated rows alone.
    """
    count = len(labels)
    labels = labels.argmax(1) if labels.ndim == 2 else labels  # probabilities, as of MixUp
    sums = {"loss": sum(terms.values()).detach() * count}
    sums.update({name: value.detach() * count for name, value in terms.items()})
    for number, (logits, aux_logits, *_) in enumerate(trained, 1):
        prefix = f"net{number}/" if len(trained) > 1 else ""
        sums[f"{prefix}top1"] = 100 * hits(logits, labels)
        if aux_logits:
            rotations = len(aux_logits[0]) // count
            heads = head_hits(aux_logits, labels, rotations)
            sums.update({f"{prefix}{name}": 100 * value for name, value in heads.items()})
    return sums


def networks(model: nn.Module) -> dict[str, nn.Module]:
    """Return prefix -> network: the two of a mutual pair, or the one there is."""
    model = unwrap(model)
    return {"net1/": model.net1, "net2/": model.net2} if isinstance(model, MutualPair) else {"": model}


def test_logits(network: nn.Module, images: Tensor, heads: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the class logits (B, N) of images (B, C, H, W), and with `heads` the auxiliary logits of all views."""
    if not heads or not hasattr(network, "rotations"):
        outputs = split_outputs(backbone_of(network)(images))
        if not heads or not outputs.aux_logits:
            return outputs.logits.float(), []
    views = rotations_of(network)
    outputs = split_outputs(network(rotate(images, views)))
    return outputs.logits[::views].float(), outputs.aux_logits


def test_sums(network: nn.Module, images: Tensor, labels: Tensor, heads: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Return name -> sum over a batch of losses and hits in percent, and each class's (hits, images) as (2, N)."""
    logits, aux_logits = test_logits(network, images, heads)
    found = head_hits(aux_logits, labels, rotations_of(network), upright=True) if aux_logits else {}
    top5 = logits.topk(min(5, logits.shape[1])).indices
    found["top1"] = hits(logits, labels)
    found["top5"] = (top5 == labels.unsqueeze(1)).any(1).sum()
    by_class = torch.zeros(2, logits.shape[1], dtype=torch.float32, device=labels.device)
    right = (logits.argmax(1) == labels).to(by_class)
    by_class.index_add_(1, labels, torch.stack([right, torch.ones_like(right)]))
    sums = {"loss": F.cross_entropy(logits, labels, reduction="sum"), **{k: 100 * v for k, v in found.items()}}
    return sums, by_class


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    heads: bool = False,
    net: int | None = None,
) -> dict[str, float]:
    """Return name -> mean over the test images, each counted once: loss, top1, top5 and head accuracies, in percent.

    `mean_class` is the mean of the classes' accuracies. Of a mutual pair every name has a prefix `net1/` or `net2/`,
    and `top1`, `top5`, `mean_class` and `net` are those of the network `net`, by default the better one.
    """
    totals, by_class = Totals(device), {}
    found = networks(model)
    modes = {network: network.training for network in found.values()}
    for network in modes:
        network.eval()
    # Heads see every view of an image: in so many parts a batch takes no more memory than without them.
    parts = max(getattr(network, "rotations", 1) for network in modes) if heads else 1
    for batch in batches:
        for images, labels in zip(*(whole.to(device).chunk(parts) for whole in batch[:2]), strict=True):
            labels = labels.long()
            with autocast(device, dtype):
                sums = {}
                for prefix, network in found.items():
                    more, counts = test_sums(network, images, labels, heads)
                    sums.update({prefix + name: value for name, value in more.items()})
                    by_class[prefix] = by_class.get(prefix, 0) + counts
            totals.add(sums, len(labels))
    for network, training in modes.items():
        network.train(training)
    means = totals.means()
    for prefix, counts in by_class.items():
        right, images = sum_over_ranks(counts)
        means[f"{prefix}mean_class"] = 100 * (right / images)[images > 0].mean().item()
    if len(found) > 1:
        means["net"] = net or (1 if means["net1/top1"] >= means["net2/top1"] else 2)
        for name in ("top1", "top5", "mean_class"):
            means[name] = means[f"net{means['net']}/{name}"]
    return means


@torch.no_grad()
def confusion(network: nn.Module, batches: Iterable, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the confusion matrix (N, N) int64 of a network's backbone: images of a row's class in a column's class."""
    matrix = 0
    for images, labels, *_ in batches:
        with autocast(device, dtype):
            logits, _ = test_logits(network, images.to(device), heads=False)
        cells = labels.to(device) * logits.shape[1] + logits.argmax(1)
        matrix = matrix + cells.bincount(minlength=logits.shape[1] ** 2).view(logits.shape[1], -1)
    return sum_over_ranks(matrix)


def by_class(matrix: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """Return, of each class, its images, its accuracy in percent and the class that it is most often taken for."""
    found = []
    for number, (name, row) in enumerate(zip(names, matrix.tolist(), strict=True)):
        images, wrong = sum(row), [0 if other == number else count for other, count in enumerate(row)]
        entry = {"name": name, "images": images, "top1": 100 * row[number] / images if images else None}
        taken = names[wrong.index(max(wrong))] if any(wrong) else None
        found.append({**entry, "taken_for": taken, "times": max(wrong)})
    return found


def table_of(classes: list[dict[str, Any]]) -> Iterator[str]:
    """Return the lines of a table of `by_class`."""
    width = max(len(entry["name"]) for entry in classes)
    yield f"{'class':{width}}  images   top-1  most often taken for"
    for entry in classes:
        top1 = "-" if entry["top1"] is None else f"{entry['top1']:.2f}"
        taken = f"{entry['taken_for']} ({entry['times']})" if entry["times"] else ""
        yield f"{entry['name']:{width}}  {entry['images']:6}  {top1:>6}  {taken}".rstrip()


def peak_memory(device: torch.device) -> float:
    """Return the most memory, in MiB, that this process has taken: on its GPU, or of the machine if it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20  # CUDA graphs' memory counts as reserved alone
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def summary(record: dict[str, Any], epochs: int) -> str:
    """Return an epoch's line: loss, accuracies, speed and time left."""
    left = int((epochs - record["epoch"]) * record["seconds"])
    rate = record["images_per_second"]
    speed = f"{rate:.{0 if rate > 10 else 1}f} images/s, " if rate else ""
    accuracies = ", ".join(f"{k} {v:.2f}" for k, v in record.items() if k.endswith("top1"))
    return (
        f"epoch {record['epoch']}/{epochs}: loss {record['train/loss']:.4f}, {accuracies}, "
        f"{speed}{record['peak_memory_mib']:.0f} MiB, "
        f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )


def best_line(best: dict[str, Any], rule: str, held_out: bool, last: float) -> str:
    """Return a run's last line: its best epoch and how that was chosen, beside its last epoch."""
    rule = {"top1": "top-1", "joint": "joint accuracy of the best head"}[rule]
    images = "held-out training images" if held_out else "the test set"
    at = f"epoch {best['epoch']}" + (f" of network {best['net']}" if best["net"] else "")
    chosen = f"selected by {rule} on {images}, {best['value']:.2f} there"
    return f"best: top-1 {best['top1']:.2f} at {at} ({chosen}); last: {last:.2f}"
