"""The methods beside HSAKD in the one harness: online mutual pairs, DPCD, KD, DKD and few-shot, on the digits."""

import gc
import json
import re

import numpy as np
import pytest
import torch
from scripts import QUICK, QUICK_RUN, log_lines, run, save_teacher, seen, status
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit

import datasets
import engine
import methods
import models
import published
import report
import train_student_cifar
import utils

SEED = "dataset_digits_seed0"


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    """Train a mutual pair for three epochs; return its run folder."""
    root = tmp_path_factory.mktemp("online")
    run("train_online_kd_cifar", "--arch", "resnet8_resnet8", *QUICK, "--epochs", 3, "--checkpoint-dir", root)
    return root / f"train_online_kd_cifar_arch_resnet8_resnet8_{SEED}"


@pytest.fixture
def teacher(tmp_path):
    """Return untrained weights of a teacher with four views."""
    return save_teacher(tmp_path / "teacher.pth.tar")


def measure(capsys, *argv):
    """Return the JSON object that test_model.py prints."""
    capsys.readouterr()
    run("test_model", "--dataset", "digits", "--amp", "off", "--json", *argv)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_both_networks_are_logged_and_the_best_is_named(pair_folder):
    """`test/top1` is the better network's, and the best epoch says which network that was."""
    lines = log_lines(pair_folder)
    for line in lines:
        both = [line["test/net1/top1"], line["test/net2/top1"]]
        assert line["test/top1"] == max(both) and line["test/net"] == 1 + (both[1] > both[0])
        assert {"train/net1/top1", "train/net2/top1", "train/logit_kl", "train/aux_kl"} <= line.keys()
        chosen = lines[line["best/epoch"] - 1]
        assert (line["best/top1"], line["best/net"]) == (chosen["test/top1"], chosen["test/net"])
    for name in ("resnet8_resnet8.pth.tar", "resnet8_resnet8_best.pth.tar"):
        best = utils.read_checkpoint(pair_folder / name)["best"]
        assert best["net"] in (1, 2)
    assert best["net"] == lines[best["epoch"] - 1]["test/net"]


def test_held_out_images_choose_the_network_of_a_pair(tmp_path, monkeypatch, capsys):
    """Its accuracy on the test images is what is told, also where the other network's is better there."""
    given = iter([{"net1/top1": 20.0, "net2/top1": 50.0}, {"net1/top1": 80.0, "net2/top1": 40.0}] * 2)

    def evaluate(model, batches, device, dtype=None, heads=False, net=None):
        accuracies = next(given)
        net = net or max((1, 2), key=lambda number: accuracies[f"net{number}/top1"])
        return {**accuracies, "top1": accuracies[f"net{net}/top1"], "net": net}

    monkeypatch.setattr(engine, "evaluate", evaluate)
    argv = [*QUICK_RUN, "--arch", "resnet8_resnet8", "--val-split", "0.2", "--checkpoint-dir", tmp_path]
    run("train_online_kd_cifar", *argv)
    said = "best top-1 40.00 at epoch 1 of network 2 (selected on held-out training images, 50.00 there), last 40.00"
    assert said in capsys.readouterr().out
    (line,) = log_lines(next(tmp_path.iterdir()))
    assert (line["val/net"], line["test/net"], line["test/top1"], line["best/net"]) == (2, 2, 40.0, 2)
    next(given)
    run("train_online_kd_cifar", *argv, "--evaluate")
    assert "top1 40.00, net 2" in capsys.readouterr().out


@pytest.mark.parametrize("net", [1, 2])
def test_exported_backbone_is_the_network_of_the_pair(pair_folder, tmp_path, capsys, net):
    """To the same accuracy as in the pair, to the same bits, and accepted as any baseline's weights are."""
    weights, exported = pair_folder / "resnet8_resnet8.pth.tar", tmp_path / "backbone.pth.tar"
    chosen = ("--student-weights", weights, "--net", net, "--export-backbone", exported)
    limit = ("--limit-batches", 2, "--batch-size", 4)
    of_pair = measure(capsys, "--arch", "resnet8_resnet8", *chosen, *limit)
    alone = measure(capsys, "--arch", "resnet8", "--student-weights", exported, *limit)
    assert of_pair["top1"] == alone["top1"] == log_lines(pair_folder)[-1][f"test/net{net}/top1"]
    state, network = utils.read_checkpoint(weights)["net"], models.create("resnet8", 10)
    content, origin = utils.load_weights(network, exported), utils.read_checkpoint(weights)
    assert all(content[key] == origin[key] for key in ("epoch", "num_classes", "dataset", "size", "data"))
    assert content["acc"] is None and content["arch"] == "resnet8"  # not of all images
    assert all(torch.equal(value, state[f"net{net}.backbone.{key}"]) for key, value in network.state_dict().items())


