"""Several processes on the CPU: gradients, metrics, launchers, stops, restarts and the death of a process."""

import contextlib
import functools
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_own_images import write_splits
from torch import nn

import imagesets
import methods
import models
import utils
from scripts import QUICK_RUN, ROOT, WORLD, assert_same_run, checkpoint, log_lines, parsed, run, save_teacher, status
from training import Trainer, distributed, launch
from utils import UserError

FOLDER = "train_baseline_cifar_arch_resnet8_dataset_digits_seed0"


def free_port():
    """Return a TCP port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def baseline(checkpoints, *more):
    """Return the command line of a baseline on the digits, without launcher: three epochs of 20 steps."""
    recipe = ["--arch", "resnet8", "--amp", "off", "--epochs", "3", "--milestones", "2", "--batch-size", "16"]
    words = [*recipe, "--dataset", "digits", "--limit-batches", "20", "--checkpoint-dir", checkpoints, *more]
    return ["train_baseline_cifar.py", *map(str, words)]


def published(command, port=None, gpus="0,1", machines=1, rank=0):
    """Return the command with the published flags that start several processes."""
    flags = ["--multiprocessing-distributed", "--gpu", gpus, "--dist-backend", "nccl", "--world-size", str(machines)]
    meeting = ["--rank", str(rank), "--dist-url", f"tcp://127.0.0.1:{port or free_port()}"]
    return [sys.executable, *command, *flags, *meeting]


def start(command, **more):
    """Start a command in the project's folder, in a process group of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "bufsize": 1}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def wait_for(process, text):
    """Read a process's output up to a line with `text`."""
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"ended with status {process.wait()}: {process.stderr.read()}")


def ranks_of(launcher):
    """Return rank -> process id of a launcher's processes."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # one that has ended
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found.update({int(v.removeprefix("RANK=")): int(pid) for v in variables if v.startswith("RANK=")})
    return found


def spawn(function, *arguments):
    """Run `function(world, *arguments)` in two processes of one group."""
    mp.spawn(joined, (function, free_port(), *arguments), nprocs=2)


def joined(rank, function, port, *arguments):
    """Join the group as rank `rank` of two, run `function`, and leave."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(distributed.setup(), *arguments)
    distributed.leave()


def trained(world, **settings):
    """Return the weights after four steps, of which a process sees its share of each batch.

    The network has no BatchNorm, whose statistics would be those of a process's own images.
    """
    draw = torch.Generator().manual_seed(1)
    whole = [(torch.randn(8, 3, 8, 8, generator=draw), torch.randint(10, (8,), generator=draw)) for _ in range(4)]
    share = [tuple(part.chunk(world.size)[world.rank] for part in batch) for batch in whole]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    common = {"train": share, "test": share, "epochs": 1, "lr": 0.1, "amp": "off", "world": world}
    Trainer(model, methods.Supervised(), **common, **settings).fit()
    return model.state_dict()


def dpcd_weights(rows):
    """Return DPCD's weights of the `rows` of three batches, and its running state."""
    draw, objective, found = torch.Generator().manual_seed(2), methods.DPCD(nn.Identity(), history=18), []
    for _ in range(3):
        logits, labels = torch.randn(8, 10, generator=draw) * 3, torch.randint(10, (8,), generator=draw)
        found.append(objective.weights(logits[rows], labels[rows]))
    return found, objective.state_dict()


SETTINGS = ({}, {"accumulate": 2}, {"compile": True})


def rank_results(world, folder):
    """Check the collectives' values; save this rank's weights of the network and of DPCD."""
    assert distributed.sum_over_ranks(torch.tensor([1, world.rank])).tolist() == [2, 1]
    assert distributed.any_over_ranks(world.rank == 1, world) and not distributed.any_over_ranks(False, world)
    norm = nn.BatchNorm1d(2)
    norm.running_mean += world.rank
    distributed.share_buffers(norm)
    assert norm.running_mean.tolist() == [0, 0]
    with pytest.MonkeyPatch.context() as patch:  # as in a group that the user has made
        patch.delenv("RANK")
        assert distributed.setup() == world
    flags = ("--tarch", "resnet8_aux", "--tcheckpoint", f"{folder}/teacher.pth", "--arch", "mobilenetV2_aux")
    run("train_student_cifar", *QUICK_RUN, *flags, "--checkpoint-dir", folder, world=world)  # one head learns nothing
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # captures graphs, generates no code
    weights = [trained(world, **settings) for settings in SETTINGS]
    dpcd = dpcd_weights(slice(4 * world.rank, 4 * world.rank + 4))
    torch.save((weights, dpcd), f"{folder}/{world.rank}.pt")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    """DPCD's confidence, too, runs over whole batches; the group may be the user's, and a head may learn nothing."""
    save_teacher(tmp_path / "teacher.pth")
    spawn(rank_results, str(tmp_path))
    (found, dpcd), (other, other_dpcd) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close([dpcd, other_dpcd], [dpcd_weights(slice(None))] * 2)
    expected = trained(WORLD)
    for weights, others in zip(found, other, strict=True):
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(weights[name], others[name]) for name in weights)


