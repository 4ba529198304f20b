"""eval_rep.py: a linear classifier on frozen features, and its data sets."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_imagesets import write_stl10
from test_models import ONE_PER_CIFAR_FAMILY

import eval_rep
import models
import utils
from scripts import log_lines, refused, run

PREPROCESS = Path(__file__).resolve().parent.parent / "data" / "preprocess_tinyimagenet.py"
QUICK = ("--batch-size", "4", "--epochs", "1", "--amp", "off", "--num-workers", "1")


@pytest.mark.parametrize("name", ONE_PER_CIFAR_FAMILY)
def test_only_the_new_head_of_every_backbone_trains(name):
    """The encoder has no gradient, no training mode and no part of its old classifier in the result.

    MobileNetV2's head starts as its released code initialises linear layers.
    """
    backbone = models.create(name, 5)
    with torch.no_grad():
        backbone.head.weight.fill_(float("nan"))
    probe = eval_rep.LinearProbe(backbone, 7).train()
    assert not any(module.training for module in probe.encoder.modules())
    narrow = not probe.head.bias.any() and probe.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert narrow == name.startswith("mobilenet")
    logits = probe(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert {key for key, value in probe.named_parameters() if value.grad is not None} == {"head.weight", "head.bias"}
    assert logits.isfinite().all()


def save(path, network):
    """Write a network's weights after it has seen a batch, so that its BatchNorm statistics are its own."""
    network.train()(torch.randn(4, 3, 32, 32))
    torch.save({"net": network.state_dict(), "acc": 0.0, "epoch": 1}, path)
    return path


SOURCES = {
    "baseline": ("resnet8", 100, 4, "", ()),
    "teacher": ("resnet8_aux", 10, 4, "backbone.", ()),
    "dpcd student": ("resnet8_aux", 100, 1, "backbone.", ()),
    "second of a pair": ("resnet8_resnet8", 100, 4, "net2.backbone.", ("--net", "2")),
}


@pytest.mark.parametrize("source", SOURCES)
def test_backbone_stays_as_it_is(tmp_path, monkeypatch, source):
    """Bit-exactly, on STL-10, from every kind of weights and under the name that they were trained by."""
    name, num_classes, rotations, prefix, flags = SOURCES[source]
    torch.manual_seed(1)
    path = save(tmp_path / "a.pth.tar", models.create(name, num_classes, rotations))
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    write_stl10(tmp_path / "data")
    command = ("--arch", name, "--dataset", "STL-10", "--data", f"{tmp_path}/data/", "--s-path", path, *flags, *QUICK)
    run("eval_rep", *command, "--checkpoint-dir", tmp_path)
    folder = tmp_path / "eval_rep_arch_resnet8_dataset_stl10_seed0"
    found = utils.Checkpoint(folder / "resnet8.pth.tar").content["net"]
    before = {k.removeprefix(prefix): v for k, v in torch.load(path)["net"].items() if k.startswith(prefix)}
    after = {k.removeprefix("encoder."): v for k, v in found.items() if k.startswith("encoder.")}
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert found["head.weight"].shape == (10, 64) and log_lines(folder)[0]["test/top1"] % 5 == 0  # of 20 images


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Write a TinyImageNet of two classes, dark and bright, in the original layout; return its folder."""
    root, lines = tmp_path / "tiny-imagenet-200", []
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n02\nn01\n")
    for i in range(8):
        name = f"n0{i % 2 + 1}"
        image = Image.new("L", (64, 64), 20 + 200 * (i % 2))
        (root / "train" / name / "images").mkdir(parents=True, exist_ok=True)
        image.save(root / "train" / name / "images" / f"{name}_{i}.JPEG")
        image.save(root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{name}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("missing", ["val/val_annotations.txt", "val/images/val_4.JPEG", "."])
def test_an_unusable_tiny_imagenet_is_one_line(tiny_imagenet, missing):
    """Not TinyImageNet, an annotated image missing, no folder at all."""
    path = tiny_imagenet / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = subprocess.run([sys.executable, PREPROCESS, tiny_imagenet], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert not (tiny_imagenet / "val_sorted").exists()


def test_tiny_imagenet_from_the_archive_to_a_classifier(tmp_path, tiny_imagenet, capsys):
    """One line names the preprocessing script, which sorts the images; then classes of two shades are told apart."""
    path = save(tmp_path / "a.pth.tar", models.create("resnet8_aux", 100))
    data = ("--dataset", "TinyImageNet", "--data", f"{tiny_imagenet}/", "--s-path", path)
    command = ("--arch", "resnet8", *data, *QUICK, "--epochs", 8, "--checkpoint-dir", tmp_path)
    assert "preprocess_tinyimagenet.py" in refused(capsys, *command, script="eval_rep")
    shutil.copy(PREPROCESS, tmp_path)  # the published command names no folder: it lies beside the script
    for _ in range(2):
        subprocess.run([sys.executable, PREPROCESS.name], cwd=tmp_path, check=True, capture_output=True)
    assert (tiny_imagenet / "val_sorted/n01/val_0.JPEG").exists()
    run("eval_rep", *command)
    assert log_lines(tmp_path / "eval_rep_arch_resnet8_dataset_tinyimagenet_seed0")[-1]["test/top1"] == 100
