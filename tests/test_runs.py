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
from scripts import QUICK, assert_same_run, checkpoint, log_lines, refused, run, save_teacher, status, stopped
from training import launch, progress, trainer

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


def content_of(folder):
    """Return name -> content of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with launch.StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert not stop.received


def test_a_run_resumes_with_its_own_teacher_only(tmp_path, capsys):
    """The teacher's file may move, but other weights are another run."""
    own, other = (save_teacher(tmp_path / f"{seed}.pth", "resnet8", seed=seed) for seed in (1, 2))
    argv = [*QUICK, "--arch", "resnet8", "--tarch", "resnet8", "--method", "kd", "--checkpoint-dir", tmp_path / "runs"]
    run("train_student_cifar", *argv, "--epochs", 1, "--tcheckpoint", own)
    argv += ["--epochs", 2, "--resume", "--tcheckpoint"]
    assert "a teacher of other weights" in refused(capsys, *argv, other, script="train_student_cifar")
    run("train_student_cifar", *argv, own.rename(tmp_path / "moved.pth"))


def test_a_finished_run_stays_as_it_is(copy, capsys, whole):
    folder, argv = copy
    run("train_baseline_cifar", *argv)
    assert_same_run(folder, whole)
    assert [line["lr"] for line in log_lines(folder)] == pytest.approx([0.05, 0.05, 0.005])  # at an epoch's last step
    assert "best: top-1" in capsys.readouterr().out
    assert "is in epoch 3 already" in refused(capsys, *argv, "--epochs", 2)


def test_a_folder_that_holds_a_run_is_not_overwritten(copy, capsys):
    folder, argv = copy
    before = content_of(folder)
    assert str(folder) in refused(capsys, *argv[:-1])
    for name, old, new in (("init_lr", "0.05", "0.2"), ("milestones", "[1]", "[2]"), ("batch_size", "4", "5")):
        words = [f"--{name.replace('_', '-')}", new.strip("[]")]
        assert f"{name} {old} -> {new}" in refused(capsys, *argv, *words)
    run("train_baseline_cifar", *argv[:-1], "--tag", "other")
    assert content_of(folder) == before


def test_what_changes_by_rounding_alone_may_differ(copy, capsys):
    folder, argv = copy
    run("train_baseline_cifar", *argv, "--accumulate", 2, "--amp", "fp16", "--num-workers", 9)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--resume")]
    assert told[:2] == ["--resume: accumulate 1 -> 2", "--resume: amp off -> fp16"]
    assert told[2].startswith("--resume: num_workers ") and len(told) == 3
    assert json.loads((folder / "args.json").read_text())["accumulate"] == 2


def test_a_folder_in_use_or_not_writable(tmp_path, capsys):
    folder = tmp_path / BASELINE_RUN
    folder.mkdir()
    with filelock.FileLock(folder / ".lock"):
        assert "another process" in refused(capsys, *BASELINE, "--checkpoint-dir", tmp_path)
    refused(capsys, *BASELINE, "--checkpoint-dir", folder / ".lock")


def test_a_file_system_without_locks(tmp_path, capsys):
    with mock.patch.object(filelock.FileLock, "acquire", side_effect=NotImplementedError("no flock")):
        run("train_baseline_cifar", *QUICK, "--epochs", "1", "--arch", "resnet8", "--checkpoint-dir", tmp_path)
    assert "no locks" in capsys.readouterr().err and len(log_lines(tmp_path / BASELINE_RUN)) == 1


def test_checkpoints_that_cannot_be_resumed(copy, capsys):
    """Other people's, and one that is cut off."""
    folder, argv = copy
    last = save_teacher(folder / "resnet8.pth.tar", "resnet8")
    refused(capsys, *argv)
    last.write_bytes(last.read_bytes()[:1000])
    refused(capsys, *argv)


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


def test_held_out_images_select(tmp_path, monkeypatch):
    given = iter([50.0, 10.0, 40.0, 90.0])  # per epoch the accuracy on the held-out images, then on the test images
    monkeypatch.setattr(trainer, "evaluate", lambda *_: {"top1": next(given)})
    argv = [*QUICK, "--epochs", "2", "--arch", "resnet8", "--val-split", "0.2", "--checkpoint-dir", tmp_path]
    run("train_baseline_cifar", *argv)
    assert checkpoint(tmp_path / BASELINE_RUN)["best"] == {"epoch": 1, "value": 50.0, "top1": 10.0, "net": None}
    assert checkpoint(tmp_path / BASELINE_RUN, best=True)["epoch"] == 1


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
    assert "mean" in refused(capsys, *argv[:-1], "--mean", "0.5", "--std", "0.5", "--evaluate")
    assert [path.name for path in tmp_path.iterdir()] == [BASELINE_RUN]