STUDENT = ("train_student_cifar", "--tarch", "resnet8_aux", "--arch", "resnet8_aux", "--tcheckpoint", "{0}/teacher.pth")
FOLDERS = ("--dataset", "imagefolder", "--data", "{0}/two")
BASELINE = ("train_baseline_cifar", "--arch", "resnet8")
DIFFERENT = [
    *((BASELINE, words.split()) for words in ("--init-lr 0.1", "--manual_seed 1", "--weight-decay 0.1")),
    *((BASELINE, words.split()) for words in ("--batch-size 8", "--accumulate 2", "--milestones 2", "--resume")),
    *((BASELINE, words.split()) for words in ("--limit-batches 2", "--val-split 0.2", "--optimizer adamw")),
    *(((*BASELINE, *FOLDERS), ("--data", other)) for other in ("{0}/more", "{0}/named")),
    (STUDENT, ("--tcheckpoint", "{0}/other.pth")),
]


def rank_with_other_words(world, folder):
    """Run a script in which the second process has other words; each pair of runs must be refused by both."""
    for (script, *words), other in DIFFERENT:
        common = ["--dataset", "digits", *words, "--checkpoint-dir", f"{folder}/checkpoints", "--amp", "off"]
        given = [word.format(folder) for word in (*common, *(other if world.rank else ()))]
        with pytest.raises(UserError, match="rank 1"):
            importlib.import_module(script).main(parsed(script, *given), world)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="torch"):
        patch.setattr(torch, "__version__", f"2.{world.rank}")
        importlib.import_module(BASELINE[0]).main(parsed(*BASELINE, "--dataset", "digits"), world)
    assert not Path(folder, "checkpoints").exists()


@pytest.mark.slow
def test_processes_that_would_not_train_alike_are_refused(tmp_path):
    """They would train on, silently wrong, or wait for each other for ever."""
    for name, classes, count in (("two", ("cat", "dog"), 4), ("more", ("cat", "dog"), 5), ("named", ("cat", "eel"), 4)):
        write_splits(tmp_path / name, [(16, 16)] * count, classes=classes)
    save_teacher(tmp_path / "teacher.pth")
    save_teacher(tmp_path / "other.pth", seed=2)
    spawn(rank_with_other_words, str(tmp_path))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the checkpoint folder of a run of two processes, started by the published flags of two machines."""
    port, folders = free_port(), [tmp_path_factory.mktemp("runs") / name for name in ("first", "second")]
    launchers = [start(published(baseline(folders[rank]), port, "0", 2, rank)) for rank in (0, 1)]
    told = [launcher.communicate(timeout=150)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    assert not folders[1].exists()  # the first process writes, alone
    return folders[0]


@pytest.mark.slow
def test_metrics_equal_a_hand_count(finished):
    """Each test image counts once, and a line is written once."""
    model = models.create("resnet8", 10).eval()
    utils.load_weights(model, finished / FOLDER / "resnet8.pth.tar")
    test = imagesets.load_test("digits", ".", batch_size=7)
    with torch.no_grad():
        hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    lines = log_lines(finished / FOLDER)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["test/top1"] == pytest.approx(100 * hits / test.total, abs=1e-4)


@pytest.mark.slow
def test_a_mistake_is_one_line_and_status_2(finished):
    """One that the first process sees, a folder in use, and one that the launcher sees, a port in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (free_port(), taken.getsockname()[1]):
            process = start(published(baseline(finished), port))
            told = process.communicate(timeout=100)[1]
            assert process.returncode == 2 and told.count("error") == 1 and "Traceback" not in told, told


