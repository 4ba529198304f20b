"""The scripts on an ImageNet-shaped folder of generated JPEGs."""

import contextlib
import gc
import multiprocessing

import input_pipeline
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scripts import run, status

import preemption

CHANNELS = {"RGB": 3, "L": 1, "CMYK": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder of 4 classes, 3 training images and 1 test image each, of odd sizes and several colour spaces."""
    root, draw = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for number in range(4):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                mode = list(CHANNELS)[(number + i) % 3]
                pixels = draw.integers(0, 256, (9, 11, CHANNELS[mode]), dtype=np.uint8).squeeze()
                size = tuple(int(side) for side in draw.integers(81, 299, 2) | 1)
                (Image.fromarray(pixels).convert(mode) if mode != "CMYK" else Image.fromarray(pixels, mode)).resize(size).save(
                    folder / f"{i}.JPEG"
                )
    return root


@pytest.mark.parametrize("stopped", [False, True])
def test_workers_end_with_the_run(root, tmp_path, monkeypatch, stopped):
    """Also with a run that a signal stops: left to the end of a process group, each would take ten seconds."""
    monkeypatch.setattr(preemption.StopSignal, "agreed", lambda *_: stopped)
    command = ["--arch", "resnet8", "--dataset", "imagenet", "--data", root, "--num-workers", 2, "--amp", "off"]
    command += ["--batch-size", 4, "--epochs", 1, "--milestones", 1, "--checkpoint-dir", tmp_path]
    before = multiprocessing.active_children()
    gc.disable()  # nor may they wait for the collector
    try:
        with pytest.raises(SystemExit) if stopped else contextlib.nullcontext():
            run("train_baseline_cifar", *command)
        assert not set(multiprocessing.active_children()) - set(before)
    finally:
        gc.enable()


def test_benchmark_of_the_input_pipeline(root, tmp_path, capsys, monkeypatch):
    """On a folder as ImageNet's; too little to measure is one line, and so is an image that cannot be read."""
    monkeypatch.setattr(input_pipeline.fast, "keep_memory", lambda: None)
    threads, broken = torch.get_num_threads(), tmp_path / "broken" / "a"
    broken.mkdir(parents=True)
    (broken / "1.png").write_bytes(b"none")
    for words, said in (
        (["--data", tmp_path / "broken" / "a"], "no images at"),
        (["--data", tmp_path / "broken"], "cannot identify image file"),
        (["--data", root, "--images", "60"], "take 350 or more"),
    ):
        monkeypatch.setattr("sys.argv", ["input_pipeline.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            input_pipeline.main()
        assert stop.value.code == 2 and said in capsys.readouterr().err
    monkeypatch.setattr(input_pipeline, "BATCH", 4)
    monkeypatch.setattr("sys.argv", ["input_pipeline.py", "--data", str(root), "--images", "16", "--rounds", "2"])
    input_pipeline.main()
    torch.set_num_threads(threads)
    assert "ImageFolder + v1 transforms" in capsys.readouterr().out


def test_missing_folder(tmp_path, capsys):
    assert status("train_online_kd_imagenet", "--data", tmp_path, "--checkpoint-dir", tmp_path) == 2
    assert "no images" in capsys.readouterr().err


def test_scripts(root, tmp_path, capsys):
    """Teacher on torchvision's backbone, student, online pair: two steps each; then test_model.py."""
    torch.save(torchvision.models.resnet34(num_classes=4).state_dict(), tmp_path / "resnet34.pth")
    common = ["--data", root, "--num-workers", 1, "--batch-size", 2, "--limit-batches", 2, "--amp", "off"]
    training = [*common, "--epochs", 1, "--init-lr", 0.001, "--checkpoint-dir", tmp_path]
    run("train_teacher_imagenet", *training, "--freezed", "--pretrained-backbone", tmp_path / "resnet34.pth")
    teacher = tmp_path / "train_teacher_imagenet_arch_resnet34_aux_dataset_imagenet_seed0"
    run("train_student_imagenet", *training, "--tcheckpoint", teacher / "resnet34_imagenet_aux_best.pth.tar")
    run("train_online_kd_imagenet", *training)
    student = tmp_path / "train_student_imagenet_tarch_resnet34_aux_arch_resnet18_aux_dataset_imagenet_seed0"
    weights = student / "resnet18_imagenet_aux_best.pth.tar"
    capsys.readouterr()
    network = ["--arch", "resnet18_imagenet_aux", "--student-weights", weights]
    run("test_model", *common, "--dataset", "imagenet", *network)
    assert "images: 4" in capsys.readouterr().out
