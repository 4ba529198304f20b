"""Runs: interrupted and resumed bit-exactly, folders that are never overwritten, best and last, logs."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from unittest import mock

import filelock
import pytest
import torch
from test_own_images import write_splits

import models
from scripts import (
    QUICK,
    QUICK_RUN,
    assert_same_run,
    checkpoint,
    log_lines,
    own_signal_handlers,
    run,
    same,
    save_teacher,
    status,
    stopped,
)
from training import launch, trainer

TEACHER_RUN = "train_teacher_cifar_arch_resnet8_aux_dataset_digits_seed0"
BASELINE_RUN = "train_baseline_cifar_arch_resnet8_dataset_digits_seed0"
# Warm-up and a milestone, so that the rate differs at every step and epoch.
SCHEDULE = ("--epochs", "3", "--milestones", "1", "--warmup-epoch", "1")
BASELINE = (*QUICK, *SCHEDULE, "--arch", "resnet8", "--limit-batches", "6")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a baseline's run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run("train_baseline_cifar", *BASELINE, "--checkpoint-dir", folder)
    return folder / BASELINE_RUN


@pytest.fixture
def copy(whole, tmp_path):
    """Return a copy of that folder, and the command line that continues it."""
    shutil.copytree(whole, tmp_path / BASELINE_RUN)
    return tmp_path / BASELINE_RUN, [*BASELINE, "--checkpoint-dir", tmp_path, "--resume"]


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """Return the folder of a teacher's run of an epoch."""
    folder = tmp_path_factory.mktemp("teacher")
    run("train_teacher_cifar", *QUICK_RUN, "--arch", "resnet8_aux", "--checkpoint-dir", folder)
    return folder / TEACHER_RUN


def content_of(folder):
    """Return name -> content of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(capsys, *argv, script="train_baseline_cifar"):
    """Return the one line that a script ends in, with status 2."""
    capsys.readouterr()
    assert status(script, *argv) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    return line


def test_signals_save_and_the_run_resumes_bit_exactly(whole, tmp_path):
    argv, folder = [*BASELINE, "--checkpoint-dir", tmp_path], tmp_path / BASELINE_RUN
    signals = [(signal.SIGTERM, 3, 143, 0), (signal.SIGUSR1, 5, 143, 1), (signal.SIGHUP, 3, 143, 1)]
    for number, after, expected, epoch in [*signals, (signal.SIGINT, 1, 130, 1)]:
        assert stopped("train_baseline_cifar", *argv, after=after, by=number) == expected
        assert checkpoint(folder)["order"]["epoch"] == epoch
        argv = [*BASELINE, "--checkpoint-dir", tmp_path, "--resume"]
    assert checkpoint(folder)["order"]["step"] == 6  # between the last step of an epoch and its test
    run("train_baseline_cifar", *argv)
    assert_same_run(folder, whole)


def test_a_second_interrupt_ends_at_once(tmp_path):
    argv = [*BASELINE, "--checkpoint-dir", tmp_path]
    assert stopped("train_baseline_cifar", *argv, after=2, by=signal.SIGINT, times=2) == 130
    assert not list((tmp_path / BASELINE_RUN).glob("*.pth.tar"))


def test_saves_inside_an_epoch_are_resumed(whole, tmp_path):
    argv = [*BASELINE, "--checkpoint-dir", tmp_path, "--save-minutes", 1e-9]
    with pytest.raises(ZeroDivisionError):
        stopped("train_baseline_cifar", *argv, after=9, by=ZeroDivisionError())
    assert checkpoint(tmp_path / BASELINE_RUN)["order"] == {"seed": 0, "epoch": 1, "step": 2}
    run("train_baseline_cifar", *argv, "--resume")
    assert_same_run(tmp_path / BASELINE_RUN, whole)


@pytest.mark.slow
def test_a_crash_at_every_write(tmp_path, monkeypatch):
    """Before and after each file that a run replaces; a log's line may be cut off as well.

    The moving average of the weights is resumed too.
    """
    argv = [*BASELINE, "--ema-decay", "0.9", "--class-weights", "balanced", "--checkpoint-dir"]
    run("train_baseline_cifar", *argv, tmp_path / "whole")
    replace, folder = os.replace, tmp_path / "crashed" / BASELINE_RUN
    for crash_at in itertools.count(1):
        replaced = itertools.count(1)

        def crashing(source, target, crash_at=crash_at, replaced=replaced):
            number = next(replaced)
            if number != crash_at // 2 + 1 or crash_at % 2:
                replace(source, target)
            if number == crash_at // 2 + 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", crashing)
        resume = ["--resume"] if (folder / "args.json").exists() else []
        ended = status("train_baseline_cifar", *argv, tmp_path / "crashed", *resume)
        if ended != 130:
            break
        if (folder / "log.jsonl").exists():
            with open(folder / "log.jsonl", "a") as file:
                file.write('{"epoch": 3, "half a li')
    assert ended == 0 and crash_at > 7
    assert_same_run(folder, tmp_path / "whole" / BASELINE_RUN)


@pytest.mark.slow
def test_killed_twenty_times_at_random_moments(tmp_path):
    """With a save after each step. The children are forked from a server that has imported what they need."""
    argv = [*map(str, BASELINE), "--limit-batches", "100", "--checkpoint-dir"]
    run("train_baseline_cifar", *argv, tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_baseline_cifar", "torch.utils.tensorboard", "sklearn.datasets"])
    argv += [str(tmp_path), "--save-minutes", "1e-9", "--resume"]
    draw, last = random.Random(0), tmp_path / BASELINE_RUN / "resnet8.pth.tar"
    for _ in range(20):
        process = context.Process(target=run, args=("train_baseline_cifar", *argv))
        process.start()
        before, began = last.exists() and last.stat().st_mtime_ns, time.monotonic()
        if draw.random() < 0.8:  # once a step is saved
            while (last.exists() and last.stat().st_mtime_ns) == before and time.monotonic() < began + 100:
                time.sleep(0.001)
        process.join(draw.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run("train_baseline_cifar", *argv)
    assert_same_run(tmp_path / BASELINE_RUN, tmp_path / "whole" / BASELINE_RUN)


def test_a_run_under_nohup_outlives_its_terminal():
    with own_signal_handlers():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with launch.StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
    assert not stop.received


def test_a_run_resumes_with_its_own_teacher_only(tmp_path, capsys):
    """The teacher's file may move, but other weights are another run."""
    own, other = (save_teacher(tmp_path / name, "resnet8") for name in ("own.pth", "other.pth"))
    content = torch.load(other)
    content["net"]["conv1.weight"] += 1
    torch.save(content, other)
    argv = [*QUICK, "--arch", "resnet8", "--tarch", "resnet8", "--method", "kd", "--checkpoint-dir", tmp_path / "runs"]
    run("train_student_cifar", *argv, "--epochs", 1, "--tcheckpoint", own)
    argv += ["--epochs", 2, "--resume", "--tcheckpoint"]
    assert "a teacher of other weights" in refused(capsys, *argv, other, script="train_student_cifar")
    run("train_student_cifar", *argv, own.rename(tmp_path / "moved.pth"))


