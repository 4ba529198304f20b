"""The scripts on an ImageNet-shaped folder of generated JPEGs, read from files by workers."""

import gc
import multiprocessing
import signal
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import models
import utils
from scripts import log_lines, run, status
from training.step import TrainingStep


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder of 4 classes, 3 training images and 1 test image each, of odd sizes."""
    root, draw = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for number in range(4 * count):
            folder = root / split / f"n{number % 4:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(draw.integers(0, 256, (9, 11, 3), dtype=np.uint8))
            image.resize((81 + 20 * number, 299 - 18 * number)).save(folder / f"{number}.JPEG")
    return root


def baseline(root, checkpoints, *more):
    """Return the flags of a small baseline of two epochs of three steps."""
    flags = ["--arch", "resnet8", "--dataset", "imagenet", "--data", root, "--batch-size", 4, "--amp", "off"]
    return [*flags, "--epochs", 2, "--milestones", 1, "--checkpoint-dir", checkpoints, *more]


def stop_in_step(number):
    """Return a context in which a run receives SIGTERM in that step."""
    step = TrainingStep.__call__
    steps = iter(range(1, 99))

    def stepping(self, batch, totals):
        step(self, batch, totals)
        if next(steps) == number:
            signal.raise_signal(signal.SIGTERM)

    return mock.patch.object(TrainingStep, "__call__", stepping)


@pytest.mark.slow
def test_a_run_resumes_inside_an_epoch_and_its_workers_end_with_it(root, tmp_path):
    """Stopped or not: left to the end of the process, each worker would take seconds."""
    name = "train_baseline_cifar_arch_resnet8_dataset_imagenet_seed0"
    before = set(multiprocessing.active_children())
    gc.disable()  # nor may they wait for the collector
    try:
        run("train_baseline_cifar", *baseline(root, tmp_path / "whole", "--num-workers", 0))
        argv = baseline(root, tmp_path, "--num-workers", 2)
        with stop_in_step(2):
            assert status("train_baseline_cifar", *argv) == 143
        assert not set(multiprocessing.active_children()) - before
        run("train_baseline_cifar", *argv, "--resume")
        assert not set(multiprocessing.active_children()) - before
    finally:
        gc.enable()
    found, expected = (utils.Checkpoint(folder / name / "resnet8.pth.tar") for folder in (tmp_path, tmp_path / "whole"))
    assert found.digest == expected.digest
    assert log_lines(tmp_path / name) == log_lines(tmp_path / "whole" / name)


def test_missing_folder(tmp_path, capsys):
    assert status("train_online_kd_imagenet", "--data", tmp_path, "--checkpoint-dir", tmp_path) == 2
    assert "no images" in capsys.readouterr().err


@pytest.mark.slow
def test_scripts(root, tmp_path, capsys):
    """Teacher on torchvision's backbone, student, online pair: two steps each; then test_model.py."""
    torch.save(torchvision.models.resnet34(num_classes=4).state_dict(), tmp_path / "resnet34.pth")
    common = ["--data", root, "--num-workers", 1, "--batch-size", 2, "--limit-batches", 2, "--image-size", 64]
    training = [*common, "--epochs", 1, "--init-lr", 0.001, "--checkpoint-dir", tmp_path]
    run("train_teacher_imagenet", *training, "--freezed", "--pretrained-backbone", tmp_path / "resnet34.pth")
    teacher = tmp_path / "train_teacher_imagenet_arch_resnet34_aux_dataset_imagenet_seed0"
    run("train_student_imagenet", *training, "--tcheckpoint", teacher / "resnet34_imagenet_aux_best.pth.tar")
    run("train_online_kd_imagenet", *training)
    student = tmp_path / "train_student_imagenet_tarch_resnet34_aux_arch_resnet18_aux_dataset_imagenet_seed0"
    weights = student / "resnet18_imagenet_aux_best.pth.tar"
    utils.load_weights(models.create("resnet18_imagenet", 4), weights)
    capsys.readouterr()
    network = ["--arch", "resnet18_imagenet_aux", "--student-weights", weights]
    run("test_model", *common, "--dataset", "imagenet", *network)
    assert "images: 4" in capsys.readouterr().out
