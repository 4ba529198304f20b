"""Runs: interrupted and resumed to the bit, folders that are never overwritten, best and last, logs."""

import argparse
import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from scripts import QUICK, QUICK_RUN, log_lines, run, save_teacher, status

import engine
import launcher
import losses
import models
import runs
import utils

ROOT = Path(__file__).parents[1]
TEACHER_RUN = "train_teacher_cifar_arch_resnet8_aux_dataset_digits_seed0"
STUDENT_RUN = "train_student_cifar_tarch_resnet8_aux_arch_resnet8_aux_dataset_digits_seed0"
# Warm-up and a milestone, so that the rate differs at every step and epoch.
SCHEDULE = ("--epochs", "3", "--milestones", "2", "--warmup-epoch", "1")
TEACHER = (
    "--arch",
    "resnet8_aux",
    *SCHEDULE,
    "--amp",
    "off",
    "--dataset",
    "digits",
    "--batch-size",
    "4",
    "--limit-batches",
    "6",
)
STUDENT = (*QUICK, *SCHEDULE, "--arch", "resnet8_aux", "--tarch", "resnet8_aux")


@pytest.fixture(scope="module")
def whole_teacher(tmp_path_factory):
    """Return the folder of a teacher's run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run("train_teacher_cifar", *TEACHER, "--checkpoint-dir", folder)
    return folder / TEACHER_RUN


def checkpoint(folder):
    """Return a run folder's last checkpoint."""
    return torch.load(folder / "resnet8_aux.pth.tar", weights_only=True)


def same(a, b):
    """Say whether two checkpoints' contents are equal to the bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(found, expected):
    """Check that two run folders hold the same run to the bit, whatever their timings and places."""
    found_state, expected_state = checkpoint(found), checkpoint(expected)
    for key in ("net", "optimizer", "objective", "best", "acc", "epoch", "rng", "order", "scaler"):
        assert same(found_state[key], expected_state[key]), key
    assert log_lines(found) == log_lines(expected)
    best = [torch.load(folder / "resnet8_aux_best.pth.tar", weights_only=True)["net"] for folder in (found, expected)]
    assert same(*best)


def interrupt(monkeypatch, script, argv, epoch, step):
    """Run a script and ask it to stop after `step` steps of `epoch` (from 0), as a signal does."""
    seen = []

    def agreed(self, world, done, steps):
        seen.append(done == 1)
        return sum(seen) == epoch + 1 and done == step

    with monkeypatch.context() as patch:
        patch.setattr(engine.StopSignal, "agreed", agreed)
        with pytest.raises(SystemExit) as stop:
            run(script, *argv)
    assert stop.value.code == 143


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_run_resumes_to_the_bit(number, whole_teacher, tmp_path):
    argv = [*TEACHER, "--checkpoint-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "train_teacher_cifar.py", *argv], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    folder = tmp_path / TEACHER_RUN
    deadline = time.monotonic() + 120
    while not (folder / "resnet8_aux.pth.tar").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    stopped_at = checkpoint(folder)["order"]
    if number == signal.SIGTERM:
        assert process.returncode == 143 and "go on with --resume" in output
        assert stopped_at["epoch"] in (1, 2) and stopped_at["step"] > 0
    else:
        assert process.returncode == -signal.SIGKILL and stopped_at["epoch"] in (0, 1, 2)
    run("train_teacher_cifar", *argv, "--resume")
    assert_same_run(folder, whole_teacher)


def test_dpcd_resumes_to_the_bit_with_its_running_state(tmp_path, monkeypatch):
    teacher = save_teacher(tmp_path / "t.pth")
    argv = [*STUDENT, "--tcheckpoint", teacher, "--method", "dpcd", "--history", "5", "--checkpoint-dir"]
    run("train_student_cifar", *argv, tmp_path / "whole")
    interrupted = [*argv, tmp_path / "interrupted"]
    interrupt(monkeypatch, "train_student_cifar", interrupted, epoch=1, step=1)
    folder = tmp_path / "interrupted" / STUDENT_RUN
    middle = checkpoint(folder)
    assert middle["order"] == {"seed": 0, "epoch": 1, "step": 1} and middle["objective"]["count"] == 12
    # And once more, between the last step of an epoch and its test.
    interrupt(monkeypatch, "train_student_cifar", [*interrupted, "--resume"], epoch=-1, step=2)
    assert checkpoint(folder)["order"]["step"] == 2
    run("train_student_cifar", *interrupted, "--resume")
    assert_same_run(folder, tmp_path / "whole" / STUDENT_RUN)


def test_a_run_goes_on_with_its_own_teacher_only(tmp_path):
    """The teacher's file may move, but other weights are another run."""
    own, other = (save_teacher(tmp_path / name) for name in ("own.pth", "other.pth"))
    content = torch.load(other)
    content["net"]["backbone.conv1.weight"] += 1
    torch.save(content, other)
    argv = ["--arch", "resnet8_aux", "--tarch", "resnet8_aux", *QUICK, "--checkpoint-dir", tmp_path / "runs"]
    run("train_student_cifar", *argv, "--epochs", 1, "--tcheckpoint", own)
    with pytest.raises(utils.UserError, match="has a teacher of other weights"):
        run("train_student_cifar", *argv, "--epochs", 2, "--resume", "--tcheckpoint", other)
    run("train_student_cifar", *argv, "--epochs", 2, "--resume", "--tcheckpoint", own.rename(tmp_path / "moved.pth"))


