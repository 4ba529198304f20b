"""Class weights, label smoothing, the moving average of the weights, and the picture of the confusion matrix."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_own_images import write_images

import imagesets
import methods
import models
import options
import utils
from losses import cross_entropy
from scripts import QUICK, QUICK_RUN, WORLD, log_lines, parsed, run, save_teacher, status
from training import Trainer
from training.metrics import evaluate

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
LABELS = torch.tensor([0, 2])
# -log softmax of the rows
ROWS = [[-math.log(math.exp(z) / sum(map(math.exp, row))) for z in row] for row in LOGITS.tolist()]


def test_label_smoothing_by_hand():
    """A share of 0.3 is spread evenly over the three classes."""
    smoothed = [0.7 * row[label] + 0.1 * sum(row) for row, label in zip(ROWS, LABELS.tolist(), strict=True)]
    assert cross_entropy(LOGITS, LABELS, label_smoothing=0.3).item() == pytest.approx(sum(smoothed) / 2, rel=1e-6)


def test_class_weights_by_hand():
    """Each row counts with its class's weight; the sum is divided by the number of rows."""
    weights = torch.tensor([0.5, 9.0, 3.0])
    expected = (0.5 * ROWS[0][0] + 3.0 * ROWS[1][2]) / 2
    assert cross_entropy(LOGITS, LABELS, weights).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_balanced_weights_make_up_for_the_number_of_images(keep, tmp_path):
    for split, name, count in (("train", "many", 6), ("train", "few", 2), ("val", "many", 1), ("val", "few", 1)):
        write_images(tmp_path / split / name, [(16, 16)] * count)
    data = imagesets.load("imagefolder", tmp_path, keep=keep, workers=0)
    assert data.classes == ["few", "many"]
    assert data.class_weights.tolist() == pytest.approx([8 / (2 * 2), 8 / (2 * 6)])


def terms(method, model, teacher, **settings):
    """Return the terms of a method on four random images."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    objective = method(teacher, **settings) if method.reads else method(**settings)
    for network in (model, teacher):
        network.eval()
    if type(objective).prepare is not methods.Objective.prepare:
        torch.manual_seed(2)
        objective.prepare(model, images, 4)
    with torch.no_grad():
        return objective(model, images, torch.tensor([0, 1, 2, 1]), index=torch.arange(4))


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_shapes_the_terms_of_hard_class_labels_alone(name):
    method = methods.find(name)
    torch.manual_seed(0)
    arch = {"plain": "resnet8", "auxiliary": "resnet8_aux", "pair": "resnet8_resnet8"}[method.networks]
    model, teacher = models.create(arch, 3, method.rotations), models.create("resnet8_aux", 3)
    if method.reads == "logits":
        teacher = teacher.backbone
    weights = {"class_weights": torch.tensor([1.0, 2.0, 4.0])}
    plain, *others = (terms(method, model, teacher, **more) for more in ({}, weights, {"label_smoothing": 0.5}))
    shaped = {"task", "aux"} if name == "dpcd" else {"task"}
    for other in others:
        assert {term for term in plain if not torch.equal(plain[term], other[term])} == shaped


def test_flags_reach_the_loss(tmp_path):
    losses = []
    for number, flags in enumerate(([], ["--label-smoothing", "0.5"], ["--class-weights", "balanced"])):
        run("train_baseline_cifar", *QUICK_RUN, "--arch", "resnet8", *flags, "--checkpoint-dir", tmp_path / str(number))
        losses += [line["train/loss"] for line in log_lines(next((tmp_path / str(number)).iterdir()))]
    assert len(set(losses)) == 3 and losses[2] == pytest.approx(losses[0], rel=0.1)  # the digits are nearly balanced
    assert status("train_baseline_cifar", *QUICK_RUN, "--label-smoothing", "1") == 2


def test_dpcds_own_flag_keeps_its_name():
    for flag, ema, decay in (("--ema", 0.8, None), ("--ema-decay", 0.9, 0.8)):
        args = parsed("train_student_cifar", "--method", "dpcd", "--tcheckpoint", "t.pth", flag, "0.8")
        assert (args.ema, options.trainer_settings(args)["ema_decay"]) == (ema, decay)


def test_the_average_by_hand_which_is_tested_and_preferred(tmp_path):
    """Each step keeps half of the old value, from the weights after the first step on; BatchNorm's statistics too."""
    utils.seed_all(0)
    data, steps = imagesets.load("digits", batch_size=8, limit=3), []
    settings = {"epochs": 2, "amp": "off", "lr": 0.05, "world": WORLD, "ema_decay": 0.5, "folder": tmp_path}
    made = Trainer(models.create("resnet8", 10), methods.Supervised(), **data.batches(), **settings)
    made.step.optimizer.register_step_post_hook(
        lambda *_: steps.append({name: value.clone() for name, value in made.model.state_dict().items()})
    )
    made.fit()
    assert len(steps) == 6
    content = torch.load(tmp_path / "resnet8.pth.tar", weights_only=True)
    for name in ("fc.weight", "layer1.0.conv1.weight", "bn1.running_mean"):
        expected = steps[0][name]
        for step in steps[1:]:
            expected = 0.5 * expected + 0.5 * step[name]
        assert torch.allclose(content["state_dict_ema"][name], expected, atol=1e-6)
        assert not torch.equal(content["state_dict_ema"][name], content["net"][name])
    path = tmp_path / "resnet8.pth.tar"
    checkpoint, raw = utils.Checkpoint(path), utils.Checkpoint(path, "net")
    accuracies = []
    for file in (checkpoint, raw):
        network = models.create("resnet8", 10)
        file.load_into(network)
        accuracies.append(evaluate(network, made.test, WORLD.device)["top1"])
    last = log_lines(tmp_path)[-1]
    assert [last["test/ema_top1"], last["test/top1"]] == accuracies
    assert [file.recorded["recorded_acc"] for file in (checkpoint, raw)] == accuracies


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet8_aux", "resnet8_resnet8"])
def test_the_average_of_other_networks(arch, tmp_path):
    script = "train_teacher_cifar" if arch.endswith("_aux") else "train_online_kd_cifar"
    flags = ("--arch", arch, "--ema-decay", "0.9", "--val-split", "0.2", "--checkpoint-dir", tmp_path)
    run(script, *QUICK_RUN, *flags)
    (folder,) = tmp_path.iterdir()
    (line,) = log_lines(folder)
    assert 0 <= line["val/ema_top1"] <= 100 and 0 <= line["test/ema_top1"] <= 100
    utils.Checkpoint(folder / f"{arch}.pth.tar").load_into(models.create(arch, 10))


def test_the_picture_of_the_confusion_matrix(tmp_path):
    path = save_teacher(tmp_path / "t.pth", "resnet8")
    run("test_model", *QUICK, "--arch", "resnet8", "--student-weights", path, "--confusion", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture).std() > 0
