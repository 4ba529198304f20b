"""predict.py: what is predicted is what the test sees; unreadable images, output forms, mistakes."""

import csv
import json
from pathlib import Path

import pytest
import torch
import torchvision
from test_cli import flags_read
from test_own_images import write_splits

import imagesets
import models
import utils
from scripts import refused, run, status

SIZES = [(48, 36), (48, 41), (48, 46)]  # of the photos of a class


def train(folder, *flags):
    """Train resnet8_aux for a step on the photos in `folder`; return the path of the weights."""
    data = ("--dataset", "imagefolder", "--data", folder, "--epochs", "1", "--batch-size", "6", "--amp", "off")
    run("train_teacher_cifar", *data, *flags, "--arch", "resnet8_aux", "--checkpoint-dir", folder / "runs")
    return next((folder / "runs").glob("*/resnet8_aux.pth.tar"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of photos and the path of weights trained on them."""
    folder = tmp_path_factory.mktemp("photos")
    write_splits(folder, SIZES)
    return folder, train(folder)


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("RGB", ["--resize", "pad", "--mean", "0.3", "0.4", "0.5", "--std", "0.2"]),
        ("RGB", ["--from-files", "--image-size", "24"]),
        ("I;16", ["--resize", "squash"]),
    ],
)
def test_predictions_are_those_of_the_test(mode, flags, tmp_path, capsys):
    write_splits(tmp_path, SIZES, mode=mode)
    path = train(tmp_path, *flags)
    checkpoint = utils.Checkpoint(path)
    network = models.create("resnet8", 2).eval()
    checkpoint.load_into(network)
    images = imagesets.load_test("imagefolder", tmp_path, **imagesets.recorded(checkpoint.info))
    with torch.no_grad():
        expected = torch.cat([network(batch[0]) for batch in images]).softmax(1)
    capsys.readouterr()
    run("predict", "--weights", path, tmp_path / "val", "--json", "--top", "2")
    found = json.loads(capsys.readouterr().out)
    assert [entry["image"] for entry in found] == [str(file) for file in sorted((tmp_path / "val").glob("*/*"))]
    by_name = [{top["class"]: top["probability"] for top in entry["classes"]} for entry in found]
    values = torch.tensor([[entry["cat"], entry["dog"]] for entry in by_name])
    assert torch.allclose(values, expected, atol=1e-6) and values.std(0).min() > 1e-4


def test_every_form_says_the_same(photos, capsys, monkeypatch):
    folder, path = photos
    argv = ("--weights", path, folder / "val" / "cat", folder / "val" / "dog" / "1.png")
    defined, read = flags_read("predict", argv, monkeypatch)
    assert not defined - read
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    run("predict", *argv, "--csv")
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    run("predict", *argv, "--json", "--top", "1")
    found = json.loads(capsys.readouterr().out)
    best = [row for row in rows if row["rank"] == "1"]
    assert len(rows) == 8 and len(best) == 4
    for entry, row in zip(found, best, strict=True):
        assert entry["image"] == row["image"]
        assert entry["classes"] == [{"class": row["class"], "probability": float(row["probability"])}]
    named = [line for line in table[1:] if len(line) == 3]
    assert [line[:2] for line in named] == [[row["image"], row["class"]] for row in best]
    assert [float(line[2]) for line in named] == pytest.approx([float(row["probability"]) for row in best], abs=1e-4)


def test_unreadable_images_are_named_and_skipped(photos, tmp_path, capsys):
    folder, path = photos
    (tmp_path / "broken.jpg").write_text("no image")
    (tmp_path / "IMG_1.HEIC").write_text("of a format that is not installed")
    (tmp_path / ".hidden.png").write_text("not looked at")
    (tmp_path / "link").symlink_to(folder / "val" / "dog")
    (tmp_path / "good.png").write_bytes((folder / "val" / "cat" / "0.png").read_bytes())
    assert status("predict", "--weights", path, tmp_path, tmp_path / "missing.png", "--json") == 1
    out, error = capsys.readouterr()
    found, *linked = [entry["image"] for entry in json.loads(out)]
    assert found == str(tmp_path / "good.png") and len(linked) == len(list((folder / "val" / "dog").iterdir()))
    assert "broken.jpg" in error and "missing.png" in error and "1 .HEIC" in error and "hidden" not in error


def test_foreign_weights_take_everything_by_flag(photos, tmp_path, capsys):
    folder, _ = photos
    image = folder / "val" / "dog" / "2.png"
    torch.manual_seed(0)
    network = models.create("resnet8", 3).eval()
    torch.save(network.state_dict(), tmp_path / "foreign.pth")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    argv = ["predict", "--weights", tmp_path / "foreign.pth", image, "--json"]
    reading = ["--arch", "resnet8_aux", "--image-size", "20", "--mean", "0.5", "--std", "0.25"]
    run(*argv, *reading, "--resize", "squash", "--class-names", tmp_path / "names.txt")
    found = {top["class"]: top["probability"] for top in json.loads(capsys.readouterr().out)[0]["classes"]}
    statistics = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    images = imagesets.load_test("imagefolder", folder, size=20, resize="squash", **statistics)
    with torch.no_grad():
        expected = network(next(iter(images))[0])[5].softmax(0)
    assert [found[name] for name in ("red", "green", "blue")] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.slow
def test_a_librarys_weights_see_images_as_the_library_shows_them(photos, tmp_path, capsys):
    """Resized and cropped by its own transforms, not to the size alone."""
    image, name = photos[0] / "val" / "dog" / "2.png", "shufflenet_v2_x0_5"
    torch.manual_seed(0)
    network = models.create(f"torchvision/{name}", 3)
    for _ in range(3):  # plausible statistics
        network(torch.randn(4, 3, 64, 64))
    torch.save(network.state_dict(), tmp_path / "foreign.pth")
    run("predict", "--weights", tmp_path / "foreign.pth", image, "--arch", f"torchvision/{name}", "--json")
    found = {top["class"]: top["probability"] for top in json.loads(capsys.readouterr().out)[0]["classes"]}
    pixels = torchvision.io.decode_image(str(image))
    shown = torchvision.models.get_model_weights(name).DEFAULT.transforms()(pixels)
    with torch.no_grad():
        expected = network.eval()(shown[None])[0].softmax(0)
    assert [found[number] for number in "012"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_file_of_code_runs_only_from_the_command_line(photos, tmp_path, monkeypatch, capsys):
    folder, _ = photos
    monkeypatch.chdir(tmp_path)
    code = "import models, pathlib\npathlib.Path('ran').touch()\n"
    (tmp_path / "own.py").write_text(f"{code}def net(num_classes):\n    return models.create('resnet8', num_classes)\n")
    content = {"net": models.create("resnet8", 2).state_dict(), "arch": "own.py:net", "num_classes": 2}
    torch.save(content, tmp_path / "own.pth")
    argv = ["--weights", tmp_path / "own.pth", folder / "val", "--image-size", "24", "--mean", "0.5", "--std", "0.5"]
    assert status("predict", *argv) == 2 and not (tmp_path / "ran").exists()
    assert status("predict", *argv, "--arch", "own.py:net") == 0 and (tmp_path / "ran").exists()


OWN = ("--arch", f"{Path(models.__file__).parent / 'vgg.py'}:VGG")


def mistakes(folder, path, tmp_path):
    """Yield command lines and what their one line says."""
    image = folder / "val" / "cat" / "0.png"
    yield ["--weights", tmp_path / "none.pth", image], "none.pth"
    yield ["--weights", path, tmp_path / "empty"], "no images"
    yield ["--weights", tmp_path / "bare.pth", image], "--arch"
    yield ["--weights", tmp_path / "bare.pth", image, "--arch", "vgg8"], "--image-size"
    reading = ["--arch", "vgg8", "--mean", "0.5", "--std", "0.5"]
    yield ["--weights", tmp_path / "bare.pth", image, *reading, "--image-size", "4"], "images of 4 pixels"
    yield ["--weights", path, image, "--class-names", tmp_path / "names.txt"], "3 class names"
    yield ["--weights", path, image, "--mean", "0.5", "0.5"], "--mean"
    yield ["--weights", path, image, "--arch", "wrn_16_1"], "wrn_16_1"
    yield ["--weights", tmp_path / "bare.pth", image, *OWN, "--mean", "0.5", "--std", "0.5"], "--image-size"


def test_mistakes_are_one_line(photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    torch.save(models.create("vgg8", 2).state_dict(), tmp_path / "bare.pth")
    for argv, said in mistakes(*photos, tmp_path):
        assert said in refused(capsys, *argv, script="predict")
