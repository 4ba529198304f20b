"""The published commands train as they did: losses of their first two steps, on small made images, in float32.

The recorded values are those of one machine.
"""

import pickle

import numpy as np
import pytest
from PIL import Image

import methods
from scripts import run, save_teacher

STUDENT = ("--tarch", "wrn_40_2_aux", "--arch", "wrn_16_2_aux", "--manual_seed", 0)
FEW_SHOT = ("--tarch", "resnet56_aux", "--arch", "resnet20_aux", "--few-ratio", 0.25, "--manual_seed", 0)
FROZEN, SEED_1 = ("--arch", "wrn_40_2_aux", "--freezed"), ("--manual_seed", 1)
# Script, words of the published command, the teacher that it reads, and the losses of its first two steps.
COMMANDS = {
    "baseline": ("train_baseline_cifar", ("--arch", "wrn_16_2", "--manual_seed", 0), None, (0.6949743, 0.6790733)),
    "teacher": ("train_teacher_cifar", ("--arch", "wrn_40_2_aux", "--manual_seed", 0), None, (7.0152993, 7.0084839)),
    "frozen teacher": ("train_teacher_cifar", FROZEN, "wrn_40_2", (6.3378277, 6.3402815)),
    "hsakd": ("train_student_cifar", STUDENT, "wrn_40_2_aux", (56.847481, 18.534298)),
    "kd": ("train_student_cifar", (*STUDENT, "--method", "kd"), "wrn_40_2_aux", (2.0485625, 0.14305994)),
    "dkd": ("train_student_cifar", (*STUDENT, "--method", "dkd"), "wrn_40_2_aux", (0.80297285, 0.73645258)),
    "dpcd": ("train_student_cifar", (*STUDENT, "--method", "dpcd"), "wrn_40_2_aux", (2.9644327, 5.3531453)),
    "few shot": ("train_student_few_shot", FEW_SHOT, "resnet56_aux", (67.104004, 13.967171)),
    "online": ("train_online_kd_cifar", ("--arch", "WRN_40_2_WRN_40_2"), None, (14.289841, 14.050799)),
    "imagenet teacher": ("train_teacher_imagenet", ("--freezed",), "resnet34_imagenet", (19.288246, 449.78973)),
    "imagenet student": ("train_student_imagenet", SEED_1, "resnet34_imagenet_aux", (19.946814, 78.521477)),
    "imagenet online": ("train_online_kd_imagenet", ("--arch", "resnet18_resnet18"), None, (23.273350, 732.64044)),
}
CLASSES = 2


def write_cifar(root):
    """Write 16 training and 4 test images in CIFAR-100's layout."""
    folder, draw = root / "cifar-100-python", np.random.RandomState(0)
    folder.mkdir()
    for name, count in (("train", 16), ("test", 4)):
        pixels = draw.randint(0, 256, (count, 3072), dtype=np.uint8)
        content = {b"data": pixels, b"fine_labels": [i % CLASSES for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"apple", b"bear"]}))


def write_imagenet(root):
    """Write 4 training and 2 test images in ImageNet's layout."""
    draw = np.random.RandomState(0)
    for split, count in (("train", 2), ("val", 1)):
        for name in ("n01", "n02"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.randint(0, 256, (240, 260, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_published_commands_take_the_recorded_steps(name, tmp_path, monkeypatch):
    script, words, teacher, (first, second) = COMMANDS[name]
    found, imagenet = [], "imagenet" in script
    (write_imagenet if imagenet else write_cifar)(tmp_path)
    if teacher:
        flag = "--pretrained-backbone" if "--freezed" in words else "--tcheckpoint"
        words = (*words, flag, save_teacher(tmp_path / "t.pth", teacher, CLASSES, 1 if "dpcd" in words else 4))
    for method in methods.METHODS.values():

        def step(self, model, batch, unchanged=method.step):
            terms, predictions = unchanged(self, model, batch)
            found.append(sum(terms.values()).item())
            return terms, predictions

        monkeypatch.setattr(method, "step", step)
    batch = 2 if imagenet or "few" in script else 4
    small = ("--batch-size", batch, "--epochs", 1, "--limit-batches", 2, "--num-workers", 0, "--amp", "off")
    small += ("--image-size", 64) if imagenet else ()
    run(script, *words, *small, "--data", tmp_path, "--checkpoint-dir", tmp_path / "runs")
    assert found == [pytest.approx(first, rel=1e-5), pytest.approx(second, rel=1e-3)]
