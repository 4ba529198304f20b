"""export.py: every format is read back and computes what the network computes; 8 bits; mistakes."""

import json
import sys

import numpy as np
import pytest
import torch
from test_cli import flags_read
from test_own_images import write_images

import imagesets
import models
from scripts import WORLD, parsed, refused, run, status
from tools import exporting, trained

pytest.importorskip("onnxruntime")
import onnxruntime  # noqa: E402

INFO = {"dataset": "digits", "class_names": [str(number) for number in range(10)], "size": 32}
INFO |= {"mean": [0.3054] * 3, "std": [0.3237] * 3}


def save_network(path, arch, size=32, classes=10, info=INFO):
    """Write weights with plausible BatchNorm statistics as a checkpoint; return the network and the path."""
    torch.manual_seed(0)
    network = models.create(arch, classes, size=size)
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(8, 3, size, size))
    torch.save({"net": network.state_dict(), "arch": arch, "num_classes": classes, "info": info}, path)
    return models.backbone_of(network).eval(), path


def digit_images(count=7):
    """Return some test digits (count, 3, 32, 32), as the networks see them."""
    return next(iter(imagesets.load_test("digits")))[0][:count].contiguous()


def onnx_logits(path, images):
    """Return the logits of an ONNX file, read without this project's code."""
    network = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (entry,) = network.get_inputs()
    return torch.from_numpy(network.run(None, {entry.name: images.numpy()})[0])


def read_logits(kind, path, arch, images):
    """Return the logits of an exported file, read as its format is documented."""
    if kind == "onnx":
        return onnx_logits(path, images)
    if kind == "pt2":
        return torch.export.load(path).module()(images)
    network = models.create(arch, 10).eval()
    if kind == "safetensors":
        from safetensors.torch import load_file

        network.load_state_dict(load_file(path))
    else:
        network.load_state_dict(torch.load(path))
    return network(images)


def metadata(kind, path):
    """Return what a file of a format that has room for metadata says of its images."""
    if kind == "onnx":
        network = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return {name: json.loads(value) for name, value in network.get_modelmeta().custom_metadata_map.items()}
    if kind == "pt2":
        files = {"preprocessing.json": ""}
        torch.export.load(path, extra_files=files)
        return json.loads(files["preprocessing.json"])
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["preprocessing"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", exporting.FORMATS)
def test_every_format_computes_what_the_network_does(kind, tmp_path, capsys, monkeypatch):
    network, weights = save_network(tmp_path / "weights.pth", "resnet8_aux")
    path = tmp_path / f"file.{kind}"
    defined, read = flags_read("export", ["--weights", weights, "--format", kind, "--output", path], monkeypatch)
    assert not defined - read
    out = capsys.readouterr().out
    assert out.count("360 of 360") == 2
    for count in (1, 7):
        images = digit_images(count)
        with torch.no_grad():
            expected, found = network(images), read_logits(kind, path, "resnet8", images)
        assert torch.allclose(found, expected, atol=1e-5)
    described = json.loads((tmp_path / f"file.{kind}.json").read_text())
    assert described["size"] == 32 and described["mean"] == INFO["mean"] and described["class_names"][3] == "3"
    assert kind == "state_dict" or metadata(kind, path) == described


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kinds"),
    [
        ("ShuffleV1", ["pt2"]),  # it branches on the layout of memory
        ("torchvision/shufflenet_v2_x0_5", ["onnx", "pt2"]),
        ("timm/test_vit", ["onnx", "pt2"]),
    ],
)
def test_networks_of_every_origin(arch, kinds, tmp_path, capsys):
    """On own images, at the size of the weights."""
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    size = 32 if arch == "ShuffleV1" else 64
    write_images(tmp_path / "images", np.random.RandomState(0).randint(40, 90, (40, 2)).tolist())
    network, weights = save_network(tmp_path / "w.pth", arch, size, info={**INFO, "size": size})
    for kind in kinds:
        argv = ("--format", kind, "--output", tmp_path / f"file.{kind}", "--images", tmp_path / "images")
        run("export", "--weights", weights, *argv)
        assert capsys.readouterr().out.count("40 of 40") == 2
        images = torch.randn(3, 3, size, size)
        with torch.no_grad():
            found, expected = read_logits(kind, tmp_path / f"file.{kind}", arch, images), network(images)
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(("factor", "ended"), [(1 + 1e-4, 0), (1.01, 1), (float("nan"), 1)])
def test_a_file_that_computes_something_else_is_removed(factor, ended, tmp_path, monkeypatch, capsys):
    """Rounding is no difference, but NaN is."""
    network, weights = save_network(tmp_path / "weights.pth", "resnet8")
    monkeypatch.setattr(exporting, "read_back", lambda *_: lambda images: factor * network(images))
    argv = ("--weights", weights, "--format", "state_dict", "--output", tmp_path / "file.pth")
    assert status("export", *argv) == ended
    assert len([*tmp_path.iterdir()]) == (1 if ended else 3)
    assert ("removed" in capsys.readouterr().err) == bool(ended)