def test_pairs_only(tmp_path, capsys):
    assert status("train_online_kd_cifar", "--arch", "resnet8_aux", *QUICK_RUN, "--checkpoint-dir", tmp_path) == 2
    assert "resnet8_resnet8" in capsys.readouterr().err


TERMS = {
    "hsakd": {"task", "aux_kl", "logit_kl"},
    "kd": {"task", "logit_kl"},
    "dkd": {"task", "teacher_path"},
    "dpcd": {"task", "aux", "teacher_path", "self_path"},
}


@pytest.mark.parametrize("method", TERMS)
def test_every_method_trains_is_saved_and_resumes(tmp_path, teacher, capsys, method):
    """Its terms are logged, the weights say what they are, and a resumed run is the uninterrupted one to the bit."""
    arch = "resnet8" if method in ("kd", "dkd") else "resnet8_aux"
    command = ("--arch", arch, "--tarch", "resnet8_aux", "--tcheckpoint", teacher, "--method", method, *QUICK)
    for root, *flags in (("a", "--epochs", 2), ("b", "--epochs", 1), ("b", "--epochs", 2, "--resume")):
        run("train_student_cifar", *command, *flags, "--checkpoint-dir", tmp_path / root)
        gc.collect()  # the folder's lock lives as long as the run, which another process would have ended
    folders = [tmp_path / root / f"train_student_cifar_tarch_resnet8_aux_arch_{arch}_{SEED}" for root in "ab"]
    assert log_lines(folders[0])[-1] == log_lines(folders[1])[-1]
    terms = {key.removeprefix("train/") for key in log_lines(folders[0])[0] if key.startswith("train/")}
    assert {name for name in terms if not name.endswith(("top1", "_joint", "_class"))} == {*TERMS[method], "loss"}
    first, second = (utils.read_checkpoint(folder / f"{arch}.pth.tar") for folder in folders)
    assert all(torch.equal(value, second["net"][key]) for key, value in first["net"].items())
    assert first["method"] == method and bool(first["objective"]) == (method == "dpcd")
    assert all(torch.equal(value, second["objective"][key]) for key, value in first["objective"].items())
    result = measure(capsys, "--arch", arch, "--student-weights", folders[0] / f"{arch}.pth.tar")
    assert result["method"] == method
    rotations = utils.weights_layout(folders[0] / f"{arch}.pth.tar")[1]
    assert rotations == {"hsakd": 4, "dpcd": 1}.get(method)


def test_one_view_teacher_serves_dpcd_and_not_hsakd(tmp_path, capsys):
    """Its heads have as many outputs as there are classes."""
    root = ("--checkpoint-dir", tmp_path)
    run("train_teacher_cifar", "--arch", "resnet8_aux", "--rotations", 1, "--tag", "one_view", *QUICK_RUN, *root)
    weights = tmp_path / f"train_teacher_cifar_arch_resnet8_aux_{SEED}_one_view" / "resnet8_aux.pth.tar"
    assert utils.weights_layout(weights) == (10, 1)
    command = ("--arch", "resnet8_aux", "--tarch", "resnet8_aux", "--tcheckpoint", weights, *QUICK_RUN, *root)
    assert status("train_student_cifar", *command, "--method", "dpcd") == 0
    capsys.readouterr()
    assert status("train_student_cifar", *command, "--method", "hsakd", "--tag", "x") == 2
    assert "4 rotations apart, not 1" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["kd", "dkd", "dpcd"])
def test_a_plain_teacher_under_its_auxiliary_name(tmp_path, method):
    """As of the teacher zoos, whose weights have no auxiliary classifiers: these methods read none."""
    weights = save_teacher(tmp_path / "t.pth", "resnet14")
    words = ["--tarch", "resnet14_aux", "--arch", "resnet8_aux", "--tcheckpoint", str(weights), "--dataset", "digits"]
    _, objective = methods.create_pair(train_student_cifar.parse_args([*words, "--method", method]), seen(10))
    start = torch.load(weights, weights_only=True)["net"]
    assert all(torch.equal(value, start[key]) for key, value in objective.teacher.state_dict().items())
    args = {"tarch": "resnet14_aux", "tcheckpoint": "train_baseline_cifar_arch_resnet14_dataset_digits_seed0/resnet14.pth.tar"}
    assert not published.is_joint(args)


