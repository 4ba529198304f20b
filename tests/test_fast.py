"""The fast training step computes what the plain one does, and the benchmark of it runs."""

import copy
import json
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import equal_results
import pytest
import step
import torch
import torchvision
import training_paths
from contract import filled_network
from scripts import QUICK, parsed, save_teacher
from torch import nn
from torch._inductor import exc as compiler_errors
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import augment
import batches
import datasets
import engine
import fast
import loading
import losses
import metrics
import models
import precision
from distributed import World
from preemption import StopSignal
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
CLASSES, BATCH = 5, 4


def needs_gpu(test):
    """Mark a test as one of `pytest -m cuda`, skipped where there is no GPU."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m cuda")(test))


def image_set(count=2 * BATCH + 1):
    """Return `count` random images with labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return datasets.in_memory(images, labels, range(CLASSES), datasets.CIFAR100_STATISTICS)


def network(name, rotations=4):
    """Return a network whose BatchNorm statistics are far from their start."""
    return filled_network(name, rotations, CLASSES)


def objective(method, student="resnet8_aux"):
    """Return (student, objective) of a method on a small pair."""
    rotations = 1 if method == "dpcd" else 4
    teacher = network("wrn_16_1_aux" if rotations == 4 else "resnet8_aux", rotations)
    made = losses.HSAKDLoss(teacher) if method == "hsakd" else losses.DPCDLoss(teacher, warmup_epochs=4)
    return network(student, rotations), made


def prepared(tmp_path, method="hsakd", amp="off", compiled=False, device="cpu", student="resnet8_aux", accumulate=1):
    """Return an engine.Run ready to train on `image_set`, whose last batch is smaller."""
    flags = ["--batch-size", BATCH, "--accumulate", accumulate, "--amp", amp, *["--compile"] * compiled]
    args = parsed("train_teacher_cifar", "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path, *flags)
    world = World(0, 1, torch.device(device))
    found = image_set()
    train = batches.DeviceBatches(found, BATCH, augment.CropFlip(32), world, 0)
    run = engine.Run(args, world, *objective(method, student), loading.Data(train, None, None, CLASSES, 32, {}))
    run.prepare()
    return run


def trained(run, epochs=3):
    """Train a run through the engine's loop and return it."""
    for epoch in range(epochs):
        run.train_epoch(epoch, StopSignal(signals=()))
        run.step_in_epoch = 0
    return run


def gradients(run, images, labels):
    """Return (loss, all gradients as one vector) of one batch through a run's forward pass."""
    run.wrapped.train()
    loss, _ = run.forward(images, labels, 1)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in run.model.parameters()])


def plain_gradients(images, labels, dtype=None):
    """Return (loss, gradients) of the same by the objective alone: eager, contiguous NCHW, the teacher as it is."""
    student, made = objective("hsakd")
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        terms = made(student.train(), images.contiguous(), labels)
    loss = sum(terms.values())
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def distance(found, expected):
    """Return the relative distance of two vectors."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def aot_eager(monkeypatch):
    """Capture graphs, forward and backward, as torch.compile does, without the minutes that code generation takes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_float16_goes_on_after_an_overflow(tmp_path, monkeypatch):
    """The first step overflows and is skipped: the second starts the momentum, from nothing that was left in memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    run = prepared(tmp_path, amp="fp16")
    start = copy.deepcopy(run.model.state_dict())
    images, labels = next(run.data.train.epoch(0))
    run.wrapped.train()
    torch.use_deterministic_algorithms(True)  # only then is new memory filled with NaN
    try:
        run.step(images * float("nan"), labels, 0)
        assert all(torch.equal(value, start[name]) for name, value in run.model.named_parameters())
        for _ in range(2):
            run.step(images, labels, 0)
    finally:
        torch.use_deterministic_algorithms(False)
    moved = [(value - start[name]).norm() for name, value in run.model.named_parameters()]
    assert all(0 < distance < 10 for distance in moved)


def test_default_step_has_the_plain_steps_loss_and_gradients(tmp_path):
    """Channels-last and the folded teacher stay within float32's rounding, the contract's own 1e-4 for gradients.

    Rounding through BatchNorm's batch statistics is a few 1e-5 and changes with the number of threads.
    """
    run = prepared(tmp_path)
    images, labels = next(run.data.train.epoch(0))
    assert images.is_contiguous(memory_format=torch.channels_last)
    loss, found = gradients(run, images, labels)
    expected_loss, expected = plain_gradients(images, labels)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert distance(found, expected) < 1e-4


def test_bfloat16_step_is_no_further_from_float32_than_plain_autocast(tmp_path):
    """The folded teacher and its weights converted once add nothing to autocast's own rounding."""
    run = prepared(tmp_path, amp="bf16")
    images, labels = next(run.data.train.epoch(0))
    loss, found = gradients(run, images, labels)
    expected_loss, expected = plain_gradients(images, labels)
    rounding = distance(plain_gradients(images, labels, torch.bfloat16)[1], expected)
    assert loss == pytest.approx(expected_loss, rel=0.01)
    assert 0 < distance(found, expected) < 1.5 * rounding < 0.3


