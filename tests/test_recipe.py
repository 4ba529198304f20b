"""The published recipes: the optimizer by hand and the defaults of every script."""

import copy

import pytest
import torch
from contract import filled_network

import imagesets
import methods
import models
import options
from imagesets import folders
from scripts import ROOT, WORLD, parsed
from training import Trainer

TEACHER, FROZEN = ("--tcheckpoint", "t.pth"), ("--freezed", "--pretrained-backbone", "b.pth")
CIFAR = {
    "dataset": "cifar100",
    "epochs": 240,
    "optimizer": "sgd",
    "schedule": "multistep",
    "milestones": [150, 180, 210],
    "batch_size": 64,
    "init_lr": 0.05,
    "weight_decay": 5e-4,
    "nesterov": True,
    "warmup_epoch": 0,
    "accumulate": 1,
    "val_split": 0.0,
    "amp": "auto",
    "label_smoothing": 0.0,
    "class_weights": None,
}


def test_milestones_that_are_never_reached_are_named(capsys):
    for words, warned in ((("--epochs", 60), True), (("--epochs", 60, "--milestones", 38), False), ((), False)):
        parsed("train_baseline_cifar", *words)
        assert ("never lowered" in capsys.readouterr().err) == warned


SHORT = {"epochs": 100, "milestones": [30, 60, 90]}
IMAGENET = CIFAR | SHORT | {"dataset": "imagenet", "batch_size": 256, "init_lr": 0.1, "weight_decay": 1e-4}
IMAGENET["nesterov"] = False
T3 = {"kd_T": 3.0}
# Script, flags that it needs, and the recipe that its defaults are.
RECIPES = [
    ("train_baseline_cifar", (), CIFAR | {"few_ratio": None}),
    ("train_teacher_cifar", (), CIFAR | {"rotations": 4}),
    ("train_teacher_cifar", FROZEN, CIFAR | SHORT | {"rotations": 4}),
    ("train_student_cifar", TEACHER, CIFAR | T3 | {"method": "hsakd"}),
    ("train_student_cifar", (*TEACHER, "--recipe", "plus"), CIFAR | T3 | {"method": "hsakd_dist", "inter_weight": 2.0}),
    ("train_student_few_shot", TEACHER, CIFAR | T3 | {"method": "hsakd", "few_ratio": 0.25}),
    ("train_online_kd_cifar", (), CIFAR | T3),
    ("train_teacher_imagenet", (), IMAGENET | {"rotations": 4}),
    ("train_teacher_imagenet", FROZEN, IMAGENET | {"rotations": 4}),
    ("train_student_imagenet", TEACHER, IMAGENET | T3 | {"method": "hsakd"}),
    ("train_student_imagenet", (*TEACHER, "--method", "dpcd"), IMAGENET | {"kd_T": 1.0, "batch_size": 128}),
    ("train_online_kd_imagenet", (), IMAGENET | T3),
    ("eval_rep", ("--s-path", "s.pth"), CIFAR | SHORT | {"dataset": "stl10", "init_lr": 0.1, "weight_decay": 0.0}),
]
# Backbones that start at 0.01, and what the published pairs call them.
LIGHT = {"mobilenetV2", "mobilenetV2_s2", "ShuffleV1", "ShuffleV2", "mbv2", "shufflev1", "shufflev2"}


@pytest.mark.parametrize("nesterov", [True, False])
def test_two_steps_are_sgd_by_hand(nesterov):
    """Momentum 0.9; weight decay of every parameter: with 0.1 it would show if BatchNorm or a bias had none."""
    model, settings = filled_network("resnet8_aux", num_classes=5), {"lr": 0.05, "weight_decay": 0.1, "amp": "off"}
    trainer = Trainer(model, methods.Teacher(), train=[], test=[], epochs=1, nesterov=nesterov, world=WORLD, **settings)
    expected = copy.deepcopy(model)
    velocities = [None] * len(list(expected.parameters()))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        images = torch.randn(8, 3, 32, 32, generator=generator)
        labels = torch.randint(0, 5, (8,), generator=generator)
        trainer.step(methods.Batch(images, labels), trainer.totals)
        loss = sum(methods.Teacher()(expected, images, labels).values())
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for i, (parameter, gradient) in enumerate(zip(expected.parameters(), gradients, strict=True)):
                gradient = gradient + 0.1 * parameter
                velocities[i] = gradient if velocities[i] is None else 0.9 * velocities[i] + gradient
                parameter -= 0.05 * (gradient + 0.9 * velocities[i] if nesterov else velocities[i])
        torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=1e-5, atol=1e-6)
        expected.load_state_dict(model.state_dict())  # from the same weights: the next step would enlarge rounding


