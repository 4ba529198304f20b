"""An ImageNet-shaped folder of generated JPEGs: decoding, order, unreadable files, and the three scripts."""

import contextlib
import gc
import multiprocessing
import os
import re
import shutil
import sys
from functools import partial
from unittest import mock

import input_pipeline
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scripts import WORLD, run, status
from torchvision import io
from torchvision.transforms import v2

import datasets
import decoding
import imagefiles
import loading
import options
import preemption
from distributed import World
from utils import UserError

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


@pytest.fixture
def damaged(root, tmp_path):
    """Return a copy of the folder with one truncated training and test image, and the training one's path."""
    copy = tmp_path / "damaged"
    shutil.copytree(root, copy)
    for split in ("train", "val"):
        path = copy / split / "n00000001" / "0.JPEG"
        path.write_bytes(path.read_bytes()[:-300])
    return copy, str(copy / "train" / "n00000001" / "0.JPEG")


def arguments(root, *more):
    """Return parsed arguments of a loader of batches of four."""
    parser = options.imagenet_parser("train_x.py", "", "resnet18_imagenet_aux")
    return options.finish(parser, ["--data", str(root), "--batch-size", "4", "--num-workers", "0", *more])


def train(root, *more, world=WORLD):
    """Return training batches of the folder."""
    return imagefiles.TrainBatches(imagefiles.find(root, train=True), arguments(root, *more), world)


def test_every_colour_space_is_decoded(root):
    files = imagefiles.find(root, train=True)
    assert len(files) == 12 and files.classes == [f"n{i:08d}" for i in range(4)]
    for path in files.paths:
        image, expected = decoding.decode(path.decode()), Image.open(path.decode())
        assert image.dtype == torch.uint8 and image.shape == (3, expected.height, expected.width)
        if expected.mode != "CMYK":
            difference = image.int() - torch.from_numpy(np.array(expected.convert("RGB"))).permute(2, 0, 1)
            assert difference.abs().max() <= 2


def test_batches_depend_on_the_position_alone(root):
    """The same images whatever the number of workers, processes and the step at which the epoch is entered."""
    whole = list(train(root).epoch(1))
    assert [len(labels) for _, labels in whole] == [4, 4, 4] and whole[0][0].shape == (4, 3, 224, 224)
    assert sorted(torch.cat([labels for _, labels in whole]).tolist()) == sorted(3 * [0, 1, 2, 3])
    workers = train(root, "--num-workers", "2")
    list(workers.epoch(0))
    later = list(workers.epoch(1, 1))
    ranks = [list(train(root, world=World(rank, 2, WORLD.device)).epoch(1)) for rank in (0, 1)]
    for step, (images, labels) in enumerate(whole):
        halves = [torch.cat(parts) for parts in zip(ranks[0][step], ranks[1][step], strict=True)]
        for found in (halves, *([later[step - 1]] if step else [])):
            assert torch.equal(found[0], images) and torch.equal(found[1], labels)
    assert not torch.equal(next(iter(train(root).epoch(2)))[0], whole[0][0])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_stops_with_its_path(damaged, workers):
    with pytest.raises(UserError, match=damaged[1]):
        list(train(damaged[0], "--num-workers", workers).epoch(0))


def test_unreadable_images_are_skipped_and_named(damaged, capsys):
    """In training another image takes the place, in the test the image is left out."""
    found = list(train(damaged[0], "--skip-bad-images").epoch(0))
    assert sum(len(labels) for _, labels in found) == 12
    told = capsys.readouterr().err
    assert told.startswith("skipped: ") and damaged[1] in told.splitlines()[0]
    assert told.splitlines()[-1] == "skipped 1 unreadable images"
    test = loading.load_test(arguments(damaged[0], "--skip-bad-images"), WORLD)
    assert [labels.tolist() for _, labels in test] == [[0, 2, 3]] and test.total == 3


def test_other_formats_than_jpeg_are_read_by_pillow(tmp_path):
    """Whatever they are called: torchvision's decoder of PNG ends the process at some damaged files."""
    pixels = np.random.RandomState(0).randint(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    path = (tmp_path / "a.png").rename(tmp_path / "a.JPEG")
    assert torch.equal(decoding.decode(str(path)), torch.from_numpy(pixels).permute(2, 0, 1))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="unreadable image"):
        decoding.decode(str(path))


@pytest.mark.parametrize("file", ["strip.png", "strip.jpg"])
def test_an_image_that_would_take_all_memory_is_unreadable(file, tmp_path, monkeypatch):
    """Resizing the short side of a strip to 256 pixels makes it huge; a damaged file may ask a decoder for any memory."""
    path = tmp_path / file
    Image.new("RGB", (2, 2001)).save(path)
    for read in (decoding.decode, partial(datasets.decode, size=32)):
        with pytest.raises(UserError, match=re.escape(f"unreadable image {path} (a strip of 2 by 2001 pixels)")):
            read(path)
    Image.new("RGB", (2, 20)).save(path)
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    monkeypatch.setattr(Image, "open", mock.Mock(side_effect=MemoryError))
    with pytest.raises(UserError, match="unreadable image .*MemoryError"):
        decoding.decode(path)


