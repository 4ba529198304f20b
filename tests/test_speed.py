"""The fast training step computes what the plain one does, and never waits for the device."""

from functools import partial

import pytest
import torch
from contract import filled_network
from torch import nn

import imagesets
import methods
from imagesets import in_memory
from imagesets.augment import CropFlip
from imagesets.images import ImageSet, Settings
from training import Trainer, speed
from utils import World

CLASSES, BATCH = 5, 4
CPU = torch.device("cpu")


def on_gpu(test):
    """Mark a test as one of `pytest -m cuda`, skipped if there is no GPU."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def train_batches(device=CPU):
    """Return batches of random images: two of four, and one of the image that is left."""
    generator, count = torch.Generator().manual_seed(0), 2 * BATCH + 1
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    images = ImageSet(labels, list("abcde"), imagesets.STATISTICS["cifar100"], 32, pixels)
    return in_memory.TrainBatches(images, CropFlip(32), Settings(batch_size=BATCH, world=World(0, 1, device)))


def networks(method, student="resnet8_aux"):
    """Return (student, objective) whose networks have BatchNorm statistics far from their start."""
    method = methods.find(method)
    teacher = filled_network("wrn_16_1_aux", num_classes=CLASSES)
    return filled_network(student, method.rotations, CLASSES), method(teacher)


def trainer(method="hsakd", amp="off", device=CPU, student="resnet8_aux", lr=0.05, **settings):
    """Return a Trainer of three epochs."""
    train, settings = train_batches(device), {"lr": lr, "amp": amp, "world": World(0, 1, device), **settings}
    test = [batch[:2] for batch in train]
    return Trainer(*networks(method, student), train=train, test=test, epochs=3, **settings)


def backward(loss, model):
    """Return (loss, its gradients as one vector)."""
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def gradients(made, images, labels):
    """Return (loss, gradients) of one batch through a Trainer's forward pass."""
    made.step.wrapped.train()
    return backward(made.step.forward(images, labels, 1)[0], made.model)


def plain_gradients(images, labels, dtype=None):
    """Return (loss, gradients) of the same by the objective alone: eager, contiguous NCHW, the teacher as it is."""
    student, objective = networks("hsakd")
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return backward(sum(objective(student.train(), images.contiguous(), labels).values()), student)


def distance(found, expected):
    """Return the relative distance of two vectors."""
    return ((found - expected).norm() / expected.norm()).item()


def weights(made):
    """Return all weights of a Trainer's model as one vector."""
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


