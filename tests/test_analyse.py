"""The page of tools.analyse stands alone and holds pictures; its measures against values by hand."""

import argparse
import base64
import io
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import imagesets
import models
from scripts import QUICK, QUICK_RUN, WORLD, run, save_teacher
from tools import analyse, sections
from tools.measures import Answers, agreement, ask, confusion, divergence, overview, reliability
from tools.sections import EXTREMES
from utils import Checkpoint, UserError


def answers(rows, name="a"):
    """Return the answers of given probabilities (n, N)."""
    return Answers(name, torch.tensor(rows).clamp(min=1e-30).log(), {})


def check_standalone(html):
    """Assert that a page names no address outside itself and that every picture decodes; return their number."""
    pictures = re.findall('src="data:image/png;base64,([^"]*)"', html)
    for value in pictures:
        Image.open(io.BytesIO(base64.b64decode(value, validate=True))).load()
        html = html.replace(f"data:image/png;base64,{value}", "")
    assert not re.search(r"//|https?:|url\(|@import|<script|<link|src=\"[^\"]", html)
    assert set(re.findall('href="#([^"]*)"', html)) == set(re.findall(' id="([^"]*)"', html))
    return len(pictures)


def test_calibration_by_hand():
    """Two images in the bin of 0.9, one of them right, and one in that of 0.7, right."""
    found = answers([[0.9, 0.1], [0.1, 0.9], [0.3, 0.7]])
    confidence, accuracy, share, error = reliability(found, torch.tensor([0, 0, 1]))
    assert share[13] == pytest.approx(2 / 3) and accuracy[13] == 0.5 and confidence[13] == pytest.approx(0.9)
    assert error == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.3, rel=1e-5)
    assert reliability(answers([[1.0, 0.0]]), torch.tensor([0]))[3] == 0


def test_agreement_and_confusion_by_hand():
    labels = torch.tensor([0, 0, 1, 2, 2])
    student = answers(torch.eye(3)[[0, 1, 1, 0, 1]].clamp(0.1).tolist())
    teacher = answers(torch.eye(3)[[0, 0, 0, 0, 0]].clamp(0.1).tolist())
    kinds = ("both right", "student alone right", "teacher alone right", "same mistake", "different mistakes")
    assert agreement(student, teacher, labels) == dict.fromkeys(kinds, 20)
    assert confusion(student, labels).tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 0]]
    assert overview(student, teacher, labels)["agreement"] == pytest.approx(40)


def test_divergence_is_of_jensen_and_shannon():
    sure, unsure = answers([[1.0, 0.0], [1.0, 0.0], [0.2, 0.8]]), answers([[0.0, 1.0], [0.5, 0.5], [0.2, 0.8]])
    middle = 0.5 * math.log2(1 / 0.75) + 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    assert divergence(sure, unsure).tolist() == pytest.approx([1, middle, 0], abs=1e-6)


def test_answers_by_rotation():
    """Each classifier's share of right answers for each turn of the images, over batches of different sizes."""
    torch.manual_seed(0)
    network = models.create("resnet8_aux", 10).eval()
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    found, targets = ask("a", network, [(images[:4], labels[:4]), (images[4:], labels[4:])], torch.device("cpu"), True)
    assert torch.equal(targets, labels) and found.embeddings.shape == (6, 64)
    with torch.no_grad():
        for turns in range(4):
            logits, aux_logits = network(images.rot90(turns, (2, 3)))
            shares = [100 * (logits.argmax(1) == labels).float().mean().item()]
            shares += [100 * (aux.argmax(1) == 4 * labels + turns).float().mean().item() for aux in aux_logits]
            names = ["classes", *(f"head {number}, class and rotation" for number in (1, 2, 3))]
            assert [found.by_rotation[name][turns] for name in names] == pytest.approx(shares)
        torch.testing.assert_close(found.logits, network(images)[0], rtol=1e-4, atol=1e-4)


def test_the_curve_of_a_pair_is_that_of_its_better_network(tmp_path):
    """Not that of the network that was better in an epoch."""
    line = {"epoch": 1, "test/net1/top1": 60.0, "test/net2/top1": 55.0, "test/net": 1, "test/top1": 60.0}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = analyse.log_of(SimpleNamespace(path=tmp_path / "pair.pth.tar", best_net=2))
    assert found["test/top1"] == 55 and found["epoch"] == 1