def test_unreadable_images_are_told_once(damaged, capsys):
    test = loading.load_test(arguments(damaged[0], "--skip-bad-images"), WORLD)
    for _ in range(2):
        assert sum(len(labels) for _, labels in test) == test.total == 3
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_pass_without_a_readable_image_says_so(root):
    """Also with --skip-bad-images, and where there are fewer test images than processes."""
    for path in (shutil.copytree(root, root.parent / "unreadable") / "val").glob("*/*"):
        path.write_bytes(b"")
    found = loading.load_test(arguments(root.parent / "unreadable", "--skip-bad-images"), WORLD)
    with pytest.raises(UserError, match="nor is any other image of this pass readable"):
        list(found)
    with pytest.raises(UserError, match=r"fewer test images \(4\) than processes \(5\)"):
        loading.load_test(arguments(root), World(0, 5, WORLD.device))


def test_random_crops_are_torchvisions(root):
    """The same draws give torchvision's own pixels, and a batch of them is channels-last in memory."""
    image = decoding.decode(root / "train" / "n00000000" / "0.JPEG")
    for seed in range(8):
        torch.manual_seed(seed)
        expected = v2.RandomResizedCrop(224, antialias=True)(image)
        torch.manual_seed(seed)
        found = decoding.random_resized_crop(image)
        assert torch.equal(found, expected)
    assert decoding.stacked([found, found]).is_contiguous(memory_format=torch.channels_last)


def test_decoding_on_the_gpu_waits_for_its_own_stream_alone(monkeypatch):
    """And what trains waits for the decoded images."""
    events = mock.Mock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: events.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(events.entered(stream)))
    images = mock.Mock(is_cuda=True)
    events.decoded.return_value = images, "labels", "bad"
    assert decoding.on_stream(events.own, events.decoded, "bytes", "items") == (images, "labels", "bad")
    assert events.mock_calls == [
        mock.call.entered(events.own),
        mock.call.own.synchronize(),
        mock.call.decoded("bytes", "items"),
        mock.call.current.wait_stream(events.own),
    ]
    images.record_stream.assert_called_once_with(events.current)


def test_decoding_a_batch_in_one_call(root, tmp_path, capsys):
    """The path of --decode device, on the CPU: the same crops, also where a file needs another decoder."""
    files, flip = imagefiles.find(root, train=True), train(root).images.transform
    items = [(index, (0, 0, index)) for index in range(4)]
    expected = decoding.collate([decoding.Images(files, flip, False)[item] for item in items])
    encoded = decoding.EncodedImages(files, flip, False)
    content, lengths, labels, kept = decoding.collate_encoded([encoded[item] for item in items])
    contents = list(content.split(lengths))
    images = io.decode_jpeg(contents, io.ImageReadMode.RGB)
    assert kept == items and len(images) == 4
    contents[1] = torch.zeros(3, dtype=torch.uint8)  # what the decoder refuses is read from its file
    for given in (contents, [io.read_file(path.decode()) for path in files.paths[:4]]):
        found = encoded.decoded(given, labels, items, torch.device("cpu"))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[2] == []
    strip = io.encode_jpeg(torch.zeros(3, 2, 2001, dtype=torch.uint8))
    io.write_file(str(tmp_path / "strip.JPEG"), strip)
    files.paths = np.array([*files.paths[:2], str(tmp_path / "strip.JPEG").encode(), files.paths[3]])
    found = encoded.decoded([*contents[:2], strip, contents[3]], labels, items, torch.device("cpu"))
    assert len(found[0]) == 3 and "(a strip of 2 by 2001 pixels)" in found[2][0]
    assert capsys.readouterr().err.count("--decode device: batches with files that it cannot read") == 1
    with pytest.raises(UserError, match="needs a GPU"):
        train(root, "--decode", "device")


def test_a_device_that_does_not_decode_is_told(monkeypatch):
    """Before the first batch; what fails in the GPU later is no fault of the files."""
    decoding.check_decoder(torch.device("cpu"))
    monkeypatch.setattr(decoding, "decode_jpeg", mock.Mock(side_effect=RuntimeError("not compiled with nvJPEG\nat")))
    with pytest.raises(UserError, match="^--decode device: not compiled with nvJPEG$"):
        decoding.check_decoder(torch.device("cpu"))
    for fault in ("CUDA error: an illegal access", "CUDA ERROR: 700", "cudaStreamWaitEvent failed: 700"):
        monkeypatch.setattr(decoding, "decode_jpeg", mock.Mock(side_effect=RuntimeError(fault)))
        with pytest.raises(RuntimeError, match=fault):
            decoding.EncodedImages(None, None, False).decoded([], [], [], torch.device("cpu"))


def test_shared_memory_that_is_too_small_is_told(root, monkeypatch):
    """As in a container, whose 64 MB are too few for the usual batch: the workers would hang."""
    monkeypatch.setattr(imagefiles.shutil, "disk_usage", lambda path: mock.Mock(free=2**20))
    train(root, "--num-workers", "1", "--batch-size", "2")
    train(root, "--num-workers", "0")
    with pytest.raises(UserError, match="/dev/shm has 1 MiB left, 2 are needed"):  # of twelve images in all
        train(root, "--num-workers", "4", "--batch-size", "256")


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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize(("parent", "status"), [(os.getpid, 0), (lambda: 2**22 + 1, 143)])
def test_workers_of_a_killed_run_end(parent, status):
    """Also where it was killed before they could note their parent."""
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=imagefiles.outlive_signals, args=(context.RawValue("b", 0), parent(), 0))
    worker.start()
    worker.join()
    assert worker.exitcode == status


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
