"""Accuracies counted by hand, and the choice of the precision they are computed in."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import models
from methods import Outputs
from training import metrics, precision

CPU = torch.device("cpu")

# Two images of two classes in four rotations: rows 0 to 3 are the first's, class 1, so joint 4 to 7; rows 4 to 7 the
# second's, class 0, so joint 0 to 3.
LABELS = torch.tensor([1, 0])


def two_heads():
    """Return the logits of two heads, with 5 and 7 of the 8 joint labels right, and 6 and 5 of the classes."""
    columns = [[4, 5, 0, 7, 2, 1, 6, 3], [4, 5, 6, 7, 5, 1, 2, 3]]  # in the first, row 4 has the wrong rotation
    first, second = nn.functional.one_hot(torch.tensor(columns), 8).float()
    second[0, :5] = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0])  # the right joint label, but class 0 has the larger sum
    return [first, second]


HEADS = {"aux1_joint": 5 / 4, "aux1_class": 6 / 4, "aux2_joint": 7 / 4, "aux2_class": 6 / 4}


def test_training_sums_by_hand():
    """Sums over the images of the losses and of the percentages, with a prefix for each network of a pair.

    A head's hit counts a fourth for each view.
    """
    right, wrong = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    terms = {"task": torch.tensor(0.5), "aux": torch.tensor(1.5)}
    heads, expected = {name: 100 * value for name, value in HEADS.items()}, {"loss": 4, "task": 1, "aux": 3}
    found = metrics.training_sums(terms, [Outputs(right, two_heads())], LABELS)
    assert found == {**expected, "top1": 200, **heads}
    found = metrics.training_sums(terms, [Outputs(wrong), Outputs(right, two_heads())], LABELS)
    heads = {f"net2/{name}": value for name, value in heads.items()}
    assert found == {**expected, "net1/top1": 0, "net2/top1": 200, **heads}


class Lookup(nn.Module):
    """A network whose outputs are listed: rows by an image's number and then by how often it has been turned."""

    def __init__(self, logits, aux_logits=(), rotations=1):
        super().__init__()
        self.logits, self.aux_logits, self.turns = logits, aux_logits, rotations
        self.rotations, self.num_classes = rotations, logits.shape[1]

    def forward(self, images):
        # The number is in the upper left corner of 2 x 2 pixels; quarter turns take it along the others.
        number, corner = images[:, 0].flatten(1).max(1)
        rows = (number.long() - 1) * self.turns + torch.tensor([0, 3, 1, 2])[corner] % self.turns
        return (self.logits[rows], [aux[rows] for aux in self.aux_logits]) if self.aux_logits else self.logits[rows]


def batches_of(labels, size):
    """Return test batches of `size` images, numbered from 1, with `labels`."""
    images = torch.zeros(len(labels), 3, 2, 2)
    images[:, :, 0, 0] = torch.arange(1.0, len(labels) + 1)[:, None]
    return list(zip(images.split(size), labels.split(size), strict=True))


# The labels 0, 1 and 2 are first, fifth and sixth.
RANKED = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [7, 3, 6, 5, 4, 2, 1], [7, 6, 2, 5, 4, 3, 1]])


def test_evaluation_by_hand():
    """Batches of two images and of one: every image counts the same, and in `mean_class` every class that has any."""
    found = metrics.evaluate(Lookup(RANKED), batches_of(torch.arange(3), 2), CPU)
    powers = np.exp(RANKED.double().numpy())
    loss = -np.log(powers[range(3), range(3)] / powers.sum(1)).mean()
    assert found == pytest.approx({"loss": loss, "top1": 100 / 3, "top5": 200 / 3, "mean_class": 100 / 3})
    found = metrics.evaluate(Lookup(RANKED[:, 1:4]), batches_of(torch.tensor([2, 2, 1]), 2), CPU)
    expected = {"top1": 100 / 3, "top5": 100, "mean_class": 25}  # of three classes, all are among the first five
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_evaluation_of_heads_by_hand():
    """The backbone is judged by un-rotated views: in rows 0 and 4 one of two is right, in others all or none."""
    for turned in (LABELS, 1 - LABELS):
        logits = nn.functional.one_hot(turned.repeat_interleave(4), 2).float()
        logits[0], logits[4] = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
        network, batches = Lookup(logits, two_heads(), 4), batches_of(LABELS, 1)
        heads = {name: 50 * value for name, value in HEADS.items()} | {"aux1_upright": 100.0, "aux2_upright": 0.0}
        loss = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
        expected = {"loss": loss, "top1": 50.0, "top5": 100.0, "mean_class": 50.0}
        assert metrics.evaluate(network, batches, CPU) == pytest.approx(expected)
        assert metrics.evaluate(network, batches, CPU, heads=True) == pytest.approx(expected | heads)
        del network.rotations  # a user's network with heads of the same form
        assert metrics.evaluate(network, batches, CPU, heads=True) == pytest.approx(expected | heads)


def test_evaluation_of_a_pair_takes_the_better_network():
    """Its accuracies are the pair's; of two equal networks the first is taken; another one can be asked for."""
    better = RANKED.clone()
    better[1, 1], better[2, 2] = 8.0, 5.5  # label 1 is first, label 2 third
    for networks, net, top1, top5 in (((RANKED, better), 2, 200 / 3, 100), ((RANKED, RANKED), 1, 100 / 3, 200 / 3)):
        pair = models.MutualPair(*map(Lookup, networks))
        found, other = (metrics.evaluate(pair, batches_of(torch.arange(3), 2), CPU, net=n) for n in (None, 3 - net))
        assert (found["net"], found["top1"], found["top5"]) == pytest.approx((net, top1, top5))
        assert (other["net"], other["top1"]) == pytest.approx((3 - net, 100 / 3))
        assert found[f"net{3 - net}/top1"] == other["top1"] and other[f"net{net}/top1"] == found["top1"]


def test_totals_are_means_over_images():
    """Not over batches; saved sums are continued in the one process that carries them for all."""
    totals = metrics.Totals(CPU)
    totals.add({"loss": torch.tensor(2.0), "top1": torch.tensor(100)}, 1)
    totals.add({"loss": torch.tensor(4.0), "top1": torch.tensor(200)}, 3)
    assert totals.means() == {"loss": 1.5, "top1": 75.0}
    for is_main, expected in ((True, {"loss": 2.0, "top1": 60.0}), (False, {"loss": 4.0, "top1": 0.0})):
        resumed = metrics.Totals(CPU)
        resumed.load_state_dict(totals.state_dict(), is_main)
        resumed.add({"loss": torch.tensor(4.0), "top1": torch.tensor(0)}, 1)
        assert resumed.means() == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_auto_follows_the_capability_of_the_gpu_in_use(capability, expected, monkeypatch):
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {device: capability}.__getitem__)
    assert precision.resolve_precision("auto", device) == expected


@pytest.mark.parametrize("found", [{"avx512_bf16": False}, {"avx512_bf16": False, "amx_bf16": True}, {}])
def test_auto_on_a_cpu_asks_for_its_instructions(found, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    expected = torch.bfloat16 if found.get("amx_bf16") else torch.float32
    assert precision.resolve_precision("auto", CPU) == expected