@pytest.mark.slow
def test_a_run_stopped_again_and_again_resumes_bit_exactly(finished, tmp_path):
    """SIGTERM and Ctrl-C reach the launcher, and the run saves inside the epoch; SIGKILL one process, and all end."""
    command = published(baseline(tmp_path, "--save-minutes", "0.001", "--resume"))
    stops = (("epoch 1/3", signal.SIGTERM, 143), ("epoch 2/3", signal.SIGINT, 130), ("resuming", signal.SIGKILL, 1))
    for moment, number, expected in stops:
        running = start(command)
        wait_for(running, moment)
        began = time.monotonic()
        os.kill(ranks_of(running)[1] if number == signal.SIGKILL else running.pid, number)
        told = running.communicate(timeout=100)[1]
        assert time.monotonic() - began < 60 and "Traceback" not in told and running.returncode == expected, told
        assert checkpoint(tmp_path / FOLDER)["order"]["step"] > 0
    resumed = start(command)
    assert resumed.communicate(timeout=100) and resumed.returncode == 0
    assert_same_run(tmp_path / FOLDER, finished / FOLDER)


@pytest.mark.slow
def test_a_stuck_process_ends_the_run_in_one_line(tmp_path):
    command = baseline(tmp_path, "--epochs", "90", "--milestones", "80", "--dist-timeout", "0.05")
    running = start(published(command))
    wait_for(running, "epoch 1/90")
    stuck = ranks_of(running)[1]
    os.kill(stuck, signal.SIGSTOP)
    assert "--dist-timeout" in next(line for line in running.stderr if "error" in line)
    os.kill(stuck, signal.SIGCONT)  # else torchrun waits half a minute for its end
    assert "Traceback" not in running.communicate(timeout=20)[1] and running.returncode == 1


@pytest.mark.slow
def test_torchrun_restarts_and_the_run_resumes(finished, tmp_path):
    """With --max-restarts the processes start again by themselves and resume from the last checkpoint.

    Of the two machines only the one whose process is killed counts a restart.
    """
    flags = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "run1"]
    command = [sys.executable, "-m", "torch.distributed.run", *flags, *meeting, *baseline(tmp_path)]
    launchers = [start(command) for _ in range(2)]
    log, patience = tmp_path / FOLDER / "log.jsonl", time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n")):
        assert time.monotonic() < patience and all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.05)
    os.kill({rank: pid for launcher in launchers for rank, pid in ranks_of(launcher).items()}[1], signal.SIGKILL)
    told = [launcher.communicate(timeout=150) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    assert "resuming at epoch" in "".join(output for output, _ in told)
    assert_same_run(tmp_path / FOLDER, finished / FOLDER)


def test_what_the_machine_lacks_is_explained_and_bugs_are_not():
    cases = [(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 2)]
    cases += [(torch.OutOfMemoryError("CUDA out of memory"), 2), (dist.DistBackendError("NCCL aborted"), 1)]
    for error, expected in [*cases, (RuntimeError("shape mismatch"), None)]:
        assert (launch.explained(error) or (None, None))[1] == expected


@pytest.mark.parametrize(
    ("gpus", "mps", "gpu_id", "variables", "expected"),
    [
        (0, False, "0", {}, "cpu"),
        (0, True, None, {}, "mps"),
        (0, True, None, {"WORLD_SIZE": "2"}, "cpu"),
        (2, False, None, {}, "cuda:1"),
        (2, False, "1", {}, "cuda:1"),
        (2, False, "1,0", {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "cuda:0"),
        (2, False, "2", {}, None),
        (2, False, "0,1", {}, None),
        (2, False, "0", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, None),
    ],
)
def test_the_device_of_a_process(gpus, mps, gpu_id, variables, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    # Asked of a process whose GPU is named, it would take memory of another one.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked") if gpu_id else 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(os, "environ", os.environ | variables)
    with contextlib.nullcontext() if expected else pytest.raises(UserError):
        assert str(distributed.setup(gpu_id).device) == expected


def test_tasks_that_nothing_connects(monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert status(*BASELINE, "--dataset", "digits") == 2
    assert "8 tasks" in capsys.readouterr().err