def test_the_trainers_own_defaults_are_those_of_cifar():
    def group(**settings):
        made = Trainer(models.create("resnet8", 2), methods.Supervised(), train=[], test=[], epochs=1, **settings)
        return made.step.optimizer.param_groups[0]

    published = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "dampening": 0}
    assert published.items() <= group().items()
    assert {"lr": 1e-3, "weight_decay": 0.05}.items() <= group(optimizer="adamw").items()


@pytest.mark.parametrize(("amp", "layout"), [("off", torch.contiguous_format), ("bf16", torch.channels_last)])
def test_float32_by_name_takes_the_layout_of_the_smaller_error(amp, layout):
    """A CPU's channels-last BatchNorm sums naively."""
    batch, networks = (torch.rand(2, 3, 8, 8), torch.tensor([0, 1])), [models.create("resnet8", 2) for _ in range(2)]
    common = {"train": [batch], "test": [batch], "epochs": 1, "world": WORLD}
    made = Trainer(networks[0], methods.KD(networks[1]), amp=amp, **common)
    (part,) = made.step.parts(methods.Batch(*batch))
    tensors = (part.images, made.model.conv1.weight, made.objective.teacher.conv1.weight)
    assert all(tensor.is_contiguous(memory_format=layout) for tensor in tensors)


def test_every_training_script_has_a_recipe():
    assert {path.stem for path in ROOT.glob("train_*.py")} | {"eval_rep"} == {script for script, _, _ in RECIPES}


@pytest.mark.parametrize(("script", "flags", "recipe"), RECIPES)
def test_the_published_recipe_is_the_default_and_flags_win(script, flags, recipe):
    args = vars(parsed(script, *flags))
    assert {name: args[name] for name in recipe} == recipe
    given = {"epochs": 7, "milestones": [3, 5], "batch_size": 8, "init_lr": 0.3, "weight_decay": 0.01}
    words = ("--epochs", 7, "--milestones", 3, 5, "--batch-size", 8, "--init-lr", 0.3, "--weight-decay", 0.01)
    given["nesterov"] = not recipe["nesterov"]
    args = parsed(script, *flags, *words, "--no-nesterov" if recipe["nesterov"] else "--nesterov")
    assert {name: vars(args)[name] for name in recipe} == recipe | given
    assert options.trainer_settings(args)["nesterov"] == given["nesterov"]


def test_learning_rate_follows_the_architecture():
    """0.01 for MobileNetV2 and the ShuffleNets, alone, with auxiliary classifiers or in a pair; 0.1 for ImageNet's."""
    names, light = models.names(), {*LIGHT, *(f"{name}_aux" for name in LIGHT), *(f"{name}_{name}" for name in LIGHT)}
    assert {"mobilenetV2_s2", "ShuffleV1_aux", "shufflev2_shufflev2"} <= light & set(names)
    for name in names:
        expected = 0.1 if models.is_imagenet(name) else 0.01 if name in light else 0.05
        assert options.default_learning_rate(name) == expected, name
    assert parsed("train_online_kd_cifar", "--arch", "mbv2_mbv2").init_lr == 0.01
    assert parsed("train_student_cifar", *TEACHER, "--arch", "ShuffleV1_aux").init_lr == 0.01
    assert parsed("train_teacher_imagenet", "--arch", "torchvision/resnet18_aux").init_lr == 0.1
    assert parsed("eval_rep", "--s-path", "s.pth", "--optimizer", "adamw").init_lr == 1e-3
    assert parsed("eval_rep", "--s-path", "s.pth", "--arch", "ShuffleV2").init_lr == 0.1  # the linear classifier's


def test_images_are_normalised_as_published():
    assert imagesets.STATISTICS == {
        "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "digits": ((0.3054,) * 3, (0.3237,) * 3),
        "stl10": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    }
    assert folders.STATISTICS == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_automatic_views_follow_the_epochs():
    words = ("train_student_cifar", "--tcheckpoint", "t.pth", "--views")
    assert [parsed(*words, "auto", "--epochs", epochs).views for epochs in (1, 4, 240)] == [1, 1, 60]
    assert parsed(*words, "3").views == 3
