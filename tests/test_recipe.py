"""The published recipes: optimizer, schedules, constants of the methods, and what the networks see of an image."""

import copy
import math
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from contract import filled_network
from PIL import Image
from scripts import WORLD, parsed, seen
from torchvision import transforms
from torchvision.transforms import v2

import engine
import imagefiles
import loading
import losses
import methods
import models
import options

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

TEACHER, FROZEN = ("--tcheckpoint", "t.pth"), ("--freezed", "--pretrained-backbone", "b.pth")
CIFAR = {
    "dataset": "cifar100",
    "epochs": 240,
    "milestones": [150, 180, 210],
    "batch_size": 64,
    "init_lr": 0.05,
    "weight_decay": 5e-4,
    "nesterov": True,
    "warmup_epoch": 0,
    "accumulate": 1,
    "val_split": 0.0,
    "amp": "auto",
}
SHORT = {"epochs": 100, "milestones": [30, 60, 90]}
IMAGENET = CIFAR | SHORT | {"dataset": "imagenet", "batch_size": 256, "init_lr": 0.1, "weight_decay": 1e-4, "nesterov": False}
T3 = {"kd_T": 3.0}
# Script, flags that it needs, and the recipe that its defaults are.
RECIPES = [
    ("train_baseline_cifar", (), CIFAR | {"few_ratio": None}),
    ("train_teacher_cifar", (), CIFAR | {"rotations": 4}),
    ("train_teacher_cifar", FROZEN, CIFAR | SHORT | {"rotations": 4}),
    ("train_student_cifar", TEACHER, CIFAR | T3 | {"method": "hsakd"}),
    ("train_student_few_shot", TEACHER, CIFAR | T3 | {"method": "hsakd", "few_ratio": 1.0}),
    ("train_online_kd_cifar", (), CIFAR | T3),
    ("train_teacher_imagenet", (), IMAGENET | {"rotations": 4}),
    ("train_teacher_imagenet", FROZEN, IMAGENET | {"rotations": 4}),
    ("train_student_imagenet", TEACHER, IMAGENET | T3 | {"method": "hsakd"}),
    ("train_online_kd_imagenet", (), IMAGENET | T3),
    ("eval_rep", ("--s-path", "s.pth"), CIFAR | SHORT | {"dataset": "stl10", "init_lr": 0.1, "weight_decay": 0.0}),
]
# Backbones that start at 0.01, and what the published pairs call them.
LIGHT = {"mobilenetV2", "mobilenetV2_s2", "ShuffleV1", "ShuffleV2", "mbv2", "shufflev1", "shufflev2"}