@pytest.fixture
def aot_eager(monkeypatch):
    """Capture graphs, forward and backward, as torch.compile does, without the minutes that code generation takes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_float16_continues_after_an_overflow():
    """The first step overflows and is skipped."""
    made = trainer(amp="fp16")
    start, batch = weights(made), next(made.batches(0))
    made.step(batch._replace(images=batch.images * float("nan")), made.totals)
    assert torch.equal(weights(made), start)
    for _ in range(2):
        made.step(batch, made.totals)
    assert 0 < (weights(made) - start).norm() < 10


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_step_has_the_plain_steps_loss_and_gradients(layout):
    """Within float32's rounding, which through BatchNorm's batch statistics is a few 1e-5."""
    images, labels, _ = next(train_batches().epoch(0))
    made = trainer()
    for network in (made.model, made.objective.teacher):
        network.to(memory_format=layout)
    loss, found = gradients(made, images.contiguous(memory_format=layout), labels)
    expected_loss, expected = plain_gradients(images, labels)
    assert loss == pytest.approx(expected_loss, rel=1e-5) and distance(found, expected) < 1e-4


def test_bfloat16_step_is_no_further_from_float32_than_plain_autocast():
    """The teacher's weights, converted once and not in every step, add nothing to autocast's own rounding."""
    made = trainer(amp="bf16")
    kinds = {m.weight.dtype for m in made.objective.teacher.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert kinds == {torch.bfloat16} and {p.dtype for p in made.model.parameters()} == {torch.float32}
    images, labels, _ = next(made.train.epoch(0))
    loss, found = gradients(made, images, labels)
    expected_loss, expected = plain_gradients(images, labels)
    rounding = distance(plain_gradients(images, labels, torch.bfloat16)[1], expected)
    assert loss == pytest.approx(expected_loss, rel=0.01)
    assert 0 < distance(found, expected) < 1.5 * rounding < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(("method", "amp"), [("hsakd", "off"), ("hsakd", "bf16"), ("dpcd", "off")])
def test_compiled_training_equals_eager_and_captures_one_graph(aot_eager, method, amp):
    """Three epochs of three steps, the last one smaller: equal weights, and no epoch or batch compiles anew."""
    made = [trainer(method, amp, lr=0.001, compile=c) for c in (False, True)]  # more would enlarge rounding
    start, best = weights(made[0]), [each.fit() for each in made]
    assert distance(*(weights(each) - start for each in made)) < 1e-4 and best[0] == best[1]
    for name, value in made[0].objective.state.items():
        assert torch.allclose(made[1].objective.state[name], value, atol=1e-6), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("method", ["hsakd", "dpcd", "crd"])
def test_step_never_reads_the_device(method, monkeypatch):
    """No tensor of the training loop is turned into a Python number: on a GPU that would wait for it."""
    made = trainer(method)
    made.train_epoch(0, None)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a training step read a tensor's value"))
    for batch in made.batches(1):
        made.step(batch, made.totals)


def test_strided_depthwise_convolutions_train_in_float32_in_a_cpus_bfloat16():
    """Their output keeps bfloat16, and their gradients are those of float32."""
    model = trainer(student="mobilenetV2_aux", amp="bf16").model
    # Of the backbone and three heads: the teacher has none for the first one, which is frozen.
    changed = [m for m in model.modules() if isinstance(m, speed.Float32Conv2d)]
    assert len(changed) == 6 and all(m.groups == m.in_channels and m.stride == (2, 2) for m in changed)
    teacher = speed.inference_copy(model, torch.bfloat16, torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(torch.randn(2, 3, 32, 32))[0].isfinite().all()
    layer = changed[0]
    images = torch.randn(2, layer.in_channels, 8, 8).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(images)
    wide, weight = (value.detach().clone().float().requires_grad_() for value in (images, layer.weight))
    out.sum().backward()
    nn.functional.conv2d(wide, weight, None, 2, 1, 1, layer.groups).sum().backward()
    assert out.dtype == torch.bfloat16 and torch.equal(images.grad, wide.grad.to(torch.bfloat16))
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)


@on_gpu
@pytest.mark.parametrize(("method", "amp", "parts"), [("hsakd", "off", 1), ("hsakd", "bf16", 2), ("dpcd", "off", 1)])
def test_cuda_graphs_train_like_eager(method, amp, parts):
    """On a GPU, three epochs of compiled steps are recorded as graphs and give about the eager steps' losses."""
    counters, device = torch._dynamo.utils.counters, torch.device("cuda", 0)
    counters.clear()
    losses = []
    for compiled in (False, True):
        made = trainer(method, amp, device, lr=0.001, compile=compiled, accumulate=parts)
        losses.append([made.one_epoch(epoch, None)["train/loss"] for epoch in range(3)])
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@on_gpu
@pytest.mark.parametrize("method", ["hsakd", "dpcd"])
def test_cuda_step_does_not_wait_for_the_gpu(method):
    """PyTorch itself refuses every synchronising call of the training loop after its first epoch."""
    made = trainer(method, "bf16", torch.device("cuda", 0))
    made.train_epoch(0, None)
    batches = made.batches(1)
    made.step(next(batches), made.totals)  # copying the epoch's order to the device may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            made.step(batch, made.totals)
    finally:
        torch.cuda.set_sync_debug_mode("default")
