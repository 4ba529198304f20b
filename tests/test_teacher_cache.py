"""The store of teacher's outputs: exact, filled once, safe from kills, and never another teacher's or other images'."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_distributed import spawn
from test_own_images import write_splits

import imagesets
import methods
import models
from scripts import WORLD, assert_same_run, checkpoint, refused, run, save_teacher, stopped
from training import Trainer, teacher_cache
from utils import World

ROOT = Path(__file__).parents[1]
STUDENT = "train_student_few_shot"
COUNT = 71  # images
WORDS = ("--dataset", "digits", "--few-ratio", "0.05", "--batch-size", "8", "--limit-batches", "4", "--epochs", "2")
WORDS += ("--arch", "resnet8_aux", "--tarch", "resnet8_aux", "--init-lr", "0.01", "--amp", "off", "--views", "2")


@pytest.fixture
def teacher(tmp_path):
    """Return the file of a teacher's weights."""
    return save_teacher(tmp_path / "teacher.pth.tar")


def trainer(folder=None, method=methods.HSAKD, teacher=0, arch="resnet8_aux", world=WORLD, data=None, **settings):
    """Return a Trainer of one epoch, with the store in `folder`, on few of the digits, small, with two views each."""
    images = {"few_ratio": 0.05, "batch_size": 16, "views": 2, "crop_size": 16, "world": world, **(data or {})}
    found = imagesets.load(images.pop("name", "digits"), images.pop("root", ""), **images)
    torch.manual_seed(teacher)
    taught = models.create(arch if method.reads == "heads" else "resnet8", found.num_classes)
    torch.manual_seed(0)
    student = "resnet8_aux" if method.networks == "auxiliary" else "resnet8"
    student = models.create(student, found.num_classes, method.rotations)
    settings = {"amp": "off", "lr": 0.01, "epochs": 1, "teacher_cache": folder, **settings}
    return Trainer(student, method(taught), **found.batches(), world=world, **settings)


def trained(*args, **settings):
    """Return the weights of the student after its training."""
    found = trainer(*args, **settings)
    found.fit()
    return found.model.state_dict()


def distance(found, expected):
    """Return the largest difference of two networks' weights."""
    return max((value.double() - expected[name].double()).abs().max().item() for name, value in found.items())


def stored(root):
    """Return the files of the one store below `root`, but for its lock."""
    (folder,) = root.iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


SLOW = pytest.param(methods.HSAKD, marks=pytest.mark.slow)


@pytest.mark.parametrize("method", [SLOW, methods.KD, methods.DKD, methods.DPCD])
def test_stored_outputs_are_the_teachers(method, tmp_path):
    """In float32 on the CPU: up to the rounding of another batch size, which is below 1e-6 (and 0 where it was run).

    Parts of a batch have their own rows.
    """
    settings = {"method": method, "accumulate": 1 if method.whole_batches else 3}
    assert distance(trained(tmp_path, **settings), trained(**settings)) < 1e-5
    recorded = json.loads(stored(tmp_path)["complete.json"])
    assert (recorded["views"], recorded["stored"]) == (2, "float32") and 0 < recorded["teacher_top1"] < 100


def test_a_store_is_filled_once(tmp_path, monkeypatch):
    """For other seeds, students and fewer views; the teacher is not asked any more, nor kept."""
    trainer(tmp_path)
    monkeypatch.setattr(teacher_cache, "fill", None)
    found = trainer(tmp_path, data={"seed": 1}, seed=1)
    assert found.objective.teacher is None
    found.fit()
    assert distance(trained(tmp_path, data={"views": 1}), trained(data={"views": 1})) < 1e-5


def test_more_views_lengthen_a_store(tmp_path):
    trainer(tmp_path / "grown", data={"views": 1})
    trainer(tmp_path / "grown")
    trainer(tmp_path / "whole")
    assert stored(tmp_path / "grown") == stored(tmp_path / "whole")


OTHERS = [{"teacher": 1}, {"arch": "resnet14_aux"}, {"method": methods.KD}, {"few_ratio": 0.2}, {"val_split": 0.1}]
OTHERS += [{"views_seed": 1}, {"augment": "rrc"}, {"augment": "strong"}, {"augment": "randaugment"}, {"flip": True}]
OTHERS += [{"crop_size": 24}, {"mean": (0.5, 0.5, 0.5)}, {"amp": "bf16"}, {"cache_dtype": "float16"}]


