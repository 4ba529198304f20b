"""A folder as ImageNet's, read from files by workers: decoding, order, unreadable files, scripts, the workers' end."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_own_images import pixels_of, write_images
from torchvision.transforms import v2

import imagesets
import models
import utils
from imagesets import folders, from_files
from imagesets.images import decode
from scripts import assert_same_run, run, stopped
from utils import UserError, World

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
                image = Image.frombytes(mode, (11, 9), pixels.tobytes())
                image.resize(tuple(int(side) for side in draw.integers(81, 299, 2) | 1)).save(folder / f"{i}.JPEG")
    return root


def load(root, rank=0, ranks=1, workers=0, **settings):
    """Return the folder's data in batches of four."""
    return imagesets.load("imagenet", root, batch_size=4, workers=workers, world=World(rank, ranks), **settings)


def test_every_colour_space_is_decoded(root):
    for path in sorted((root / "train").rglob("*.JPEG")):
        found, expected = decode(str(path)), Image.open(path)
        assert found.dtype == torch.uint8 and found.shape == (3, expected.height, expected.width)
        assert expected.mode == "CMYK" or (found.int() - pixels_of(path)).abs().max() <= 2


def test_batches_depend_on_the_position_alone(root):
    """The same images whatever the number of workers, processes and the step at which the epoch is entered."""
    data = load(root)
    whole = list(data.train.epoch(1))
    assert [len(labels) for _, labels, _ in whole] == [4, 4, 4] and whole[0][0].shape == (4, 3, 224, 224)
    assert sorted(torch.cat([index for _, _, index in whole]).tolist()) == list(range(12))
    assert all(torch.equal(labels, index // 3) for _, labels, index in whole)
    later = list(load(root, workers=2).train.epoch(1, 1))
    ranks = [list(load(root, rank, 2).train.epoch(1)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        halves = [torch.cat(parts) for parts in zip(ranks[0][step], ranks[1][step], strict=True)]
        for found in (halves, *([later[step - 1]] if step else [])):
            assert all(map(torch.equal, found, batch))
    assert not torch.equal(next(data.train.epoch(2))[0], whole[0][0])
    assert (len(data.train), data.train.num_images, data.num_classes, data.size) == (3, 12, 4, 224)


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_test_image_counts_once_as_torchvision_shows_it(root, ranks):
    worlds = [World(rank, ranks) for rank in range(ranks)]
    tests = [imagesets.load_test("imagenet", root, batch_size=3, workers=0, world=world) for world in worlds]
    found = [batch for test in tests for batch in test]
    assert {test.total for test in tests} == {4}
    assert sorted(torch.cat([labels for _, labels in found]).tolist()) == [0, 1, 2, 3]
    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize(*folders.STATISTICS)])  # fmt: skip
    expected = transform(decode(str(root / "val" / "n00000000" / "0.JPEG")))
    torch.testing.assert_close(found[0][0][0], expected, rtol=1e-5, atol=1e-5)


def test_other_formats_than_jpeg_are_read_by_pillow(tmp_path):
    """Whatever they are called: torchvision's decoder of PNG ends the process at some damaged files."""
    write_images(tmp_path, [(300, 300)])
    path = (tmp_path / "0.png").rename(tmp_path / "a.JPEG")
    assert torch.equal(decode(str(path)), pixels_of(path))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="unreadable image"):
        decode(str(path))


def test_random_crops_are_torchvisions(root):
    """The same draws give torchvision's own pixels, and a batch of them is channels-last in memory."""
    image = decode(str(root / "train" / "n00000000" / "0.JPEG"))
    for seed in range(8):
        torch.manual_seed(seed)
        expected = v2.RandomResizedCrop(224, antialias=True)(image)
        torch.manual_seed(seed)
        found = from_files.random_resized_crop(image, 224)
        assert torch.equal(found, expected)
    assert from_files.stacked([found, found]).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_a_run_resumes_inside_an_epoch_and_its_workers_end_with_it(root, tmp_path):
    """Stopped or not: left to the end of the process, each worker would take seconds."""
    name = "train_baseline_cifar_arch_resnet8_dataset_imagenet_seed0"
    argv = ["--arch", "resnet8", "--dataset", "imagenet", "--data", root, "--batch-size", 4, "--amp", "off"]
    argv += ["--image-size", 64, "--epochs", 2, "--milestones", 1, "--checkpoint-dir"]
    before = set(multiprocessing.active_children())
    gc.disable()  # nor may they wait for the collector
    try:
        run("train_baseline_cifar", *argv, tmp_path / "whole", "--num-workers", 0)
        argv += [tmp_path, "--num-workers", 2]
        assert stopped("train_baseline_cifar", *argv, after=2, by=signal.SIGTERM) == 143
        assert not set(multiprocessing.active_children()) - before
        run("train_baseline_cifar", *argv, "--resume")
        assert not set(multiprocessing.active_children()) - before
    finally:
        gc.enable()
    assert_same_run(tmp_path / name, tmp_path / "whole" / name)


@pytest.mark.slow
def test_imagenets_scripts(root, tmp_path, capsys):
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
    network = ["--arch", "resnet18_imagenet_aux", "--student-weights", weights]
    run("test_model", *common, "--dataset", "imagenet", *network)
    assert "images: 4" in capsys.readouterr().out


READ = """
import sys, time, imagesets, multiprocessing
passing = imagesets.load("imagenet", sys.argv[1], batch_size=1, workers=1).train.epoch(0)
next(passing)
print(multiprocessing.active_children()[0].pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_workers_ignore_a_schedulers_signals(root):
    repository = Path(imagesets.__file__).resolve().parent.parent
    command = [sys.executable, "-c", READ, str(root)]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as training:
        worker = int(training.stdout.readline())
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker, number)
        time.sleep(0.5)
        os.kill(worker, 0)  # it is still there
        training.kill()
