"""Runs the project's scripts within the test process, on the CPU, and compares what they write."""

import importlib
import itertools
import json
import os
import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

import models
from training import launch
from training.step import TrainingStep
from utils import World

ROOT = Path(__file__).resolve().parents[1]
WORLD = World(0, 1, torch.device("cpu"))
# Two steps of four images, in float32.
QUICK = ("--dataset", "digits", "--batch-size", "4", "--limit-batches", "2", "--amp", "off")
QUICK_RUN = (*QUICK, "--epochs", "1")
TRAINING = (
    "train_baseline_cifar",
    "train_teacher_cifar",
    "train_student_cifar",
    "train_student_few_shot",
    "train_online_kd_cifar",
)


@contextmanager
def own_signal_handlers():
    """Start with the signal handlers of a process in a terminal, and put back those that there were."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in launch.STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def parsed(script, *words):
    """Return the parsed command line of a script."""
    return importlib.import_module(script).parse_args([str(word) for word in words])


def run(script, *argv, world=WORLD):
    """Run a script's `main` with the command line `argv`."""
    importlib.import_module(script).main(parsed(script, *argv), world)


def status(script, *argv):
    """Run a script as its command does and return the exit status; what it prints goes where the test's does."""
    module = importlib.import_module(script)
    command = [f"{script}.py", *(str(word) for word in argv)]
    with own_signal_handlers(), mock.patch.object(sys, "argv", command):
        try:
            launch.run(module.parse_args, module.main)
        except SystemExit as stop:
            return stop.code or 0


def refused(capsys, *argv, script="train_baseline_cifar"):
    """Return the one line that a mistaken command ends in, with status 2."""
    capsys.readouterr()
    assert status(script, *argv) == 2
    error = capsys.readouterr().err
    (line,) = (line for line in error.splitlines() if line.startswith(f"{script}.py: error: "))
    assert error.endswith(f"{line}\n") and "usage:" not in error and "Traceback" not in error
    return line


@contextmanager
def stopping(after, by, times=1):
    """Within the block, raise a signal (or an error) after so many training steps."""
    step, steps = TrainingStep.__call__, itertools.count(1)

    def stepping(self, batch, totals):
        step(self, batch, totals)
        for _ in range(times if next(steps) == after else 0):
            if not isinstance(by, signal.Signals):
                raise by
            signal.raise_signal(by)

    with mock.patch.object(TrainingStep, "__call__", stepping):
        yield


def stopped(script, *argv, after, by, times=1):
    """Run a script that receives a signal (or raises an error) after so many steps; return its exit status."""
    with stopping(after, by, times):
        return status(script, *argv)


def save_teacher(path, name="resnet8_aux", num_classes=10, rotations=4, seed=1):
    """Write the weights of a freshly initialised network; return the path."""
    torch.manual_seed(seed)
    torch.save({"net": models.create(name, num_classes, rotations).state_dict(), "acc": 0.0, "epoch": 1}, path)
    return path


class Payload(str):
    """The path of a folder that unpickling it would make."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def readme_code(word):
    """Return the Python block of README.md that holds `word`."""
    text = (ROOT / "README.md").read_text()
    (code,) = (block for block in re.findall("```python\n(.*?)```", text, re.DOTALL) if word in block)
    return code


def log_lines(folder):
    """Return the records of a run folder's log without what differs between equal runs."""
    measured = ("images_per_second", "seconds", "peak_memory_mib")
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def checkpoint(folder, best=False):
    """Return the last or best checkpoint of a run folder, or of the one run below a folder."""
    (path,) = (path for path in folder.rglob("*.pth.tar") if ("_best" in path.name) == best)
    return torch.load(path, weights_only=True)


def same(a, b):
    """Return whether two checkpoints' contents are bit-equal."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(found, expected):
    """Check that two run folders hold the same run, bit-exactly, whatever their timings and places."""
    states = checkpoint(found), checkpoint(expected)
    for key in states[0].keys() - {"args", "versions", "seconds"}:
        assert same(states[0][key], states[1][key]), key
    assert log_lines(found) == log_lines(expected)
    assert same(checkpoint(found, best=True)["net"], checkpoint(expected, best=True)["net"])