@pytest.mark.parametrize(("script", "nesterov"), [("train_teacher_cifar", True), ("train_teacher_imagenet", False)])
def test_two_steps_are_sgd_by_hand(script, nesterov, tmp_path):
    """Momentum 0.9, and the weight decay of every parameter: with 0.1 it would show where BatchNorm or a bias had none."""
    flags = ("--arch", "resnet8_aux", "--dataset", "digits", "--weight-decay", 0.1, "--amp", "off")
    args = parsed(script, *flags, "--checkpoint-dir", tmp_path)
    data = loading.Data(None, None, None, 5, 32, {})
    run = engine.Run(args, WORLD, filled_network("resnet8_aux", num_classes=5), losses.TeacherLoss(), data)
    run.prepare()
    run.wrapped.train()
    expected = copy.deepcopy(run.model)
    velocities = [None] * len(list(expected.parameters()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        images = torch.randn(8, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
        labels = torch.randint(0, 5, (8,), generator=generator)
        run.step(images, labels, 0)
        loss = sum(losses.TeacherLoss()(expected, images, labels).values())
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for i, (parameter, gradient) in enumerate(zip(expected.parameters(), gradients, strict=True)):
                gradient = gradient + 0.1 * parameter
                velocities[i] = gradient if velocities[i] is None else 0.9 * velocities[i] + gradient
                parameter -= 0.05 * (gradient + 0.9 * velocities[i] if nesterov else velocities[i])
        torch.testing.assert_close(dict(run.model.state_dict()), dict(expected.state_dict()), rtol=1e-5, atol=1e-6)
        expected.load_state_dict(run.model.state_dict())  # from the same weights: the next step would enlarge rounding


def test_every_training_script_has_a_recipe():
    assert {path.stem for path in ROOT.glob("train_*.py")} | {"eval_rep"} == {script for script, _, _ in RECIPES}


@pytest.mark.parametrize(("script", "flags", "recipe"), RECIPES)
def test_the_published_recipe_is_the_default_and_flags_win(script, flags, recipe):
    args = vars(parsed(script, *flags))
    assert {name: args[name] for name in recipe} == recipe
    given = {"epochs": 7, "milestones": [3, 5], "batch_size": 8, "init_lr": 0.3, "weight_decay": 0.01}
    words = ("--epochs", 7, "--milestones", 3, 5, "--batch-size", 8, "--init-lr", 0.3, "--weight-decay", 0.01)
    args = vars(parsed(script, *flags, *words))
    assert {name: args[name] for name in recipe} == recipe | given


def test_learning_rate_follows_the_architecture():
    """0.01 for MobileNetV2 and the ShuffleNets, alone, with auxiliary classifiers or in a pair; 0.1 for ImageNet's."""
    names, light = models.names(), {*LIGHT, *(f"{name}_aux" for name in LIGHT), *(f"{name}_{name}" for name in LIGHT)}
    assert {"mobilenetV2_s2", "ShuffleV1_aux", "shufflev2_shufflev2"} <= light & set(names)
    for name in names:
        expected = 0.1 if models.is_imagenet(name) else 0.01 if name in light else 0.05
        assert options.default_learning_rate(Namespace(arch=name)) == expected, name
    assert parsed("train_online_kd_cifar", "--arch", "mbv2_mbv2").init_lr == 0.01
    assert parsed("train_student_cifar", *TEACHER, "--arch", "ShuffleV1_aux").init_lr == 0.01
    assert parsed("eval_rep", "--s-path", "s.pth", "--arch", "ShuffleV2").init_lr == 0.1  # the linear classifier's


def pair_of(monkeypatch, script, *words):
    """Return (student, constants of the objective) of a student script's command line; the networks hold no values."""
    monkeypatch.setattr(methods, "load_teacher", lambda args, images: models.create(args.tarch, len(images.classes)))
    args = parsed(script, *TEACHER, *words)
    with torch.device("meta"):
        student, objective = methods.create_pair(args, seen(100))
    constants = {name: value for name, value in vars(objective).items() if name not in ("teacher", "state")}
    constants = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in constants.items()}
    sizes = {name: tuple(value.shape) for name, value in objective.state.items()}
    return student, constants | ({"state": sizes} if sizes else {})


DPCD = {
    "beta": 6.0,
    "warmup_epochs": 20,
    "temperature": 3.0,
    "alpha_range": [0.5, 2.0],
    "ced_beta": 8.0,
    "ema": 0.9,
    "threshold": 0.6,
    "quantile": 0.65,
    "slope": 18.0,
    "state": {"c_bar": (), "history": (2000,), "count": ()},
}


@pytest.mark.parametrize(
    ("tarch", "arch", "beta_range", "dkd_beta"),
    [
        ("wrn_40_2", "wrn_16_2", [5.0, 8.0], 6.0),
        ("wrn_40_2", "ShuffleV1", [5.0, 8.0], 6.0),
        ("vgg13_bn", "vgg8_bn", [5.0, 8.0], 6.0),
        ("vgg13_bn", "mobilenetV2", [5.0, 8.0], 6.0),
        ("resnet56", "resnet20", [1.0, 4.0], 2.0),
        ("resnet32x4", "resnet8x4", [6.0, 10.0], 8.0),
        ("resnet32x4", "ShuffleV2", [6.0, 10.0], 8.0),
        ("ResNet50", "mobilenetV2_s2", [6.0, 10.0], 8.0),
    ],
)
def test_objectives_have_the_published_constants(tarch, arch, beta_range, dkd_beta, monkeypatch):
    """Those of DPCD and DKD follow the teacher's family, whatever the student; heads tell 4 rotations apart, DPCD's none."""
    found = {
        name: pair_of(monkeypatch, "train_student_cifar", "--tarch", f"{tarch}_aux", "--arch", f"{arch}_aux", "--method", name)
        for name in ("hsakd", "kd", "dkd", "dpcd")
    }
    assert found.keys() == methods.METHODS.keys()
    assert {name: constants for name, (_, constants) in found.items()} == {
        "hsakd": {"temperature": 3.0},
        "kd": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
        "dkd": {"temperature": 4.0, "alpha": 1.0, "beta": dkd_beta, "warmup_epochs": 20},
        "dpcd": DPCD | {"beta_range": beta_range},
    }
    assert {name: (student.arch, getattr(student, "rotations", None)) for name, (student, _) in found.items()} == {
        "hsakd": (f"{arch}_aux", 4),
        "kd": (arch, None),
        "dkd": (arch, None),
        "dpcd": (f"{arch}_aux", 1),
    }


def test_given_constants_reach_the_objective(monkeypatch):
    """Each flag is another number than its default and than every other flag's."""
    pair = ("train_student_cifar", "--tarch", "wrn_40_2_aux", "--arch", "wrn_16_2_aux", "--method")
    words = ("--beta", 7, "--beta-range", 2, 3, "--loss-warmup", 4, "--kd_T", 5, "--alpha-range", 0.25, 1.5, "--ced-beta", 9)
    words += ("--ema", 0.8, "--history", 11, "--threshold", 0.4, "--quantile", 0.3, "--slope", 13)
    assert pair_of(monkeypatch, *pair, "dpcd", *words)[1] == {
        "beta": 7,
        "beta_range": [2, 3],
        "warmup_epochs": 4,
        "temperature": 5,
        "alpha_range": [0.25, 1.5],
        "ced_beta": 9,
        "ema": 0.8,
        "threshold": 0.4,
        "quantile": 0.3,
        "slope": 13,
        "state": {"c_bar": (), "history": (11,), "count": ()},
    }
    words = ("--alpha", 2, "--beta", 7, "--loss-warmup", 4, "--kd_T", 5)
    given = {"temperature": 5, "alpha": 2, "beta": 7, "warmup_epochs": 4}
    assert pair_of(monkeypatch, *pair, "dkd", *words)[1] == given
    words = ("--ce-weight", 2, "--kd-weight", 7, "--kd_T", 5)
    assert pair_of(monkeypatch, *pair, "kd", *words)[1] == {"temperature": 5, "ce_weight": 2, "kd_weight": 7}
    assert pair_of(monkeypatch, *pair, "hsakd", "--kd_T", 5)[1] == {"temperature": 5}


def test_imagenets_constants(monkeypatch):
    """DKD's are its authors' for ImageNet, and the other methods' those of CIFAR."""
    dkd = {"temperature": 1.0, "alpha": 1.0, "beta": 0.5, "warmup_epochs": 1}
    kd = {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}
    for method, expected in (("hsakd", {"temperature": 3.0}), ("kd", kd), ("dkd", dkd)):
        assert pair_of(monkeypatch, "train_student_imagenet", "--method", method)[1] == expected


def write_black_and_white(root):
    """Write a black and a white image of one class in the layouts of every data set that is read from files."""
    for maker in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        (root / maker.base_folder).mkdir()
        pixels = np.array([[0] * 3072, [255] * 3072], np.uint8)
        for name, _ in (*maker.train_list, *maker.test_list):
            content = {"data": pixels, "labels": [0, 0], "fine_labels": [0, 0]}
            (root / maker.base_folder / name).write_bytes(pickle.dumps(content))
        names = {"label_names": ["a"], "fine_label_names": ["a"]}
        (root / maker.base_folder / maker.meta["filename"]).write_bytes(pickle.dumps(names))
    (root / "stl10_binary").mkdir()
    (root / "stl10_binary" / "class_names.txt").write_text("a\n")
    for split in ("train", "test"):
        (root / "stl10_binary" / f"{split}_X.bin").write_bytes(bytes(3 * 96 * 96) + b"\xff" * (3 * 96 * 96))
        (root / "stl10_binary" / f"{split}_y.bin").write_bytes(b"\1\1")
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for shade in (0, 255):
            Image.new("L", (32, 32), shade).save(root / split / "a" / f"{shade}.png")


# (mean, standard deviation) of the three channels, on the scale 0 to 1.
STATISTICS = {
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "digits": ((0.3054, 0.3054, 0.3054), (0.3237, 0.3237, 0.3237)),
    "stl10": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "tinyimagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@pytest.mark.parametrize("name", options.DATASETS)
def test_black_and_white_of_every_data_set_are_normalised_as_published(name, tmp_path):
    write_black_and_white(tmp_path)
    data = loading.load(parsed("train_baseline_cifar", "--dataset", name, "--data", tmp_path, "--num-workers", 0), WORLD)
    mean, std = (torch.tensor(values) for values in STATISTICS[name])
    for found in (data.train.epoch(0), data.test):
        pixels = torch.cat([images.permute(0, 2, 3, 1).flatten(0, 2) for images, _ in found])
        torch.testing.assert_close(pixels.amin(0), -mean / std)
        torch.testing.assert_close(pixels.amax(0), (1 - mean) / std)


def imagenet_folder(root, pixels):
    """Write pixels (H, W, 3) uint8 as the only image of both splits; return the arguments of an ImageNet script."""
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(root / split / "a" / "0.png")
    return parsed("train_teacher_imagenet", "--data", root, "--num-workers", 0)


@pytest.mark.parametrize("size", [(301, 263), (263, 301), (57, 99)])
def test_imagenets_test_images_are_resized_and_cropped_as_published(size, tmp_path):
    """To the pixel as torchvision does with tensors, to a rounding as with the PIL images of the published code."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ((images, labels),) = loading.load_test(imagenet_folder(tmp_path, pixels), WORLD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS["imagenet"])
    found = ((images[0] * std + mean) * 255).round()
    assert labels.tolist() == [0] and found.shape == (3, 224, 224)
    expected = v2.functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), [256], antialias=True)
    assert torch.equal(found, v2.functional.center_crop(expected, [224, 224]).float())
    published = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    assert (found - published(Image.fromarray(pixels))).abs().max() <= 1


def test_imagenets_training_mirrors_about_half_the_images(tmp_path):
    """Left and right, never up and down; every position and every epoch draws anew."""
    pixels = np.zeros((51, 51, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(0, 255, 5), np.arange(0, 255, 5)[:, None]  # brighter to the right, downwards
    args = imagenet_folder(tmp_path, pixels)
    train = imagefiles.TrainBatches(imagefiles.find(tmp_path, train=True), args, WORLD)
    mirrored = []
    for position in range(200):
        for epoch in (0, 1):
            image = train.images[0, (args.manual_seed, epoch, position)][0].float()
            left, right = image[0].tensor_split(2, dim=1)
            upper, lower = image[1].tensor_split(2, dim=0)
            assert upper.mean() < lower.mean()
            mirrored.append((left.mean() > right.mean()).item())
    assert abs(sum(mirrored) - 200) < 5 * math.sqrt(400 / 4)
    changed = sum(first != second for first, second in zip(mirrored[::2], mirrored[1::2], strict=True))
    assert abs(changed - 100) < 5 * math.sqrt(200 / 4)