def test_a_finished_run_stays_as_it_is(copy, capsys, whole):
    folder, argv = copy
    run("train_baseline_cifar", *argv)
    assert_same_run(folder, whole)
    assert "best: top-1" in capsys.readouterr().out
    assert "is in epoch 3 already" in refused(capsys, *argv, "--epochs", 2)


def test_a_folder_that_holds_a_run_is_not_overwritten(copy, capsys):
    folder, argv = copy
    before = content_of(folder)
    assert str(folder) in refused(capsys, *argv[:-1])
    for name, old, new in (("init_lr", "0.05", "0.2"), ("milestones", "[1]", "[2]"), ("batch_size", "4", "5")):
        words = [f"--{name.replace('_', '-')}", new.strip("[]")]
        assert f"{name} {old} -> {new}" in refused(capsys, *argv, *words)
    (folder / "args.json").rename(folder / "moved")
    refused(capsys, *argv)
    (folder / "moved").rename(folder / "args.json")
    assert content_of(folder) == before
    run("train_baseline_cifar", *argv[:-1], "--tag", "other")
    assert content_of(folder) == before


def test_what_changes_by_rounding_alone_may_differ(copy, capsys):
    folder, argv = copy
    run("train_baseline_cifar", *argv, "--accumulate", 2, "--amp", "bf16")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--resume")]
    assert told == ["--resume: accumulate 1 -> 2", "--resume: amp off -> bf16"]
    assert json.loads((folder / "args.json").read_text())["accumulate"] == 2


def test_a_folder_in_use_or_not_writable(tmp_path, capsys):
    folder = tmp_path / BASELINE_RUN
    folder.mkdir()
    with filelock.FileLock(folder / ".lock"):
        assert "another process" in refused(capsys, *BASELINE, "--checkpoint-dir", tmp_path)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    refused(capsys, *BASELINE, "--checkpoint-dir", folder / ".lock")