def test_the_map_of_embeddings_shows_every_class(monkeypatch):
    """Also of a folder, whose images come class by class."""
    labels = torch.arange(4).repeat_interleave(700)
    network = Answers("a", torch.zeros(2800, 4), {}, embeddings=torch.rand(2800, 2))
    monkeypatch.setattr(sections, "TSNE", lambda **_: SimpleNamespace(fit_transform=lambda rows: rows.numpy()))
    study = SimpleNamespace(labels=labels, classes=list("abcd"), networks=[network], teacher=network)
    (axes,) = sections.embedding_section(study).pictures[0][0].axes
    assert [len(dots.get_offsets()) for dots in axes.collections] == [234, 233, 233, 234]


def test_networks_are_made_as_recorded_and_see_their_own_normalisation(tmp_path):
    network = models.create("torchvision/shufflenet_v2_x0_5_aux", 10, size=32, branches="light")
    content = {"net": network.state_dict(), "arch": network.arch, "args": {"branches": "light"}}
    torch.save({**content, "info": {"mean": [0.1] * 3, "std": [0.2] * 3}}, tmp_path / "light.pth")
    batches = imagesets.load_test("digits")
    file, args = Checkpoint(tmp_path / "light.pth"), argparse.Namespace()
    found = analyse.network_of(args, file, "resnet8", batches)
    images = next(iter(batches))[0][:2]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in batches.statistics)
    with torch.no_grad():
        expected = network.eval()((images * std + mean - 0.1) / 0.2)[0]
        torch.testing.assert_close(found(images)[0], expected, rtol=1e-3, atol=1e-3)
    assert analyse.names_of([file, Checkpoint(save_teacher(tmp_path / "teacher.pth"))]) == ["light", "teacher (2)"]


def test_test_images_of_other_classes_are_refused(tmp_path):
    nine, ten = save_teacher(tmp_path / "a.pth", num_classes=9), save_teacher(tmp_path / "t.pth")
    words = ["--weights", nine, "--teacher", ten, "--arch", "resnet8_aux", "--tarch", "resnet8_aux"]
    with pytest.raises(UserError, match="9 classes, but digits has 10"):
        analyse.main(analyse.parse_args([*map(str, words), "--dataset", "digits", "--out", "page.html"]), WORLD)


@pytest.mark.slow
def test_a_page_of_runs_stands_alone(tmp_path, capsys):
    """A student with heads and a log, one without either, and a pair's better network, beside their teacher."""
    teacher, plain = save_teacher(tmp_path / "teacher.pth"), save_teacher(tmp_path / "plain.pth", "resnet14")
    command = ("--arch", "resnet8_aux", "--tarch", "resnet8_aux", "--tcheckpoint", teacher, *QUICK, "--epochs", 2)
    run("train_student_cifar", *command, "--checkpoint-dir", tmp_path / "runs")
    run("train_online_kd_cifar", "--arch", "resnet8_resnet8", *QUICK_RUN, "--checkpoint-dir", tmp_path / "pair")
    hsakd, pair = tmp_path.glob("runs/*/resnet8_aux.pth.tar"), tmp_path.glob("pair/*/resnet8_resnet8.pth.tar")
    content = torch.load(plain, weights_only=True)
    torch.save({**content, "arch": "resnet14", "method": "kd"}, plain)
    words = ["--weights", next(hsakd), plain, next(pair), "--teacher", teacher, "--tarch", "resnet8_aux"]
    analyse.main(analyse.parse_args([*map(str, words), "--out", f"{tmp_path}/page.html"]), WORLD)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert check_standalone(html) == 9 + 3 * EXTREMES
    titles = "Overview, Learning curves, Heads over the epochs, Accuracy by class, Confusion, Calibration, "
    titles += "Agreement with the teacher, Rotated images, hssakd differs most"
    assert all(title in html for title in titles.split(", "))
    logged = json.loads(next(tmp_path.glob("runs/*/log.jsonl")).read_text().splitlines()[-1])["test/top1"]
    row = re.search(r"<td>hsakd</td><td>([\d.]+)</td>", html)
    assert len(html) < 5e6 and float(row[1]) == pytest.approx(logged, abs=0.6)
