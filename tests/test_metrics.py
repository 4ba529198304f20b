"""Accuracies counted by hand, and the choice of the precision they are computed in."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from scripts import parsed
from torch import nn

import metrics
import precision
from objective import Predictions

CPU = torch.device("cpu")

# Two images of two classes in four rotations: rows 0 to 3 are the first's, class 1, so joint 4 to 7; rows 4 to 7 the
# second's, class 0, so joint 0 to 3.
LABELS = torch.tensor([1, 0])


def winners(*columns):
    """Return joint logits (8, 8), each row's largest at one of `columns`."""
    return nn.functional.one_hot(torch.tensor(columns), 8).float()


def two_heads():
    """Return the logits of two heads: 5 and 7 of 8 views right, and of the un-rotated ones' classes 2 and 0 of 2."""
    first = winners(4, 5, 0, 7, 2, 1, 6, 3)  # row 4 has the right class in the wrong rotation
    second = winners(4, 5, 6, 7, 5, 1, 2, 3)
    second[0, :5] = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0])  # the right joint label, but class 0 has the larger sum
    return [first, second]


def test_hits_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.0], [-3.0, -2.0, -1.0], [1.0, 0.0, 0.5]])
    assert metrics.hits(logits, torch.tensor([1, 2, 2, 0])) == 3


def test_class_logits_are_sums_over_the_rotations():
    joint = torch.tensor([[1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 7.0, 0.5], [0.0, 0.0, 0.0, 9.0, 3.0, 3.0, 3.0, 3.0]])
    assert metrics.class_logits(joint, 4).tolist() == [[10.0, 6.5], [9.0, 12.0]]
    assert metrics.class_logits(joint, 1).tolist() == joint.tolist()
    assert metrics.class_logits(joint.bfloat16(), 4).dtype == torch.float32


def test_head_hits_by_hand():
    """Joint hits count a fourth for each view; class hits look at rows 0 and 4 alone."""
    found = metrics.head_hits(two_heads(), LABELS, 4)
    assert found == {"aux1_joint": 5 / 4, "aux1_class": 2, "aux2_joint": 7 / 4, "aux2_class": 0}
    one_view = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert metrics.head_hits([one_view], LABELS, 1) == {"aux1_joint": 1, "aux1_class": 1}


def test_training_sums_by_hand():
    """Sums over the images of the losses and of the percentages, with a prefix for each network of a pair."""
    right, wrong = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    terms = {"task": torch.tensor(0.5), "aux": torch.tensor(1.5)}
    heads = {"aux1_joint": 125, "aux1_class": 200, "aux2_joint": 175, "aux2_class": 0}
    expected = {"loss": 4, "task": 1, "aux": 3}
    found = metrics.training_sums(terms, Predictions([right], [two_heads()]), LABELS)
    assert found == {**expected, "top1": 200, **heads}
    found = metrics.training_sums(terms, Predictions([wrong, right], [[], two_heads()]), LABELS)
    assert found == {**expected, "net1/top1": 0, "net2/top1": 200, **{f"net2/{name}": value for name, value in heads.items()}}


class Lookup(nn.Module):
    """A network whose outputs are listed: rows by an image's number and then by how often it has been turned."""

    def __init__(self, logits, aux_logits=(), rotations=1):
        super().__init__()
        self.logits, self.aux_logits, self.rotations = logits, aux_logits, rotations
        if aux_logits:
            self.auxiliary_classifier, self.backbone = True, Lookup(logits, (), rotations)

    def forward(self, images):
        # The number is in the upper left corner of 2 x 2 pixels; quarter turns take it along the others.
        number, corner = images[:, 0].flatten(1).max(1)
        rows = (number.long() - 1) * self.rotations + torch.tensor([0, 3, 1, 2])[corner] % self.rotations
        return (self.logits[rows], [aux[rows] for aux in self.aux_logits]) if self.aux_logits else self.logits[rows]


def batches_of(labels, size):
    """Return test batches of `size` images, numbered from 1, with `labels`."""
    images = torch.zeros(len(labels), 3, 2, 2)
    images[:, :, 0, 0] = torch.arange(1.0, len(labels) + 1)[:, None]
    return list(zip(images.split(size), labels.split(size), strict=True))


RANKED = torch.tensor(
    [
        [9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],  # label 0 is first
        [7.0, 3.0, 6.0, 5.0, 4.0, 2.0, 1.0],  # label 1 is fifth
        [7.0, 6.0, 2.0, 5.0, 4.0, 3.0, 1.0],  # label 2 is sixth
    ]
)


def test_evaluation_by_hand():
    """Batches of two images and of one: every image counts the same."""
    found = metrics.evaluate(Lookup(RANKED), batches_of(torch.arange(3), 2), CPU)
    powers = np.exp(RANKED.double().numpy())
    loss = -np.log(powers[range(3), range(3)] / powers.sum(1)).mean()
    assert found == pytest.approx({"loss": loss, "top1": 100 / 3, "top5": 200 / 3})
    found = metrics.evaluate(Lookup(RANKED[:, 1:4]), batches_of(torch.tensor([0, 1, 1]), 2), CPU)
    assert (found["top1"], found["top5"]) == pytest.approx((100 / 3, 100))  # of three classes, all are among the first five