def test_a_file_system_without_locks(tmp_path, capsys):
    with mock.patch.object(filelock.FileLock, "acquire", side_effect=NotImplementedError("no flock")):
        run("train_baseline_cifar", *QUICK_RUN, "--arch", "resnet8", "--checkpoint-dir", tmp_path)
    assert "no locks" in capsys.readouterr().err and len(log_lines(tmp_path / BASELINE_RUN)) == 1


def test_checkpoints_that_cannot_be_resumed(copy, capsys):
    """Cut off, other people's, with momentum of another shape."""
    folder, argv = copy
    last, content = folder / "resnet8.pth.tar", checkpoint(folder)
    content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(1)
    torch.save(content, last)
    assert "no checkpoint of this run" in refused(capsys, *argv)
    save_teacher(last, "resnet8")
    refused(capsys, *argv)
    last.write_bytes(last.read_bytes()[:1000])
    refused(capsys, *argv)


def test_a_missing_last_checkpoint_does_not_start_over(copy, capsys, whole):
    """The best epoch's checkpoint can take its place."""
    folder, argv = copy
    last, best = folder / "resnet8.pth.tar", folder / "resnet8_best.pth.tar"
    last.unlink()
    before = content_of(folder)
    assert "is missing" in refused(capsys, *argv)
    assert content_of(folder) == before
    shutil.copy(best, last)
    run("train_baseline_cifar", *argv)
    assert_same_run(folder, whole)


def test_diverged_training_ends_and_keeps_what_was_good(tmp_path, capsys):
    argv = [*QUICK, "--arch", "resnet8", "--checkpoint-dir", tmp_path, "--epochs"]
    run("train_baseline_cifar", *argv, 1)
    before = content_of(tmp_path / BASELINE_RUN)
    with mock.patch.object(trainer, "rate_factor", return_value=1e30):
        assert "diverged in epoch 2" in refused(capsys, *argv, 2, "--resume")
    after = content_of(tmp_path / BASELINE_RUN)
    assert all(after[name] == before[name] for name in before if name != "args.json")


def test_other_training_images_are_another_run(tmp_path, capsys):
    """`--data` may move, but what is there must be the same."""
    for name, count in (("here", 4), ("moved", 4), ("more", 6)):
        write_splits(tmp_path / name, [(8, 8)] * count, classes=["a"])
    argv = ["--arch", "resnet8", "--dataset", "imagefolder", "--batch-size", 2, "--checkpoint-dir", tmp_path]
    run("train_baseline_cifar", *argv, "--data", tmp_path / "here", "--epochs", 1)
    argv += ["--epochs", 2, "--resume", "--data"]
    assert "other training images" in refused(capsys, *argv, tmp_path / "more")
    run("train_baseline_cifar", *argv, tmp_path / "moved")


def scripted_accuracies(monkeypatch, values):
    """Make successive tests give these accuracies, of the backbone and of the best head alike."""
    given = iter(values)
    monkeypatch.setattr(trainer, "evaluate", lambda *_: {"top1": (value := next(given)), "aux1_joint": value})