@pytest.mark.slow
def test_another_store_is_never_used(monkeypatch):
    """Of another teacher, method's reading, data, size, seed of views, augmentation, normalisation or number type."""
    monkeypatch.setattr(teacher_cache.TeacherCache, "check_room", lambda _: None)
    monkeypatch.setattr("training.start.accuracy", lambda *_: ({"top1": 100.0}, 10))
    folders = []
    for other in [{}, *OTHERS]:
        names = ("teacher", "arch", "method", "amp", "cache_dtype")
        settings = {name: other[name] for name in names if name in other}
        made = trainer(data={"crop_size": None, **{name: other[name] for name in other.keys() - settings}}, **settings)
        made.teacher_cache = "store"
        folders.append(teacher_cache.find(made).folder)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_float16_rounds_the_outputs(amp, tmp_path):
    exact, half = trainer(tmp_path / "exact", amp=amp), trainer(tmp_path / "half", amp=amp, cache_dtype="float16")
    index, view = torch.tensor([0, 5, COUNT - 1]), torch.tensor([1, 0, 1])
    rows = (made.cache.rows(index, view) for made in (half, exact))
    for found, expected in zip(*([one.logits, *one.aux_logits] for one in rows), strict=True):
        assert (found.dtype, expected.dtype) == (torch.float16, torch.float32 if amp == "off" else torch.bfloat16)
        assert found.shape == expected.shape and len(found) == 12
        assert torch.allclose(found.float(), expected.float(), rtol=2**-10, atol=2**-20)
    half.fit()
    assert half.cache.size == 2 * COUNT * 4 * (3 * 40 + 10) * 2


@pytest.mark.slow
def test_a_resumed_run_reads_the_store_bit_exactly(teacher, tmp_path):
    """Stopped inside the second epoch."""
    words = [*WORDS, "--tcheckpoint", teacher, "--teacher-cache", tmp_path / "store", "--checkpoint-dir"]
    run(STUDENT, *words, tmp_path / "whole")
    words.append(tmp_path / "again")
    assert stopped(STUDENT, *words, after=6, by=signal.SIGTERM) == 143
    run(STUDENT, *words, "--resume")
    assert_same_run(*(next((tmp_path / name).iterdir()) for name in ("again", "whole")))


@pytest.mark.slow
def test_images_from_files(tmp_path):
    """With the workers' transforms; rows of unreadable images stay empty, and no batch asks for them."""
    write_splits(tmp_path / "images", [(24 + i, 20) for i in range(9)])
    for number in range(3):
        (tmp_path / "images" / "train" / "cat" / f"{number}.png").write_bytes(b"\x89PNG\r\n")
    data = {"name": "imagefolder", "root": tmp_path / "images", "keep": "files", "workers": 2, "few_ratio": None}
    data |= {"batch_size": 4, "skip_bad_images": True, "size": 16, "crop_size": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teacher_cache.IMAGES, "cpu", 3)  # a whole batch is unreadable
        found = trained(tmp_path / "store", data=data)
    assert distance(found, trained(data=data)) < 1e-5
    assert marked(tmp_path / "store").sum() == 2 * (18 - 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "fitnet"], "--teacher-cache has no part in fitnet"),
        (["--method", "kd"], "needs --views"),
        (["--views", "2"], "the store takes 0.00 GiB, 0.00 GiB are free"),
    ],
)
def test_what_cannot_be_stored_is_one_line(words, said, teacher, tmp_path, capsys, monkeypatch):
    """Before anything is computed, or a run folder's settings are written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("training.start.accuracy", None)
    words = [*WORDS[:-2], *words, "--tcheckpoint", teacher, "--teacher-cache", tmp_path / "store"]
    assert said in refused(capsys, *words, "--checkpoint-dir", tmp_path / "runs", script=STUDENT)
    assert not list(tmp_path.glob("runs/*/args.json"))


def test_a_store_cut_off_is_filled_again(tmp_path):
    trainer(tmp_path)
    whole, (folder,) = stored(tmp_path), tmp_path.iterdir()
    os.truncate(folder / "outputs.bin", len(whole["outputs.bin"]) // 2)
    trainer(tmp_path)
    assert stored(tmp_path) == whole


def fill(folder, images=4):
    """Fill a store in batches of few images."""
    torch.set_num_threads(1)
    teacher_cache.IMAGES["cpu"] = images
    trainer(folder)


def marked(root):
    """Return which rows of a store are marked, (rows,) bool."""
    return np.frombuffer(stored(root).get("marks.bin", b""), bool)


def rows_of(root):
    """Return the rows of a store in float32."""
    return np.frombuffer(stored(root)["outputs.bin"], np.float32).reshape(2 * COUNT, -1)


@pytest.mark.slow
def test_killed_while_it_is_filled(tmp_path):
    """At random moments: marked rows are whole, and what is resumed equals what was filled in one go."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fill(whole)
    context, draw, counts = multiprocessing.get_context("forkserver"), random.Random(0), [0]
    context.set_forkserver_preload(["training", "imagesets", "sklearn.datasets"])
    for number in range(8):
        process, began = context.Process(target=fill, args=(killed,)), time.monotonic()
        process.start()
        while not list(killed.glob("*/marks.bin" if number else "*/outputs.bin")):
            assert time.monotonic() < began + 100
        while number > 2 and process.is_alive() and marked(killed).sum() <= counts[-1]:
            time.sleep(0.001)
        process.join(draw.uniform(0, 0.1) if number else 0)
        process.kill()
        process.join()
        counts.append(marked(killed).sum())
        assert not counts[-1] or (rows_of(killed)[marked(killed)] == rows_of(whole)[marked(killed)]).all()
    assert counts == sorted(counts) and len(set(counts)) > 3
    fill(killed)
    assert stored(killed) == stored(whole)