@pytest.mark.parametrize(("method", "amp"), [("hsakd", "off"), ("hsakd", "bf16"), ("dpcd", "off")])
def test_compiled_training_equals_eager_and_captures_one_graph(tmp_path, aot_eager, method, amp):
    """Three epochs of three steps, the last one smaller: equal weights, and no epoch or batch compiles anew."""
    runs, moved = [prepared(tmp_path, method, amp, compiled=c) for c in (False, True)], []
    for run in runs:
        run.args.init_lr = 0.001  # at a higher rate rounding grows from step to step
        start = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        trained(run)
        moved.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]) - start)
    assert distance(*moved) < 1e-4
    assert runs[1].totals.means() == pytest.approx(runs[0].totals.means(), rel=1e-4)
    for name, value in runs[0].objective.state.items():
        assert torch.allclose(runs[1].objective.state[name], value, atol=1e-6), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


# Older versions of PyTorch have no class for it.
NO_TRITON = getattr(compiler_errors, "TritonMissing", lambda _: RuntimeError("no working triton installation"))(None)


@pytest.mark.parametrize(
    ("error", "said"),
    [(FileNotFoundError("no working C++ compiler\nhere"), r"no working C\+\+ compiler$"), (NO_TRITON, ".*[Tt]riton")],
)
def test_a_compiler_that_is_missing_is_told(error, said, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise error

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(UserError, match=f"^--compile: {said}"):
        trained(prepared(tmp_path, compiled=True), 1)
    torch._dynamo.reset()


def test_step_never_reads_the_device(tmp_path, monkeypatch):
    """No tensor of the training loop is turned into a Python number: on a GPU that would wait for it."""
    run = trained(prepared(tmp_path), epochs=1)

    def refuse(*_):
        raise AssertionError("a training step read a tensor's value")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for number, (images, labels) in enumerate(run.data.train.epoch(1)):
        run.step(images, labels, number)


@pytest.mark.parametrize("name", [*(f"{n}_aux" for n in ("wrn_16_1", "resnet8x4", "ResNet50", "vgg8_bn")),
                                  "mobilenetV2_aux", "ShuffleV1_aux", "ShuffleV2_aux"])  # fmt: skip
def test_folded_network_is_the_same_function(name):
    """Every family folds some BatchNorm, gives the same outputs, and leaves the original as it was."""
    original = network(name).eval()
    before = copy.deepcopy(original.state_dict())
    folded = fast.fold_batchnorm(original, 32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = original(images), folded(images)
    for wanted, got in zip([expected[0], *expected[1]], [found[0], *found[1]], strict=True):
        assert distance(got, wanted) < 1e-5
    left, norms = (sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (folded, original))
    assert left < norms
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


def test_convolution_with_a_second_reader_is_not_folded():
    """In the thinnest WRN the stem's output also goes past the first BatchNorm, by the shortcut."""
    found = dict(fast.foldable(network("wrn_16_1_aux").eval(), torch.zeros(1, 3, 32, 32)))
    assert "backbone.conv1" not in found
    assert found["backbone.block1.layer.0.conv1"] == "backbone.block1.layer.0.bn2"


def test_teacher_is_folded_and_converted_once(tmp_path):
    """The objective's teacher keeps its convolutions in autocast's type, so that no step converts them."""
    run = prepared(tmp_path, amp="bf16")
    kinds = {m.weight.dtype for m in run.objective.teacher.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_strided_depthwise_convolutions_train_in_float32_on_the_cpu(tmp_path):
    """Their keys stay the same, their output keeps bfloat16, and their gradients are those of float32."""
    plain = models.create("mobilenetV2_aux", CLASSES)
    model = copy.deepcopy(plain)
    fast.suit_cpu(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    changed = [m for m in model.modules() if isinstance(m, fast.Float32Conv2d)]
    assert len(changed) == 9
    assert all(m.groups == m.in_channels and m.stride == (2, 2) for m in changed)

    layer = changed[0]
    images = torch.randn(2, layer.in_channels, 8, 8).to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(images)
    assert out.dtype == torch.bfloat16
    wide = images.detach().float().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    expected = nn.functional.conv2d(wide, weight, None, 2, 1, 1, layer.groups)
    out.sum().backward()
    expected.sum().backward()
    assert layer.weight.grad == pytest.approx(weight.grad, rel=1e-5)
    assert torch.equal(images.grad, wide.grad.to(torch.bfloat16))


def test_run_suits_the_cpu_only_in_bfloat16(tmp_path):
    """In float32 the layers stay as they are."""
    for amp, kept in (("off", nn.Conv2d), ("bf16", fast.Float32Conv2d)):
        run = prepared(tmp_path, amp=amp, student="ShuffleV1_aux")
        strided = [m for m in run.model.modules() if isinstance(m, nn.Conv2d) and m.groups > 3 and m.stride == (2, 2)]
        assert strided and all(type(m) is kept for m in strided)


def test_freed_memory_is_kept(tmp_path):
    """After some rounds, large tensors touch no fresh pages of the machine."""
    script = """
import resource, torch, fast
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = [faults() for _ in range(40)][-1]
fast.keep_memory()
kept = [faults() for _ in range(40)][-1]
print(plain, kept)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    plain, kept = map(int, done.stdout.split())
    if plain < 20:
        pytest.skip("this C library keeps freed memory anyway")
    assert kept < plain / 10


def benchmark(*arguments, script="step.py", common=("--steps", "1", "--markdown")):
    """Run a script of benchmarks/ on one small step and return what it printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *common, *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_benchmark_measures_all_it_promises(tmp_path):
    """One tiny case: a table, and every measurement in the JSON file."""
    path = tmp_path / "step.json"
    small = ["--tarch", "resnet8_aux", "--arch", "resnet8_aux", "--batch-size", 2, "--rounds", 2, "--amp", "off"]
    printed = benchmark(*small, "--json", path)
    assert "| resnet8_aux -> resnet8_aux | reference |" in printed
    (result,) = json.loads(path.read_text())["results"]
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert min(result["shares"].values()) > 0
    assert result["gflop_a_step"] > 0
    for found in result["paths"].values():
        assert found["images_per_second"]["median"] > 0
        assert found["peak_mib"] > 0
        assert found["start_seconds"] > 0
    assert set(result["paths"]) == {"reference", "default"}
    assert all(0 < path["of_matmul_rate"] < 2 for path in result["paths"].values())


def test_benchmark_of_scaling(tmp_path):
    """Two processes in one cell: images/s, memory and the plot."""
    cells, picture = tmp_path / "cells.json", tmp_path / "scaling.png"
    small = ["--teacher", "resnet8_aux", "--batch-sizes", 2, "--processes", 2, "--rounds", 1, "--amp", "off"]
    benchmark("--scaling", *small, "--json", cells, "--plot", picture)
    (cell,) = json.loads(cells.read_text())["scaling"]
    assert cell["images_per_second"]["median"] > 0
    assert cell["peak_mib"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_benchmark_of_a_mutual_pair():
    """Two networks that teach each other, without a teacher, are a case of their own."""
    printed = benchmark("--online", "resnet8_resnet8", "--batch-size", 2, "--rounds", 1, "--amp", "off")
    assert "| resnet8_resnet8 | default, float32 |" in printed


def test_benchmark_of_equal_results(tmp_path):
    """One seed trained both ways on the digits: a table and a JSON file of two accuracies."""
    teacher, path = save_teacher(tmp_path / "teacher.pth.tar"), tmp_path / "equal.json"
    pair = ["--tarch", "resnet8_aux", "--arch", "resnet8_aux", "--tcheckpoint", teacher, "--epochs", 2, *QUICK]
    printed = benchmark("--seeds", 3, "--json", path, *pair, script="equal_results.py", common=())
    found = json.loads(path.read_text())
    assert found["seeds"] == [3]
    for name in ("reference", "default"):
        assert f"| {name} | {found[name][0]['top1']:.2f} |" in printed
        assert 0 <= found[name][0]["top1"] <= 100
        assert found[name][0]["speed"] > 0


@pytest.mark.parametrize("flip", [False, True])
def test_the_reference_mirrors_what_this_project_mirrors(flip):
    """Digits are not mirrored: a mirrored one is another class."""
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    made = datasets.in_memory(images, torch.zeros(1, dtype=torch.long), range(2), datasets.CIFAR100_STATISTICS, flip=flip)
    layers = training_paths.PublishedImages(made).transform.transforms
    assert any(isinstance(layer, torchvision.transforms.RandomHorizontalFlip) for layer in layers) == flip


@pytest.mark.parametrize("flag", ["--all", "--compile", "--gpu-id=0"])
def test_scaling_refuses_what_it_would_leave_out(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        step.parse_args(["--scaling", flag])
    assert stop.value.code == 2 and "no --all, --compile or --gpu-id" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--teacher resnet8", "no auxiliary classifiers"),
        ("--arch resnet8", "no auxiliary classifiers"),
        ("--online resnet8_aux", "not a mutual pair"),
        ("--json nowhere/a.json", "no such folder"),
        ("--scaling --plot nowhere/a.png", "no such folder"),
    ],
)
def test_benchmark_of_steps_refuses_what_it_cannot_time_or_write(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        step.parse_args(flags.split())
    told = capsys.readouterr().err
    assert stop.value.code == 2 and said in told and told.count("\n") == 1


def test_the_precision_probe_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert precision.cpu_bfloat16_gain(rounds=1) > 0 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("flags", "said"), [("--warmup-epoch 2", "reference has no"), ("--dataset imagenet", "has no"), ("--resume", "anew")]
)
def test_benchmark_of_equal_results_refuses_what_the_reference_lacks(flags, said, capsys):
    """A schedule, or images, that only one of the two would have is a mistake, told in one line."""
    with pytest.raises(SystemExit) as stop:
        equal_results.parse_args(["--tcheckpoint", "T", *flags.split()])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and said in told and told.count("\n") == 1


def gpu_objectives():
    """Return name -> (name of the trained network, its rotations, function that makes the objective)."""

    def made(name, rotations=4):
        return models.create(name, CLASSES, rotations)

    return {
        "ce": ("resnet8", 4, losses.CrossEntropyLoss),
        "teacher": ("vgg8_bn_aux", 4, losses.TeacherLoss),
        "hsakd": ("wrn_16_1_aux", 4, lambda: losses.HSAKDLoss(made("resnet8_aux"))),
        "mutual": ("resnet8_resnet8", 4, losses.MutualLoss),
        "kd": ("resnet8", 4, lambda: losses.KDLoss(made("resnet8"))),
        "dkd": ("resnet8", 4, lambda: losses.DKDLoss(made("resnet8"))),
        "dpcd": ("resnet8_aux", 1, lambda: losses.DPCDLoss(made("resnet8_aux", 1))),
    }


def simulates_gpus():
    """Return whether this PyTorch has layers of a GPU without values where there is no driver (2.6 has none)."""
    try:
        with FakeTensorMode():
            nn.Linear(2, 2, device="cuda:0")
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not simulates_gpus(), reason="needs a newer PyTorch, or a GPU")
@pytest.mark.parametrize("method", gpu_objectives())
def test_gpu_step_runs_on_tensors_without_values(method):
    """On a simulated GPU batches, forward pass, losses and metrics run, and compile to one graph without tensors of the CPU.

    So nothing reads a value back, which would make the host wait, and CUDA graphs can be made.
    """
    arch, rotations, objective = gpu_objectives()[method]
    device = torch.device("cuda:0")
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no such GPU
        data = batches.DeviceBatches(image_set(), BATCH, augment.CropFlip(32), World(0, 1, device), 0)
        with device:
            model, objective = models.create(arch, CLASSES, rotations), objective()
        objective, totals = objective.to(device), metrics.Totals(device)
        for images, labels in data.epoch(0):
            terms, predictions = objective.step(model, images, labels, 0)
            totals.add(metrics.training_sums(terms, predictions, labels), len(labels))
        assert {value.device for value in (images, totals.sums, *terms.values())} == {device}
        with pytest.raises(DataDependentOutputException):
            totals.means()
        graphs = []
        compiled = torch.compile(objective, backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=False)
        with device:
            compiled(model, images, labels, torch.zeros(()))
        (graph,) = graphs
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        assert {value.device for value in values if torch.is_tensor(value)} == {device}


@needs_gpu
@pytest.mark.parametrize(("method", "amp", "parts"), [("hsakd", "off", 1), ("hsakd", "bf16", 2), ("dpcd", "off", 1)])
def test_cuda_graphs_train_like_eager(tmp_path, method, amp, parts):
    """On a GPU, three epochs of compiled steps are recorded as graphs and give about the eager steps' losses."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    runs = [prepared(tmp_path, method, amp, compiled=compiled, device="cuda", accumulate=parts) for compiled in (False, True)]
    for run in runs:
        run.args.init_lr = 0.001  # at a higher rate rounding grows from step to step
        trained(run)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0
    assert runs[1].totals.means()["loss"] == pytest.approx(runs[0].totals.means()["loss"], rel=0.02)


@needs_gpu
@pytest.mark.parametrize("method", ["hsakd", "dpcd"])
def test_cuda_step_does_not_wait_for_the_gpu(tmp_path, method):
    """PyTorch itself refuses every synchronising call of the training loop after its first epoch."""
    run = trained(prepared(tmp_path, method, amp="bf16", device="cuda"), epochs=1)
    batch = run.data.train.epoch(1)
    run.step(*next(batch), 1)  # copying the epoch's order to the device may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in batch:
            run.step(images, labels, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