@pytest.mark.slow
def test_8_bits_keep_nine_of_ten_decisions(tmp_path, capsys):
    data = ("--dataset", "digits", "--arch", "resnet8", "--epochs", "4", "--milestones", "3", "--amp", "off")
    run("train_baseline_cifar", *data, "--batch-size", "16", "--checkpoint-dir", tmp_path)
    weights = next(tmp_path.glob("*/resnet8.pth.tar"))
    capsys.readouterr()
    run("export", "--weights", weights, "--output", tmp_path / "net.onnx", "--int8")
    accuracies = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("top-1")]
    batches = list(imagesets.load_test("digits"))
    images, labels = torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])
    decided = [onnx_logits(tmp_path / name, images).argmax(1) for name in ("net.onnx", "net_int8.onnx")]
    assert (decided[0] == decided[1]).float().mean() >= 0.9
    expected = [100 * (found == labels).float().mean().item() for found in decided]
    assert accuracies == pytest.approx([expected[0], *expected], abs=0.01) and expected[0] > 80
    sizes = [(tmp_path / name).stat().st_size for name in ("net.onnx", "net_int8.onnx")]
    assert sizes[1] < sizes[0] / 2 and (tmp_path / "net_int8.onnx.json").exists()


def test_test_images_are_labelled_in_the_order_of_the_classes_given(tmp_path):
    torch.save(models.create("resnet8", 3).state_dict(), tmp_path / "foreign.pth")
    (tmp_path / "names.txt").write_text("c\na\nb\n")
    reading = ("--arch", "resnet8", "--image-size", 32, "--mean", 0.5, "--std", 0.5)
    words = ("--weights", tmp_path / "foreign.pth", *reading, "--class-names", tmp_path / "names.txt", "--output", "a")
    network = trained.load(parsed("export", *words), WORLD)
    assert network.classes == network.settings["class_names"] == ["c", "a", "b"]


def mistakes(weights, tmp_path):
    """Yield command lines and what their one line says."""
    common = ["--weights", weights, "--output", tmp_path / "file"]
    yield [*common, "--format", "pt2", "--int8"], "--int8"
    yield [*common, "--image-size", "48"], "48 pixels"
    yield ["--weights", tmp_path / "foreign.pth", *common[2:], "--arch", "resnet8"], "--image-size"
    reading = ["--arch", "resnet8", "--image-size", "32", "--mean", "0.5", "--std", "0.5"]
    yield ["--weights", tmp_path / "foreign.pth", *common[2:], *reading], "--dataset"
    yield ["--weights", tmp_path / "foreign.pth", *common[2:], *reading, "--dataset", "digits"], "4 classes"
    yield [*common[:3], tmp_path / "none" / "file"], "cannot write"
    yield [*common, "--images", tmp_path / "none"], "no readable images"


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    _, weights = save_network(tmp_path / "weights.pth", "resnet8")
    torch.save(models.create("resnet8", 4).state_dict(), tmp_path / "foreign.pth")
    for argv, said in mistakes(weights, tmp_path):
        assert said in refused(capsys, *argv, script="export")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert status("export", "--weights", weights, "--output", tmp_path / "file") == 2
    assert "requirements-extra.txt" in capsys.readouterr().err and not (tmp_path / "file").exists()
