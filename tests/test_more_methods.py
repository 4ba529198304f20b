"""DIST, WTTM, CRD, ReviewKD, logit standardization, HSAKD with DIST: values by hand, and gradients."""

import numpy as np
import pytest
import torch
from test_losses import softmax
from torch.nn import functional as F

import losses
import methods
import models
from methods import reviewkd


def pair(rows=6, classes=5, scale=2.0, seed=0):
    """Return two numpy arrays of logits."""
    rng = np.random.RandomState(seed)
    return scale * rng.standard_normal((rows, classes)), scale * rng.standard_normal((rows, classes))


def value(function, *logits, **more):
    return function(*map(torch.tensor, logits), **more).item()


def test_dist_by_hand():
    student, teacher = pair()
    ours, theirs = softmax(student / 4), softmax(teacher / 4)
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(ours.T, theirs.T, strict=True)])
    for inter, intra in ((2.0, 2.0), (0.0, 3.0)):
        expected = 16 * (inter * rows + intra * columns)
        assert value(losses.dist, student, teacher, inter=inter, intra=intra) == pytest.approx(expected, rel=1e-5)


def test_wttm_by_hand():
    student, teacher = pair()
    powers = softmax(teacher) ** 0.2
    total = powers.sum(1, keepdims=True)
    target = powers / total
    divergence = (target * np.log(target / softmax(student))).sum(1)
    assert value(losses.wttm, student, teacher) == pytest.approx((total[:, 0] * divergence).mean(), rel=1e-5)


def test_standardized_kl_by_hand():
    """Scale and offset of either network's logits have no part in it."""
    student, teacher = pair()
    first, second = ((z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True) for z in (student, teacher))
    expected = value(losses.kl, first, second, temperature=2.0)
    assert value(losses.kl, student, teacher, temperature=2.0, standardize=True) == pytest.approx(expected, rel=1e-5)
    moved = value(losses.kl, 7 * student - 3, teacher, temperature=2.0, standardize=True)
    assert moved == pytest.approx(expected, rel=1e-4)


