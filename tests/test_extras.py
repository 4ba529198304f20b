"""Flags of the loss, the moving average of the weights, and the picture of the confusion matrix."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_own_images import write_images
from torch import nn

import imagesets
import methods
import models
import options
import utils
from scripts import QUICK, QUICK_RUN, WORLD, log_lines, parsed, run, save_teacher, status
from training import Trainer
from training.ema import Average
from training.metrics import evaluate


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_balanced_weights_make_up_for_the_number_of_images(keep, tmp_path):
    for split, name, count in (("train", "many", 6), ("train", "few", 2), ("val", "many", 1), ("val", "few", 1)):
        write_images(tmp_path / split / name, [(16, 16)] * count)
    data = imagesets.load("imagefolder", tmp_path, keep=keep, workers=0)
    assert data.classes == ["few", "many"]
    assert data.class_weights.tolist() == pytest.approx([8 / (2 * 2), 8 / (2 * 6)])


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
    """Step n + 1 keeps 0.3 of the old value, or (1 + n) / (10 + n) if that is less; BatchNorm's statistics too."""
    utils.seed_all(0)
    data, steps = imagesets.load("digits", batch_size=8, limit=3), []
    settings = {"epochs": 2, "amp": "off", "lr": 0.05, "world": WORLD, "ema_decay": 0.3, "folder": tmp_path}
    made = Trainer(models.create("resnet8", 10), methods.Supervised(), **data.batches(), **settings)
    made.step.optimizer.register_step_post_hook(
        lambda *_: steps.append({name: value.clone() for name, value in made.model.state_dict().items()})
    )
    made.fit()
    assert len(steps) == 6
    content = torch.load(tmp_path / "resnet8.pth.tar", weights_only=True)
    for name in ("fc.weight", "layer1.0.conv1.weight", "bn1.running_mean"):
        expected = steps[0][name]
        for kept, step in zip((2 / 11, 3 / 12, 0.3, 0.3, 0.3), steps[1:], strict=True):
            expected = kept * expected + (1 - kept) * step[name]
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
    assert [last["test/top1"], last["test/raw_top1"]] == accuracies
    assert [file.recorded["recorded_acc"] for file in (checkpoint, raw)] == accuracies


def test_the_average_leaves_indices_as_they_are():
    """Such as those of a Swin's positions; in float32, 0.9999 and 0.0001 of a whole number may be less than it."""
    model, expected = nn.Linear(2, 2), torch.arange(200)
    model.register_buffer("index", expected.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = Average(model, optimizer, 0.9999)
    for _ in range(4):
        optimizer.step()
    assert torch.equal(average.state_dict()["state_dict_ema"]["index"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet8_aux", "resnet8_resnet8"])
def test_the_average_of_other_networks(arch, tmp_path):
    script = "train_teacher_cifar" if arch.endswith("_aux") else "train_online_kd_cifar"
    flags = ("--arch", arch, "--ema-decay", "0.9", "--val-split", "0.2", "--checkpoint-dir", tmp_path)
    run(script, *QUICK_RUN, *flags)
    (folder,) = tmp_path.iterdir()
    (line,) = log_lines(folder)
    assert 0 <= line["test/raw_top1"] <= 100 and line["best/top1"] == line["test/top1"]
    utils.Checkpoint(folder / f"{arch}.pth.tar").load_into(models.create(arch, 10))


def test_the_picture_of_the_confusion_matrix(tmp_path):
    path = save_teacher(tmp_path / "t.pth", "resnet8")
    run("test_model", *QUICK, "--arch", "resnet8", "--student-weights", path, "--confusion", tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG" and np.asarray(picture).std() > 0