def test_evaluation_of_heads_by_hand():
    """The backbone is judged by un-rotated views: in rows 0 and 4 one of two is right, in the turned ones all or none."""
    for turned in (LABELS, 1 - LABELS):
        logits = nn.functional.one_hot(turned.repeat_interleave(4), 2).float()
        logits[0], logits[4] = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
        network, batches = Lookup(logits, two_heads(), 4), batches_of(LABELS, 1)
        found = metrics.evaluate(network, batches, CPU, heads=True)
        heads = {"aux1_joint": 62.5, "aux1_class": 100.0, "aux2_joint": 87.5, "aux2_class": 0.0}
        loss = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
        assert found == pytest.approx({"loss": loss, **heads, "top1": 50.0, "top5": 100.0})
        without = {"loss": loss, "top1": 50.0, "top5": 100.0}
        assert metrics.evaluate(network, batches, CPU) == pytest.approx(without)


def test_heads_are_tested_in_batches_as_large_as_without_them():
    """A batch of six images has 24 views, of which a forward pass sees no more than eight."""
    network, rows = Lookup(torch.zeros(24, 2), [torch.zeros(24, 8)], 4), []
    network.register_forward_pre_hook(lambda _, images: rows.append(len(images[0])))
    found = metrics.evaluate(network, batches_of(torch.zeros(6, dtype=torch.long), 6), CPU, heads=True)
    assert rows == [8, 8, 8] and found["top1"] == found["aux1_class"] == 100


def test_evaluation_of_a_pair_takes_the_better_network():
    """Its top-1 and top-5 are the pair's; of two equal networks the first is taken; another one can be asked for."""
    better = RANKED.clone()
    better[1, 1], better[2, 2] = 8.0, 5.5  # label 1 is first, label 2 third
    cases = [((RANKED, better), 2, 200 / 3, 100), ((better, RANKED), 1, 200 / 3, 100), ((RANKED, RANKED), 1, 100 / 3, 200 / 3)]
    for (first, second), net, top1, top5 in cases:
        pair = Namespace(net1=Lookup(first), net2=Lookup(second))
        found = metrics.evaluate(pair, batches_of(torch.arange(3), 2), CPU)
        assert (found["net"], found["top1"], found["top5"]) == pytest.approx((net, top1, top5))
        assert found[f"net{3 - net}/top1"] == pytest.approx(100 / 3)
        other = metrics.evaluate(pair, batches_of(torch.arange(3), 2), CPU, net=3 - net)
        assert other["net"] == 3 - net
        assert all(other[key] == other[f"net{3 - net}/{key}"] == found[f"net{3 - net}/{key}"] for key in ("top1", "top5"))


def test_totals_are_means_over_images():
    """Not over batches; sums that were saved go on, in the one process that carries them for all."""
    totals = metrics.Totals(CPU)
    assert totals.means() == {} and totals.state_dict() == {}
    totals.add({"loss": torch.tensor(2.0), "top1": torch.tensor(100)}, 1)
    totals.add({"loss": torch.tensor(4.0), "top1": torch.tensor(200)}, 3)
    assert totals.means() == {"loss": 1.5, "top1": 75.0}
    for is_main, expected in ((True, {"loss": 2.0, "top1": 60.0}), (False, {"loss": 4.0, "top1": 0.0})):
        resumed = metrics.Totals(CPU)
        resumed.load_state_dict(totals.state_dict(), is_main)
        resumed.add({"loss": torch.tensor(4.0), "top1": torch.tensor(0)}, 1)
        assert resumed.means() == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_auto_follows_the_gpus_capability(capability, expected, monkeypatch):
    """That of the GPU in use."""
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", {device: capability}.__getitem__)
    found = precision.resolve_precision("auto", device)
    assert found == precision.TYPES[expected] and precision.type_name(found) == expected


@pytest.mark.parametrize(("gain", "expected"), [(0.1, torch.float32), (1.1, torch.float32), (1.5, torch.bfloat16)])
def test_auto_on_a_cpu_follows_the_probe(gain, expected, monkeypatch):
    """Its random numbers are none of the run's."""
    monkeypatch.setattr(precision, "cpu_bfloat16_gain", lambda: gain + 0 * torch.rand(1).item())
    before = torch.get_rng_state()
    assert precision.resolve_precision("auto", CPU) == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("amp", "expected"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_given_precision_asks_no_device(amp, expected, device, monkeypatch):
    monkeypatch.delattr(torch.cuda, "get_device_capability")
    monkeypatch.delattr(precision, "cpu_bfloat16_gain")
    args = parsed("train_baseline_cifar", "--amp", amp)
    assert precision.resolve_precision(args.amp, torch.device(device)) == expected