def test_crash_between_log_and_checkpoint_logs_each_epoch_once(tmp_path, monkeypatch, whole_teacher):
    argv = [*TEACHER, "--checkpoint-dir", tmp_path]
    save = engine.Run.save
    for epoch in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(engine.Run, "save", lambda run, best=False, n=epoch: save(run, best) if run.epoch < n else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run("train_teacher_cifar", *argv, *(["--resume"] if epoch > 1 else []))
        assert len(log_lines(tmp_path / TEACHER_RUN)) == epoch
    with open(tmp_path / TEACHER_RUN / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "half a li')
    run("train_teacher_cifar", *argv, "--resume")
    assert_same_run(tmp_path / TEACHER_RUN, whole_teacher)


def test_a_lost_log_is_told(tmp_path, capsys, whole_teacher):
    """And goes on with the epochs that are still to come; one that holds all is not warned of."""
    shutil.copytree(whole_teacher, tmp_path / TEACHER_RUN)
    run("train_teacher_cifar", *TEACHER, "--checkpoint-dir", tmp_path, "--resume")
    assert "warning" not in capsys.readouterr().err
    (tmp_path / TEACHER_RUN / "log.jsonl").unlink()
    run("train_teacher_cifar", *TEACHER, "--checkpoint-dir", tmp_path, "--resume")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "log.jsonl: 3 of the 3 epochs trained so far are missing" in told


def test_finished_run_resumed_stays_as_it_is(whole_teacher, capsys):
    before = checkpoint(whole_teacher)
    run("train_teacher_cifar", *TEACHER, "--checkpoint-dir", whole_teacher.parent, "--resume")
    assert same(checkpoint(whole_teacher)["net"], before["net"]) and len(log_lines(whole_teacher)) == 3
    assert "best top-1" in capsys.readouterr().out


def test_folder_that_holds_a_run_is_not_overwritten(whole_teacher, capsys):
    here = ["--checkpoint-dir", whole_teacher.parent]
    before = {path.name: path.read_bytes() for path in whole_teacher.iterdir() if path.is_file()}
    assert status("train_teacher_cifar", *TEACHER, *here) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "--tag" in error and str(whole_teacher) in error
    for change, said in (
        (["--init-lr", "0.2"], "init_lr 0.05 -> 0.2"),
        (["--milestones", "1"], "milestones [2] -> [1]"),
        (["--batch-size", "5"], "batch_size 4 -> 5"),
    ):
        assert status("train_teacher_cifar", *TEACHER, *here, "--resume", *change) == 2
        error = capsys.readouterr().err
        assert said in error and "--tag" in error
    (whole_teacher / "args.json").rename(whole_teacher / "moved")
    assert status("train_teacher_cifar", *TEACHER, *here, "--resume") == 2
    (whole_teacher / "moved").rename(whole_teacher / "args.json")
    assert before == {path.name: path.read_bytes() for path in whole_teacher.iterdir() if path.is_file()}


def test_tag_names_another_folder(tmp_path):
    for tag in ("a", "b"):
        run("train_baseline_cifar", *QUICK_RUN, "--arch", "resnet8", "--checkpoint-dir", tmp_path, "--tag", tag)
    base = "train_baseline_cifar_arch_resnet8_dataset_digits_seed0"
    assert {path.name for path in tmp_path.iterdir()} == {f"{base}_a", f"{base}_b"}


def test_folder_in_use_is_refused(tmp_path, capsys):
    import fcntl

    folder = tmp_path / TEACHER_RUN
    folder.mkdir()
    with open(folder / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert status("train_teacher_cifar", *TEACHER, "--checkpoint-dir", tmp_path) == 2
    assert "another process is training in this folder" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert status("train_teacher_cifar", *TEACHER, "--checkpoint-dir", tmp_path / "file") == 2
    assert "cannot write" in capsys.readouterr().err


def test_damaged_last_checkpoint_is_told(tmp_path, capsys):
    argv = [*QUICK_RUN, "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path]
    run("train_teacher_cifar", *argv)
    last = tmp_path / TEACHER_RUN / "resnet8_aux.pth.tar"
    last.write_bytes(last.read_bytes()[:1000])
    assert status("train_teacher_cifar", *argv, "--resume") == 2
    told = capsys.readouterr().err
    assert "resnet8_aux.pth.tar: corrupt" in told and "copy resnet8_aux_best.pth.tar over it" in told
    save_teacher(last)
    assert status("train_teacher_cifar", *argv, "--resume") == 2
    assert "no checkpoint of this project to resume from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"args": {1: "a", "b": 2}},
        {"order": {"epoch": 0, "step": -1}},
        {"order": {"epoch": 0, "step": 99}},
        {"order": {"epoch": None, "step": 0}},
        {"best": None},
        {"optimizer": "momentum"},
    ],
)
def test_checkpoint_that_was_edited(change, tmp_path, capsys, whole_teacher):
    """No crash later on, and of momentum too short none of the whole process."""
    folder = tmp_path / TEACHER_RUN
    shutil.copytree(whole_teacher, folder)
    content = checkpoint(folder)
    if change == {"optimizer": "momentum"}:
        content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(1)
        change = {}
    torch.save({**content, **change}, folder / "resnet8_aux.pth.tar")
    assert "no checkpoint of this project to resume from" in refused(capsys, *TEACHER, "--checkpoint-dir", tmp_path)


def refused(capsys, *argv):
    """Run the teacher's script with --resume, which must end in one line and status 2; return the line."""
    assert status("train_teacher_cifar", *argv, "--resume") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    return line


def test_missing_last_checkpoint_does_not_start_over(tmp_path, capsys, whole_teacher):
    """Only a run killed before its first checkpoint starts again; the best epoch's checkpoint can take its place."""
    argv, folder = [*TEACHER, "--checkpoint-dir", tmp_path], tmp_path / TEACHER_RUN
    shutil.copytree(whole_teacher, folder)
    last, best = folder / "resnet8_aux.pth.tar", folder / "resnet8_aux_best.pth.tar"
    kept = last.read_bytes()
    last.unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "is missing: put it back, or copy resnet8_aux_best.pth.tar over it" in refused(capsys, *argv)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shutil.copy(best, last)
    run("train_teacher_cifar", *argv, "--resume")
    assert same(torch.load(last, weights_only=True)["net"], torch.load(io.BytesIO(kept), weights_only=True)["net"])
    last.unlink()
    (folder / "log.jsonl").write_text((folder / "log.jsonl").read_text().splitlines()[0])
    best.unlink()
    assert "is missing: put it back, or start anew with --tag" in refused(capsys, *argv)
    (folder / "log.jsonl").unlink()
    run("train_teacher_cifar", *argv, "--resume")
    assert log_lines(folder) == log_lines(whole_teacher)
    assert same(torch.load(last, weights_only=True)["net"], torch.load(io.BytesIO(kept), weights_only=True)["net"])


def test_killed_between_the_first_best_and_last_checkpoint(tmp_path, whole_teacher):
    argv, save, saved = [*TEACHER, "--checkpoint-dir", tmp_path], utils.save_checkpoint, []

    def killed(content, path):
        save(content, path)
        saved.append(path.name)
        if path.name.endswith("_best.pth.tar"):
            raise KeyboardInterrupt

    with mock.patch.object(utils, "save_checkpoint", killed):
        assert status("train_teacher_cifar", *argv) == 130
    assert saved == ["resnet8_aux.pth.tar", "resnet8_aux_best.pth.tar"]
    run("train_teacher_cifar", *argv, "--resume")
    assert_same_run(tmp_path / TEACHER_RUN, whole_teacher)


def test_float16_diverges_by_its_loss(tmp_path, capsys):
    """The scaler skips the steps that would spoil the weights; a folder without an epoch holds no run."""
    argv = [*QUICK_RUN, "--amp", "fp16", "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path]
    with mock.patch.object(losses, "cross_entropy", lambda logits, labels: logits.float().sum() * math.nan):
        assert "training diverged in epoch 1" in refused(capsys, *argv)
    run("train_teacher_cifar", *argv, "--init-lr", 0.01)


def test_resumption_of_something_else(tmp_path, capsys, whole_teacher):
    """Fewer epochs than are done, another run's checkpoint, settings that are none; a log in no known encoding is read."""
    argv, folder = [*TEACHER, "--checkpoint-dir", tmp_path], tmp_path / TEACHER_RUN
    shutil.copytree(whole_teacher, folder)
    settings = (folder / "args.json").read_text()
    assert "is in epoch 3 already" in refused(capsys, *argv, "--epochs", 2)
    assert (folder / "args.json").read_text() == settings
    (folder / "log.jsonl").write_bytes((folder / "log.jsonl").read_bytes() + b"\xff\xfe\n")
    run("train_teacher_cifar", *argv, "--resume")
    assert log_lines(folder) == log_lines(whole_teacher)
    (folder / "args.json").write_text("[1, 2]")
    assert "args.json is missing or unreadable" in refused(capsys, *argv)
    (folder / "args.json").write_text(settings)
    run("train_teacher_cifar", *argv, "--tag", "other", "--init-lr", 0.01)
    shutil.copy(tmp_path / f"{TEACHER_RUN}_other" / "resnet8_aux.pth.tar", folder)
    assert "with other settings (init_lr 0.01 -> 0.05" in refused(capsys, *argv)


def test_other_training_images_are_another_run(tmp_path, capsys):
    """`--data` may move, but what is there must be the same; torchrun's restarts take up their own launch's folder alone."""
    for name, label, count in (("here", "a", 4), ("moved", "a", 4), ("more", "a", 6), ("other", "b", 4)):
        for split, number in itertools.product(("train", "val"), range(count)):
            (tmp_path / name / split / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * number, 9, 9)).save(tmp_path / name / split / label / f"{number}.png")
    argv = ["--arch", "resnet8_aux", "--dataset", "imagefolder", "--batch-size", 2, "--amp", "off"]
    argv += ["--checkpoint-dir", tmp_path]
    run("train_teacher_cifar", *argv, "--data", tmp_path / "here", "--epochs", 1)
    told = refused(capsys, *argv, "--data", tmp_path / "more", "--epochs", 2)
    assert "has other training images: {'images': 4, 'size': 8, " in told
    run("train_teacher_cifar", *argv, "--data", tmp_path / "moved", "--epochs", 2, "--resume")
    capsys.readouterr()
    run("train_teacher_cifar", *argv, "--data", tmp_path / "other", "--evaluate")
    assert "_best.pth.tar: trained on the classes of another data set (imagefolder)" in capsys.readouterr().err


def test_restarts_of_a_launch_take_up_its_own_folder_alone(tmp_path, capsys, monkeypatch):
    """Another launch may have the same --rdzv-id."""
    argv = [*QUICK_RUN, "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    run("train_teacher_cifar", *argv)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("train_teacher_cifar", *argv)
    monkeypatch.setattr(launcher, "PARENT", 1)
    with pytest.raises(utils.UserError, match="already holds a run"):
        run("train_teacher_cifar", *argv)


def test_diverged_training_ends_and_keeps_what_was_good(tmp_path, capsys, monkeypatch):
    argv = [*QUICK, "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path]
    run("train_teacher_cifar", *argv, "--epochs", 1)
    folder = tmp_path / TEACHER_RUN
    good = (folder / "resnet8_aux.pth.tar").read_bytes(), (folder / "log.jsonl").read_text()
    monkeypatch.setattr(utils, "learning_rate", lambda *_: 1e30)
    capsys.readouterr()
    assert "training diverged in epoch 2: loss or weights not finite" in refused(capsys, *argv, "--epochs", 2)
    assert good == ((folder / "resnet8_aux.pth.tar").read_bytes(), (folder / "log.jsonl").read_text())


def test_infinite_numbers_are_logged_as_null(tmp_path):
    folder = argparse.Namespace(path=tmp_path, log=tmp_path / "log.jsonl")
    log = runs.RunLog(folder)
    log.write({"epoch": 1, "train/loss": math.inf, "test/loss": math.nan, "test/top1": 1.0})
    log.events.close()
    assert json.loads(folder.log.read_text()) == {"epoch": 1, "train/loss": None, "test/loss": None, "test/top1": 1.0}


def test_batch_that_batchnorm_cannot_train_on(tmp_path, capsys):
    """One image whose last feature map is one pixel."""
    for split, number in itertools.product(("train", "val"), range(5)):
        (tmp_path / split / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 9, 9)).save(tmp_path / split / "a" / f"{number}.png")
    argv = ["--dataset", "imagefolder", "--data", tmp_path, "--batch-size", 4, "--amp", "off", "--checkpoint-dir", tmp_path]
    assert status("train_baseline_cifar", "--arch", "vgg8_bn", *argv) == 2
    assert "vgg8_bn cannot train on a batch of 1 image of this size" in capsys.readouterr().err


def test_logs_and_settings_that_another_program_wrote(tmp_path):
    """Lines without an epoch's whole number are none of a run's."""
    deep = "[" * 100_000
    (tmp_path / "log.jsonl").write_text(f'{{"epoch": "1"}}\n{{"epoch": 2.5}}\n{{"epoch": true}}\n{deep}\n[1]\n{{"epoch": 2}}\n')
    assert runs.read_log(tmp_path / "log.jsonl") == [{"epoch": 2}]
    folder = runs.RunFolder(
        "train_x", argparse.Namespace(checkpoint_dir=tmp_path, arch="a", dataset="d", manual_seed=0, tag=None)
    )
    folder.path.mkdir()
    folder.arguments.write_text(deep)
    with pytest.raises(utils.UserError, match="args.json is missing or unreadable"):
        folder.written_settings()
    (folder.path / ".lock").write_bytes(b"\xff")
    assert not folder.was_claimed_by("here 1")


def test_a_full_gpu_is_not_told_as_a_foreign_checkpoint():
    """The optimizer's state goes to the device when a run is resumed."""
    with pytest.raises(torch.OutOfMemoryError), runs.foreign_checkpoint_explained("a.pth.tar"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def scripted_accuracies(monkeypatch, values):
    """Make the tests of successive epochs give these top-1 accuracies on (test, val)."""
    given = iter(values)

    def evaluate(model, batches, device, dtype=None, heads=False, net=None):
        accuracies = next(given)
        return {"loss": 0.0, "top1": accuracies, "top5": 100.0}

    monkeypatch.setattr(engine, "evaluate", evaluate)


def test_best_and_last(tmp_path, monkeypatch, capsys):
    scripted_accuracies(monkeypatch, [10.0, 30.0, 20.0])
    argv = [*QUICK, "--epochs", "3", "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path]
    run("train_teacher_cifar", *argv)
    output = capsys.readouterr().out
    assert "best top-1 30.00 at epoch 2 (selected on the test set), last 20.00" in output
    folder = tmp_path / TEACHER_RUN
    best = torch.load(folder / "resnet8_aux_best.pth.tar", weights_only=True)
    assert (best["epoch"], best["acc"]) == (2, 30.0)
    assert (checkpoint(folder)["epoch"], checkpoint(folder)["acc"], checkpoint(folder)["best"]["acc"]) == (3, 20.0, 30.0)
    assert [line["best/top1"] for line in log_lines(folder)] == [10.0, 30.0, 30.0]
    assert not same(best["net"], checkpoint(folder)["net"])


def test_an_epoch_is_saved_before_its_test(tmp_path):
    """A launcher or scheduler may not wait for a long test: the resumed run makes up for the test alone."""
    command = ["--arch", "resnet8", "--dataset", "digits", "--epochs", 1, "--milestones", 1, "--limit-batches", 2]
    command += ["--checkpoint-dir", tmp_path]
    with mock.patch.object(engine, "evaluate", side_effect=KeyboardInterrupt):
        assert status("train_baseline_cifar", *command) == 130
    run("train_baseline_cifar", *command, "--resume")
    (entry,) = [json.loads(line) for line in next(tmp_path.glob("*/log.jsonl")).read_text().splitlines()]
    assert entry["images_per_second"] is None and entry["test/top1"] >= 0 and entry["train/loss"] > 0


def test_full_disk_at_a_checkpoint(tmp_path, monkeypatch):
    """The old file stays, the half-written one goes."""
    utils.save_checkpoint({"epoch": 1}, tmp_path / "w.pth.tar")
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=RuntimeError("[enforce fail] unexpected pos 64 vs 0")))
    with pytest.raises(utils.UserError, match="cannot write .*w.pth.tar: .*; is the disk full?"):
        utils.save_checkpoint({"epoch": 2}, tmp_path / "w.pth.tar")
    assert utils.read_checkpoint(tmp_path / "w.pth.tar") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth.tar"]


def test_full_disk_at_tensorboards_file(tmp_path, capsys):
    full = OSError(errno.ENOSPC, "No space left on device")
    argv = [*QUICK_RUN, "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path]
    with mock.patch("torch.utils.tensorboard.SummaryWriter", side_effect=full):
        assert status("train_teacher_cifar", *argv) == 2
    assert "cannot write TensorBoard's events" in capsys.readouterr().err
    run("train_teacher_cifar", *argv)


def test_full_disk_in_tensorboards_thread(tmp_path, monkeypatch, capsys):
    """It hands its error on, so no traceback of its own is printed beside the one line; other threads' errors are."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("tensorboard.summary.writer.record_writer.RecordWriter.write", side_effect=full):
        assert status("train_teacher_cifar", *QUICK_RUN, "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path) == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told and "Traceback" not in told
    thread = threading.Thread(target=os.stat, args=(tmp_path / "absent",))
    thread.start()
    thread.join()
    assert "FileNotFoundError" in capsys.readouterr().err


def test_held_out_images_select(tmp_path, monkeypatch, capsys):
    # Per epoch the accuracy on the held-out images, then that on the test images.
    scripted_accuracies(monkeypatch, [50.0, 10.0, 40.0, 90.0])
    argv = [*QUICK, "--epochs", "2", "--arch", "resnet8_aux", "--val-split", "0.2", "--checkpoint-dir", tmp_path]
    run("train_teacher_cifar", *argv)
    assert (
        "best top-1 10.00 at epoch 1 (selected on held-out training images, 50.00 there), last 90.00" in capsys.readouterr().out
    )
    assert torch.load(tmp_path / TEACHER_RUN / "resnet8_aux_best.pth.tar", weights_only=True)["epoch"] == 1
    assert {"val/top1", "test/top1"} <= log_lines(tmp_path / TEACHER_RUN)[0].keys()


def test_evaluate_tests_the_best_weights_and_writes_nothing(whole_teacher, capsys, tmp_path, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in whole_teacher.iterdir()}
    run("train_teacher_cifar", *TEACHER, "--checkpoint-dir", whole_teacher.parent, "--evaluate")
    output = capsys.readouterr().out
    assert "resnet8_aux_best.pth.tar" in output and "aux3_joint" in output
    assert "resnet8_aux_best.pth.tar, float32: " in output
    monkeypatch.setattr(engine, "resolve_precision", lambda amp, device: torch.bfloat16)
    run("train_teacher_cifar", *TEACHER, "--checkpoint-dir", whole_teacher.parent, "--evaluate", "--amp", "auto")
    assert capsys.readouterr().out == output  # in the precision it was trained in
    top1 = float(output.split(" top1 ")[1].split(",")[0])
    assert top1 == round(max(line["test/top1"] for line in log_lines(whole_teacher)), 2)
    assert before == {path.name: path.stat().st_mtime_ns for path in whole_teacher.iterdir()}
    assert status("train_teacher_cifar", *TEACHER, "--checkpoint-dir", tmp_path, "--evaluate") == 2
    assert "nothing has been trained in" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_log_holds_every_term_and_every_heads_accuracy(whole_teacher):
    first, *_, last = log_lines(whole_teacher)
    heads = [f"aux{n}_{kind}" for n in (1, 2, 3) for kind in ("joint", "class")]
    assert {
        "epoch",
        "lr",
        "train/loss",
        "train/task",
        "train/aux",
        "train/top1",
        "test/top1",
        "test/top5",
        "test/loss",
    } <= first.keys()
    assert {f"train/{name}" for name in heads} <= first.keys()
    assert {f"test/{name}" for name in heads} <= last.keys()
    assert first["train/loss"] == pytest.approx(first["train/task"] + first["train/aux"])
    assert [line["epoch"] for line in log_lines(whole_teacher)] == [1, 2, 3]
    assert last["lr"] == pytest.approx(0.005)
    stored = json.loads((whole_teacher / "args.json").read_text())
    assert (stored["arch"], stored["init_lr"], stored["script"]) == ("resnet8_aux", 0.05, "train_teacher_cifar")


def test_schedule():
    from argparse import Namespace

    args = Namespace(init_lr=0.1, warmup_epoch=2, milestones=[3, 5])
    rates = [utils.learning_rate(args, epoch) for epoch in range(7)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert utils.learning_rate(args, 1, 0.5) == pytest.approx(0.075)


def test_warm_up_ends_with_its_last_step(whole_teacher):
    """The rate of an epoch's last step is logged; the first step's is above 0, or it would teach nothing."""
    assert [line["lr"] for line in log_lines(whole_teacher)] == pytest.approx([0.05, 0.05, 0.005])


def test_frozen_backbone_is_the_pretrained_one_to_the_bit_after_training(tmp_path):
    weights = save_teacher(tmp_path / "backbone.pth", "resnet8")
    argv = [*QUICK, "--epochs", "2", "--milestones", "1", "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path]
    run("train_teacher_cifar", *argv, "--freezed", "--pretrained-backbone", weights)
    (folder,) = tmp_path.glob("train_teacher_cifar*")
    state = checkpoint(folder)["net"]
    start = torch.load(weights, weights_only=True)["net"]
    assert all(torch.equal(state[f"backbone.{key}"], value) for key, value in start.items())
    assert "train/task" not in log_lines(folder)[0]
    torch.manual_seed(0)
    begun = models.create("resnet8_aux", 10).state_dict()
    assert all(not torch.equal(value, begun[key]) for key, value in state.items() if ".fc" in key and "auxiliary" in key)


def test_a_pair_names_its_better_network(tmp_path, capsys):
    argv = [*QUICK, "--epochs", "1", "--arch", "resnet8_resnet8", "--checkpoint-dir", tmp_path]
    run("train_online_kd_cifar", *argv)
    trained = re.search(r"best top-1 [\d.]+ at epoch 1 of network (\d) \(", capsys.readouterr().out)
    run("train_online_kd_cifar", *argv, "--evaluate")
    assert f" net {trained[1]}, " in capsys.readouterr().out


def test_one_class_alone_is_warned_of(tmp_path, capsys):
    """A folder too high or too low, most likely: every network is right."""
    for split in ("train", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32)).save(tmp_path / split / "images" / f"{number}.png")
    quick = [*QUICK[2:], "--epochs", "1", "--arch", "resnet8", "--checkpoint-dir", tmp_path / "runs"]
    run("train_baseline_cifar", "--dataset", "imagefolder", "--data", tmp_path, *quick)
    assert f"warning: --data {tmp_path}: one class alone, images" in capsys.readouterr().err


@pytest.mark.parametrize("signalled", [True, False])
def test_a_compiler_that_a_signal_ends_is_a_stop(signalled, tmp_path, monkeypatch):
    """A scheduler signals the compiler's processes too; without a signal its failure is one."""

    def step(*_):
        if signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        raise utils.UserError("--compile: g++ died")

    monkeypatch.setattr(engine.Run, "step", step)
    argv = [*QUICK_RUN, "--arch", "resnet8", "--compile", "--checkpoint-dir", tmp_path]
    assert status("train_baseline_cifar", *argv) == (143 if signalled else 2)