@pytest.mark.slow
def test_two_runs_that_fill_at_once(teacher, tmp_path):
    """One fills, the other waits and reads."""
    words = [*WORDS, "--tcheckpoint", teacher, "--checkpoint-dir", tmp_path, "--teacher-cache", tmp_path / "store"]
    command, pipe = [sys.executable, f"{STUDENT}.py", *map(str, words), "--tag"], subprocess.PIPE
    processes = [subprocess.Popen([*command, name], cwd=ROOT, stdout=pipe, text=True) for name in ("one", "two")]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("rows are missing" in output for output in outputs) == [False, True]
    one, two = (checkpoint(next(tmp_path.glob(f"*_{name}"))) for name in ("one", "two"))
    assert distance(one["net"], two["net"]) == 0


def share(world, folder):
    """Fill a store as one process of a group, and note how many batches this one computes."""
    made, batches = trainer(world=world), []
    read, made.teacher_cache, teacher_cache.IMAGES["cpu"] = made.train.read_views, folder, 4
    made.train.read_views = lambda blocks: read(batches.append(block) or block for block in blocks)
    teacher_cache.prepare(teacher_cache.find(made), made)
    (folder / str(world.rank)).write_text(str(len(batches)))


@pytest.mark.slow
def test_two_processes_share_the_filling(tmp_path):
    (tmp_path / "both").mkdir()
    spawn(share, tmp_path / "both")
    assert [(tmp_path / "both" / rank).read_text() for rank in "01"] == ["18", "18"]
    for rank in "01":
        (tmp_path / "both" / rank).unlink()
    fill(tmp_path / "one")
    assert stored(tmp_path / "both") == stored(tmp_path / "one")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m cuda")
def test_a_gpu_holds_the_store_if_it_fits(tmp_path, monkeypatch):
    """Else the rows come from the host's memory; they are what the teacher computes."""
    device = torch.device("cuda", 0)
    inside = trainer(tmp_path, world=World(0, 1, device))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
    outside = trainer(tmp_path, world=World(0, 1, device))
    assert torch.is_tensor(inside.cache.values) and isinstance(outside.cache.values, np.memmap)
    images, _, index, view = next(inside.train.epoch(0))
    found, other = (made.cache.rows(index, view) for made in (inside, outside))
    expected = trainer(world=World(0, 1, device)).objective.read_teacher(images)
    for one, two, three in zip(found.aux_logits, other.aux_logits, expected.aux_logits, strict=True):
        assert one.device == two.device == device and torch.equal(one, two)
        assert torch.allclose(one, three, rtol=0.02, atol=0.02)  # TF32