def test_a_teachers_log_and_checkpoints(tmp_path):
    """Every term and every head's accuracy is logged; checkpoints are self-describing, and load safely."""
    run("train_teacher_cifar", *QUICK, "--epochs", "1", "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path)
    folder = tmp_path / TEACHER_RUN
    (record,) = log_lines(folder)
    names = ["train/loss", "train/task", "train/aux", "train/top1", "test/top1", "test/top5", "test/loss"]
    heads = itertools.product(("train", "test"), (1, 2, 3), ("joint", "class"))
    assert {*names, *(f"{part}/aux{number}_{kind}" for part, number, kind in heads)} <= record.keys()
    assert record["train/loss"] == pytest.approx(record["train/task"] + record["train/aux"])
    for best in (True, False):
        content = checkpoint(folder, best)
        assert {"optimizer", "versions", "rng", "order", "objective"} <= content.keys()
        told = [content[key] for key in ("arch", "num_classes", "rotations", "dataset", "method", "best_by")]
        assert told == ["resnet8_aux", 10, 4, "digits", "teacher", "joint"]
        assert content["info"]["class_names"] == list("0123456789") and content["info"]["size"] == 32
        assert len(content["info"]["mean"]) == len(content["info"]["std"]) == 3
        assert (content["acc"], content["epoch"]) == (record["test/top1"], 1)
        assert content["args"].items() <= json.loads((folder / "args.json").read_text()).items()
        assert content["net"].keys() == models.create("resnet8_aux", 10).state_dict().keys()
    assert list(folder.glob("events.out.tfevents*")) and not list(folder.glob("*.tmp"))


@pytest.mark.slow
def test_a_frozen_backbone_stays_as_it_is(tmp_path):
    """Bit-exactly; the digest of its file is recorded."""
    weights = save_teacher(tmp_path / "backbone.pth", "resnet8")
    argv = [*QUICK, "--epochs", "1", "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path]
    run("train_teacher_cifar", *argv, "--freezed", "--pretrained-backbone", weights)
    state, start = checkpoint(tmp_path / TEACHER_RUN)["net"], torch.load(weights, weights_only=True)["net"]
    assert all(torch.equal(state[f"backbone.{key}"], value) for key, value in start.items())
    assert "train/task" not in log_lines(tmp_path / TEACHER_RUN)[0]
    assert str(weights) in json.loads((tmp_path / TEACHER_RUN / "args.json").read_text())["digests"]


def test_a_line_every_two_minutes_without_a_terminal(monkeypatch, capsys):
    """Of steps that take 50 seconds each."""
    clock = itertools.count(0, 50)
    monkeypatch.setattr(progress, "time", mock.Mock(monotonic=lambda: next(clock)))
    shown = progress.Progress("epoch 1/3", 0, 100, True, lambda: {"loss": 0.5})
    for _ in range(8):
        shown.update()
    assert capsys.readouterr().out.splitlines() == [f"epoch 1/3, step {n}/100: loss 0.50" for n in (3, 5, 8)]


@pytest.mark.slow
def test_a_pair_names_its_better_network(tmp_path, capsys):
    argv = [*QUICK, "--epochs", "1", "--arch", "resnet8_resnet8", "--checkpoint-dir", tmp_path]
    run("train_online_kd_cifar", *argv)
    (folder,) = tmp_path.iterdir()
    net = checkpoint(folder)["best"]["net"]
    assert f"at epoch 1 of network {net} (" in capsys.readouterr().out and log_lines(folder)[0]["best/net"] == net


@pytest.mark.parametrize("where", ["torch.save", "tensorboard.summary.writer.record_writer.RecordWriter.write"])
def test_a_full_disk_is_one_line(where, tmp_path, capsys):
    """At a checkpoint, and in TensorBoard's thread, which hands its error on; the run can be resumed."""
    argv = [*QUICK, "--epochs", "1", "--arch", "resnet8", "--checkpoint-dir", tmp_path]
    with mock.patch(where, side_effect=OSError(errno.ENOSPC, "No space left on device")):
        assert status("train_baseline_cifar", *argv) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error
    run("train_baseline_cifar", *argv, "--resume")
