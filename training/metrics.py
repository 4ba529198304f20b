"""What is measured: sums that stay on the device, accuracies of every classifier, evaluation, cost, an epoch's line."""

import resource
import sys

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distributed import gather_objects, sum_over_ranks
from losses import joint_labels, rotate
from objective import unwrap
from precision import autocast


class Totals:
    """Named sums over images, kept on the device until they are read."""

    def __init__(self, device):
        self.names = []
        self.sums = None
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, sums, count):
        """Add a batch's `sums` (name -> scalar tensor) over `count` images, without a host sync."""
        values = torch.stack([value.double() for value in sums.values()])
        if self.sums is None:
            self.names, self.sums = list(sums), torch.zeros_like(values)
        self.sums += values
        self.count += count

    def means(self, over_ranks=True):
        """Return name -> mean over the images of all ranks (or of this one)."""
        # A rank may have seen no image, where all of its share are unreadable.
        names = max(gather_objects(self.names), key=len) if over_ranks else self.names
        if not names:
            return {}
        both = torch.cat([self.count.new_zeros(len(names)) if self.sums is None else self.sums, self.count.view(1)])
        *sums, count = (sum_over_ranks(both) if over_ranks else both).tolist()
        return {name: value / max(count, 1) for name, value in zip(names, sums, strict=True)}

    def state_dict(self):
        """Return the sums over all ranks."""
        if self.sums is None:
            return {}
        return {"names": self.names, "sums": sum_over_ranks(self.sums), "count": sum_over_ranks(self.count)}

    def load_state_dict(self, state, is_main):
        """Go on from saved sums, which one rank carries for all."""
        if state:
            keep = 1.0 if is_main else 0.0
            self.names = list(state["names"])
            self.sums = state["sums"].to(self.count) * keep
            self.count = state["count"].to(self.count) * keep


def hits(logits, labels):
    """Return how many rows of `logits` (B, C) have their maximum at `labels` (B,)."""
    return (logits.argmax(1) == labels).sum()


def class_logits(aux_logits, rotations):
    """Return class logits (B, N) of joint logits (B, N*M): the sum over each class's M rotations (HSAKD's released code)."""
    return aux_logits.float().unflatten(1, (-1, rotations)).sum(2)


def head_hits(aux_logits, labels, rotations):
    """Return name -> hits of every auxiliary head: joint over all M*B views, class over the B un-rotated ones."""
    found = {}
    joint = joint_labels(labels, rotations)
    for number, logits in enumerate(aux_logits, 1):
        found[f"aux{number}_joint"] = hits(logits, joint) / rotations
        found[f"aux{number}_class"] = hits(class_logits(logits[::rotations], rotations), labels)
    return found


def training_sums(terms, predictions, labels):
    """Return name -> sum over the batch of each loss term (and `loss`) and of each classifier's hits."""
    count = len(labels)
    sums = {"loss": sum(terms.values()).detach() * count}
    sums.update({name: value.detach() * count for name, value in terms.items()})
    several = len(predictions.logits) > 1
    for number, (logits, aux_logits) in enumerate(zip(predictions.logits, predictions.aux_logits, strict=True), 1):
        prefix = f"net{number}/" if several else ""
        sums[f"{prefix}top1"] = 100 * hits(logits, labels)
        if aux_logits:
            rotations = len(aux_logits[0]) // count
            heads = head_hits(aux_logits, labels, rotations)
            sums.update({f"{prefix}{name}": 100 * value for name, value in heads.items()})
    return sums


def networks(model):
    """Return prefix -> network: the two of a mutual pair, or the one there is."""
    model = unwrap(model)
    return {"net1/": model.net1, "net2/": model.net2} if hasattr(model, "net1") else {"": model}


def test_sums(network, images, labels, heads):
    """Return name -> sum over a batch of the backbone's loss and hits, and with `heads` of every auxiliary head's."""
    found = {}
    if heads and hasattr(network, "auxiliary_classifier"):
        logits, aux_logits = network(rotate(images, network.rotations))
        logits = logits[:: network.rotations].float()
        found = head_hits(aux_logits, labels, network.rotations)
    else:
        logits = getattr(network, "backbone", network)(images).float()
    top5 = logits.topk(min(5, logits.shape[1])).indices
    found["top1"] = hits(logits, labels)
    found["top5"] = (top5 == labels.unsqueeze(1)).any(1).sum()
    return {"loss": F.cross_entropy(logits, labels, reduction="sum"), **{k: 100 * v for k, v in found.items()}}


@torch.no_grad()
def evaluate(model, batches, device, dtype=torch.float32, heads=False, net=None):
    """Return name -> mean over the test images, each counted once: loss, top1, top5 and head accuracies, in percent.

    Of a mutual pair every name has a prefix `net1/` or `net2/`, and `top1`, `top5` and `net` are those of the network `net`,
    by default the better one.
    """
    totals = Totals(device)
    found = networks(model)
    modes = {network: network.training for network in found.values()}
    for network in modes:
        network.eval()
    # Heads see every view of an image: in so many parts a batch takes no more memory than without them.
    parts = max(getattr(network, "rotations", 1) for network in modes) if heads else 1
    for batch in batches:
        for images, labels in zip(*(whole.chunk(parts) for whole in batch), strict=True):
            with autocast(device, dtype):
                sums = {}
                for prefix, network in found.items():
                    sums.update({prefix + k: v for k, v in test_sums(network, images, labels, heads).items()})
            totals.add(sums, len(labels))
    for network, training in modes.items():
        network.train(training)
    means = totals.means()
    if len(found) > 1:
        means["net"] = net or (1 if means["net1/top1"] >= means["net2/top1"] else 2)
        means["top1"] = means[f"net{means['net']}/top1"]
        means["top5"] = means[f"net{means['net']}/top5"]
    return means


def multiply_adds(network, size):
    """Return the multiply-adds of one forward pass of an image of `size` pixels a side."""
    image = torch.zeros(1, 3, size, size, device=next(network.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops() // 2


def cost(network, size):
    """Return name -> parameters and multiply-adds, of the backbone and with the auxiliary classifiers."""
    parts = {"backbone": getattr(network, "backbone", network), "with_heads": network}
    return {
        name: {"parameters": sum(p.numel() for p in part.parameters()), "multiply_adds": multiply_adds(part, size)}
        for name, part in parts.items()
    }


def peak_memory(device):
    """Return the most memory, in MiB, that this process has taken: on its GPU, or of the machine where it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20  # CUDA graphs' memory counts as reserved alone
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def summary(record, epochs):
    """Return an epoch's line: loss, accuracies, speed and time left."""
    left = int((epochs - record["epoch"]) * record["seconds"])
    speed = f"{record['images_per_second']:.0f} images/s, " if record["images_per_second"] else ""
    accuracies = ", ".join(f"{k} {v:.2f}" for k, v in record.items() if k.endswith("top1"))
    return (
        f"epoch {record['epoch']}/{epochs}: loss {record['train/loss']:.4f}, {accuracies}, "
        f"{speed}{record['peak_memory_mib']:.0f} MiB, "
        f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
    )