def test_best_and_last(tmp_path, monkeypatch, capsys):
    """The first of equals is the best."""
    scripted_accuracies(monkeypatch, [10.0, 30.0, 30.0, 20.0])
    run("train_teacher_cifar", *QUICK, "--epochs", 4, "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path)
    assert "30.00 at epoch 2" in capsys.readouterr().out
    folder = tmp_path / TEACHER_RUN
    best, last = checkpoint(folder, best=True), checkpoint(folder)
    assert (best["epoch"], best["acc"]) == (2, 30.0)
    assert (last["epoch"], last["acc"], last["best"]["top1"]) == (4, 20.0, 30.0)
    assert [line["best/top1"] for line in log_lines(folder)] == [10.0, 30.0, 30.0, 30.0]
    assert not same(best["net"], last["net"])


def test_held_out_images_select(tmp_path, monkeypatch):
    # Per epoch the accuracy on the held-out images, then that on the test images.
    scripted_accuracies(monkeypatch, [50.0, 10.0, 40.0, 90.0])
    argv = [*QUICK, "--epochs", "2", "--arch", "resnet8_aux", "--val-split", "0.2", "--checkpoint-dir", tmp_path]
    run("train_teacher_cifar", *argv)
    assert checkpoint(tmp_path / TEACHER_RUN)["best"] == {"epoch": 1, "value": 50.0, "top1": 10.0, "net": None}
    assert checkpoint(tmp_path / TEACHER_RUN, best=True)["epoch"] == 1


def test_evaluate_tests_the_best_weights_and_writes_nothing(copy, capsys, tmp_path):
    """In the precision that they were trained in."""
    folder, argv = copy
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run("train_baseline_cifar", *argv[:-1], "--evaluate", "--amp", "auto")
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{folder}/resnet8_best.pth.tar, float32: ")
    assert f" top1 {checkpoint(folder, best=True)['acc']:.2f}," in line
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    refused(capsys, *argv[:-1], "--tag", "none", "--evaluate")
    assert [path.name for path in tmp_path.iterdir()] == [BASELINE_RUN]


def test_log_holds_every_term_and_every_heads_accuracy(teacher_run, whole):
    """The rate is that of an epoch's last step, with which the warm-up ends."""
    (record,) = log_lines(teacher_run)
    names = ["train/loss", "train/task", "train/aux", "train/top1", "test/top1", "test/top5", "test/loss"]
    heads = itertools.product(("train", "test"), (1, 2, 3), ("joint", "class"))
    assert {*names, *(f"{part}/aux{number}_{kind}" for part, number, kind in heads)} <= record.keys()
    assert record["train/loss"] == pytest.approx(record["train/task"] + record["train/aux"])
    assert [line["epoch"] for line in log_lines(whole)] == [1, 2, 3]
    assert [line["lr"] for line in log_lines(whole)] == pytest.approx([0.05, 0.05, 0.005])


def test_a_checkpoint_is_self_describing_and_loads_safely(teacher_run):
    for best in (True, False):
        content = checkpoint(teacher_run, best)
        assert {"optimizer", "versions", "rng", "order", "objective"} <= content.keys()
        told = [content[key] for key in ("arch", "num_classes", "rotations", "dataset", "method", "best_by")]
        assert told == ["resnet8_aux", 10, 4, "digits", "teacher", "joint"]
        assert content["info"]["class_names"] == list("0123456789") and content["info"]["size"] == 32
        assert len(content["info"]["mean"]) == len(content["info"]["std"]) == 3
        assert content["acc"] == log_lines(teacher_run)[content["epoch"] - 1]["test/top1"]
        assert content["args"].items() <= json.loads((teacher_run / "args.json").read_text()).items()
        assert (content["args"]["init_lr"], content["args"]["script"]) == (0.05, "train_teacher_cifar")
        assert content["net"].keys() == models.create("resnet8_aux", 10).state_dict().keys()
    assert list(teacher_run.glob("events.out.tfevents*")) and not list(teacher_run.glob("*.tmp"))


def test_a_frozen_backbone_stays_as_it_is(tmp_path):
    """Bit-exactly; the digest of its file is recorded."""
    weights = save_teacher(tmp_path / "backbone.pth", "resnet8")
    argv = [*QUICK_RUN, "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path]
    run("train_teacher_cifar", *argv, "--freezed", "--pretrained-backbone", weights)
    state, start = checkpoint(tmp_path / TEACHER_RUN)["net"], torch.load(weights, weights_only=True)["net"]
    assert all(torch.equal(state[f"backbone.{key}"], value) for key, value in start.items())
    assert "train/task" not in log_lines(tmp_path / TEACHER_RUN)[0]
    assert str(weights) in json.loads((tmp_path / TEACHER_RUN / "args.json").read_text())["digests"]


def test_a_pair_names_its_better_network(tmp_path, capsys):
    argv = [*QUICK, "--epochs", "1", "--arch", "resnet8_resnet8", "--checkpoint-dir", tmp_path]
    run("train_online_kd_cifar", *argv)
    (folder,) = tmp_path.iterdir()
    net = checkpoint(folder)["best"]["net"]
    assert f"at epoch 1 of network {net} (" in capsys.readouterr().out and log_lines(folder)[0]["best/net"] == net


@pytest.mark.parametrize("where", ["torch.save", "tensorboard.summary.writer.record_writer.RecordWriter.write"])
def test_a_full_disk_is_one_line(where, tmp_path, capsys):
    """At a checkpoint, and in TensorBoard's thread, which hands its error on; the run can be resumed."""
    argv = [*QUICK_RUN, "--arch", "resnet8", "--checkpoint-dir", tmp_path]
    with mock.patch(where, side_effect=OSError(errno.ENOSPC, "No space left on device")):
        assert status("train_baseline_cifar", *argv) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error
    run("train_baseline_cifar", *argv, "--resume")