@pytest.mark.parametrize("method", TERMS)
def test_only_hsakd_runs_the_teachers_heads(teacher, method):
    """The others take the class logits alone: no arithmetic is spent on auxiliary classifiers that they do not read."""
    pair = ["--tarch", "resnet8_aux", "--arch", "resnet8_aux", "--tcheckpoint", str(teacher), "--dataset", "digits"]
    _, objective = methods.create_pair(train_student_cifar.parse_args([*pair, "--method", method]), seen(10))
    assert hasattr(objective.teacher, "auxiliary_classifier") == (method == "hsakd")


@pytest.mark.parametrize("method", TERMS)
def test_constants_of_other_methods_are_refused(capsys, method):
    command = ["--tarch", "resnet56_aux", "--tcheckpoint", "a", "--method", method]
    foreign = set().union(*methods.METHODS.values()) - set(methods.METHODS[method])
    for name in foreign:
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(SystemExit) as stop:
            train_student_cifar.parse_args([*command, flag, *["1"] * (2 if name.endswith("range") else 1)])
        assert stop.value.code == 2 and flag in capsys.readouterr().err


def test_few_shot_trains_on_the_published_share_of_the_digits(tmp_path, teacher, capsys):
    """At 0.25: the class counts of scikit-learn's split over the training labels, the same in every run and seed."""
    command = ("--arch", "resnet8_aux", "--tarch", "resnet8_aux", "--tcheckpoint", teacher, "--few-ratio", 0.25, *QUICK_RUN)
    told = []
    for seed in (0, 1):
        run("train_student_few_shot", *command, "--manual_seed", seed, "--checkpoint-dir", tmp_path)
        told.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("training images")))
        folder = f"train_student_few_shot_tarch_resnet8_aux_arch_resnet8_aux_dataset_digits_few_ratio_0.25_seed{seed}"
        assert (tmp_path / folder / "resnet8_aux.pth.tar").is_file()
    labels = datasets.digits(None, train=True).labels.numpy()
    assert len(labels) == 1437 and len(load_digits().target) == 1797
    split = StratifiedShuffleSplit(n_splits=1, test_size=0.75, random_state=0).split(np.zeros(len(labels)), labels)
    counts = np.bincount(labels[next(split)[0]])
    assert told[0] == told[1] and counts.sum() == 359
    assert re.findall(r"(\d+) (\d+)", told[0]) == [(str(i), str(count)) for i, count in enumerate(counts)]


def test_report_reads_what_the_scripts_write(tmp_path, teacher, pair_folder):
    """Real run folders: one row a method, seeds joined, the frozen teacher's student apart from the joint one's."""
    common = (*QUICK_RUN, "--checkpoint-dir", tmp_path)
    student = ("--arch", "resnet8_aux", "--tarch", "resnet8_aux", "--tcheckpoint", teacher, *common)
    for seed in (0, 1):
        run("train_baseline_cifar", "--arch", "resnet8", *common, "--manual_seed", seed)
    backbone = tmp_path / f"train_baseline_cifar_arch_resnet8_{SEED}" / "resnet8.pth.tar"
    run("train_teacher_cifar", "--arch", "resnet8_aux", "--freezed", "--pretrained-backbone", backbone, *common)
    frozen = tmp_path / f"train_teacher_cifar_arch_resnet8_aux_{SEED}" / "resnet8_aux.pth.tar"
    run("train_student_cifar", *student)
    run("train_student_cifar", *student, "--tcheckpoint", frozen, "--tag", "freezed")
    run("train_student_cifar", *student, "--method", "dpcd", "--tag", "dpcd")
    table = json.loads(published.TABLE.read_text())
    groups = report.group(report.find_runs([tmp_path, pair_folder]))
    rows = [dict(zip(report.COLUMNS, report.make_row(*group, table), strict=True)) for group in groups]
    found = {(row["script"], row["network"], row["method"]): row for row in rows}
    pair = "resnet8_aux -> resnet8_aux"
    assert found.keys() == {
        ("train_baseline_cifar", "resnet8", ""),
        ("train_teacher_cifar", "resnet8_aux", "frozen"),
        ("train_student_cifar", pair, "hsakd*"),
        ("train_student_cifar", pair, "hsakd"),
        ("train_student_cifar", pair, "dpcd*"),
        ("train_online_kd_cifar", "resnet8_resnet8", ""),
    }
    assert found["train_baseline_cifar", "resnet8", ""]["seeds"] == "0 1"
    online = found["train_online_kd_cifar", "resnet8_resnet8", ""]
    last = log_lines(pair_folder)[-1]
    assert online["epochs"] == "3/3" and online["last top-1"] == f"{last['test/top1']:.2f}"
    assert online["best top-1"] == f"{last['best/top1']:.2f}" and float(online["images/s"]) > 0