def test_hcl_by_hand():
    """Squared errors of 8 x 8 pixels and of the averages at 4, 2 and 1 pixels, each weighing half the one before."""
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    error = student - teacher
    errors = [error.unflatten(3, (n, -1)).unflatten(2, (n, -1)).mean((3, 5)).square().mean() for n in (8, 4, 2, 1)]
    expected = sum(e / 2**i for i, e in enumerate(errors)) / (1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert losses.hcl(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    pooled = error[:, :, :1, :1]
    assert losses.hcl(pooled, 0 * pooled).item() == pytest.approx(pooled.square().mean().item(), rel=1e-5)


def test_nce_by_hand():
    """Three images of one batch, two negatives each, one of which does not count."""
    ratios, counted = np.array([[3.0, 0.1, 0.5], [1.0, 0.2, 0.0]]), np.array([[True, True], [False, True]])
    noise = 2 / 10
    first = np.log(3 / 3.2) + np.log(noise / 0.3) + np.log(noise / 0.7)
    second = np.log(1 / 1.2) + np.log(noise / noise)
    found = losses.nce(torch.tensor(ratios), torch.tensor(counted), 10).item()
    assert found == pytest.approx(-(first + second) / 2, rel=1e-5)


def standard_kl(student, teacher):
    return losses.kl(student, teacher, 2.0, standardize=True)


@pytest.mark.parametrize("function", [losses.dist, losses.wttm, standard_kl])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
def test_gradients_are_finite(function, scale):
    """For logits up to 1e4 and for constant ones."""
    student, teacher = (torch.tensor(z) for z in pair(scale=scale))
    student.requires_grad_()
    loss = function(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("function", [losses.dist, standard_kl])
def test_zero_for_equal_networks(function):
    student, _ = pair()
    assert abs(value(function, student, student)) < 1e-4


class Embedder(models.Backbone):
    """A network whose embedding is the image's pixels."""

    def __init__(self, pixels=12, classes=3):
        super().__init__()
        self.fc = torch.nn.Linear(pixels, classes)

    def features(self, images):
        return [images], images.flatten(1)


def test_crd_by_hand():
    """Two steps of both directions, against memories, scales and labels kept in numpy."""
    torch.manual_seed(0)
    student, teacher, images = Embedder(), Embedder(), torch.randn(4, 3, 2, 2)
    objective = methods.CRD(teacher, negatives=5, dimensions=6, memory_momentum=0.25)
    objective.prepare(student, images, 9)
    index, labels = torch.tensor([7, 0, 3, 4]), torch.tensor([0, 1, 2, 1])
    known = {name: value.numpy().copy() for name, value in objective.state.items()}
    for step in range(2):
        torch.manual_seed(step)
        drawn = np.concatenate([index[:, None], torch.randint(9, (4, 5))], axis=1)
        torch.manual_seed(step)
        found = objective(student, images, labels, index=index)["features"].item()
        vectors, loss = {}, 0
        for side in ("student", "teacher"):
            projected = objective.trained[side](images.flatten(1)).detach().numpy()
            vectors[side] = projected / np.linalg.norm(projected, axis=1, keepdims=True)
        counted = known["labels"][drawn[:, 1:]] != labels.numpy()[:, None]
        for anchor, side in (("student", "teacher"), ("teacher", "student")):
            raised = np.exp(np.einsum("bd,bkd->bk", vectors[anchor], known[side][drawn]) / 0.07)
            scale = known[f"{side}_scale"] = known[f"{side}_scale"] or raised.mean() * 9
            ratios, noise = raised / scale, 5 / 9
            loss -= np.log(ratios[:, 0] / (ratios[:, 0] + noise)).mean()
            loss -= (np.log(noise / (ratios[:, 1:] + noise)) * counted).sum(1).mean()
        assert found == pytest.approx(0.8 * loss, rel=1e-4)
        for side, new in vectors.items():
            mixed = 0.25 * known[side][index] + 0.75 * new
            known[side][index] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        known["labels"][index] = labels
        for name, value in objective.state.items():
            np.testing.assert_allclose(value.numpy(), known[name], rtol=1e-4, atol=1e-6)


def test_reviewkd_imitates_all_levels():
    """It fades in, reaches every fusion, and compares the deeper stages of networks that differ in number and size."""
    torch.manual_seed(0)
    teacher, student = models.create("vgg8_bn", 10), models.create("resnet8", 10)
    objective, images = methods.ReviewKD(teacher, feature_weight=2.0), torch.randn(4, 3, 32, 32)
    objective.prepare(student, images)
    assert len(objective.trained["fusions"]) == 4
    labels = torch.tensor([0, 1, 2, 3])
    terms = {epoch: objective(student, images, labels, epoch=epoch)["features"].item() for epoch in (0, 10, 20, 50)}
    assert terms[0] == 0 and terms[10] == pytest.approx(terms[20] / 2, rel=1e-3)
    assert terms[50] == pytest.approx(terms[20], rel=1e-3)
    objective(student, images, labels, epoch=20)["features"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in objective.trained.parameters())


def test_fusion_by_hand():
    """Attention weighs the stage's own narrowed features and the deeper ones, repeated to its size."""
    torch.manual_seed(0)
    fusion = reviewkd.Fusion(3, 2, 4, deepest=False).eval()
    features, deeper = torch.randn(1, 3, 4, 4), torch.randn(1, 2, 2, 2)
    own, repeated = fusion.narrow(features), deeper.repeat_interleave(2, 2).repeat_interleave(2, 3)
    weights = torch.sigmoid(F.conv2d(torch.cat([own, repeated], 1), *fusion.attention[0].parameters()))
    expected = own * weights[:, :1] + repeated * weights[:, 1:]
    torch.testing.assert_close(fusion(features, deeper, 4), (fusion.widen(expected), expected))


def test_hsakd_with_dist_replaces_the_class_term_alone():
    torch.manual_seed(0)
    teacher, student = (models.create(name, 10) for name in ("resnet14_aux", "resnet8_aux"))
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    usual = methods.HSAKD(teacher)(student, images, labels)
    terms = methods.HSAKDDIST(teacher)(student, images, labels)
    assert terms.keys() == {"task", "aux_kl", "logit_dist"} and torch.equal(terms["aux_kl"], usual["aux_kl"])
    views = losses.rotate(images)
    with torch.no_grad():
        expected = losses.dist(student(views)[0], teacher(views)[0])
    torch.testing.assert_close(terms["logit_dist"].detach(), expected, rtol=1e-3, atol=1e-3)


def test_standardized_hsakd_weighs_every_kl():
    torch.manual_seed(0)
    teacher, student = (models.create(name, 10) for name in ("resnet14_aux", "resnet8_aux"))
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    terms = methods.HSAKD(teacher, temperature=2.0, kd_weight=9.0, standardize=True)(student, images, labels)
    (logits, aux), (target, aux_target) = (network(losses.rotate(images)) for network in (student, teacher.eval()))
    expected = [9 * standard_kl(*both).detach() for both in zip([logits, *aux], [target, *aux_target], strict=True)]
    torch.testing.assert_close(terms["logit_kl"].detach(), expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(terms["aux_kl"].detach(), sum(expected[1:]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(terms["task"], methods.HSAKD(teacher)(student, images, labels)["task"])
