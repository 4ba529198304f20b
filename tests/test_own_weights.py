"""Own and foreign weights: tested before the first step, read as they were trained, loaded into other networks."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imagesets
import models
import utils
from methods.base import with_features
from models.adapted import Adapted
from scripts import refused, run, status, stopped
from training import speed, start

FAULTS = Path(__file__).resolve().parents[2] / "shared" / "faults" / "checkpoints"
needs_faults = pytest.mark.skipif(not FAULTS.exists(), reason="needs ../shared/faults")
COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "grey": (128, 128, 128), "red": (220, 50, 40)}
OTHER = ((0.3, 0.4, 0.2), (0.3, 0.2, 0.4))  # a normalisation that no data set has
AS_TRAINED = ("--mean", *OTHER[0], "--std", *OTHER[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder of 12 training and 4 test images of each of four colours."""
    root, draw = tmp_path_factory.mktemp("colours"), np.random.RandomState(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(colour + draw.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def words(folder, place, *more):
    """Return the words of a short run on the colours."""
    quick = ("--batch-size", 12, "--epochs", 1, "--amp", "off", "--num-workers", 1)
    return ("--dataset", "imagefolder", "--data", folder, "--checkpoint-dir", place, *quick, *more)


def trained(folder, place, script, arch):
    """Train a network whose images were normalised by `OTHER`; return its checkpoint."""
    run(script, *words(folder, place, *AS_TRAINED, "--arch", arch, "--epochs", 6, "--init-lr", 0.1))
    return place / f"{script}_arch_{arch}_dataset_imagefolder_seed0" / f"{arch}.pth.tar"


@pytest.fixture(scope="module")
def backbone(folder, tmp_path_factory):
    """Return the checkpoint of a plain network that knows the colours."""
    return trained(folder, tmp_path_factory.mktemp("backbone"), "train_baseline_cifar", "resnet8")


@pytest.fixture(scope="module")
def teacher(folder, tmp_path_factory):
    """Return the checkpoint of a network with heads that knows the colours."""
    return trained(folder, tmp_path_factory.mktemp("teacher"), "train_teacher_cifar", "resnet8_aux")


def changed(path, file, change, **more):
    """Write a copy of a checkpoint whose weights `change` has changed in place, with other entries; return `file`."""
    content = torch.load(path, weights_only=True)
    change(content["net"])
    torch.save({**content, **more}, file)
    return file


def permute(key):
    """Return a change that puts the classes of a classifier in another order."""

    def change(weights):
        for part in ("weight", "bias"):
            value = weights[f"{key}.{part}"]
            weights[f"{key}.{part}"] = value.roll(len(value) // 4, 0)

    return change


def distil(folder, place, weights, *more, method="kd", arch="resnet8"):
    """Distil weights into a student; return what its run folder holds of its start."""
    student = ("--method", method, "--arch", arch, "--tarch", arch, "--tcheckpoint", weights)
    run("train_student_cifar", *words(folder, place, *student, *more))
    (found,) = place.glob("train_student*/args.json")
    return json.loads(found.read_text())


@pytest.mark.parametrize(
    ("change", "top1", "warned"),
    [
        (lambda weights: None, 100, None),
        (permute("fc"), 0, "near chance"),
        (lambda weights: weights["fc.weight"].zero_(), 25, "near chance"),
        (lambda weights: weights["fc.bias"][0].sub_(1000), 75, "records"),
    ],
)
def test_a_teacher_is_tested_before_the_first_step(change, top1, warned, folder, backbone, tmp_path, capsys):
    weights = changed(backbone, tmp_path / "t.pth", change, acc=100.0)
    found = distil(folder, tmp_path, weights)
    assert found["tested"] == {"teacher": {"top1": top1}}
    assert (found["digests"] == {str(weights): utils.Checkpoint(backbone).digest}) == (top1 == 100)
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("warning")]
    assert ([warned in line for line in lines] == [True] if warned else not lines) and f"{top1:.2f}" in output.out
    resumed = distil(folder, tmp_path, weights, "--resume", "--epochs", 2)
    assert resumed["tested"] == {"teacher": {"top1": top1}} and "un-rotated" not in capsys.readouterr().out


def test_what_other_people_record_is_shown_and_not_compared(folder, backbone, tmp_path, monkeypatch, capsys):
    """The test takes 2,000 images at most."""
    some, asked = imagesets.in_memory.TestBatches.some, []
    monkeypatch.setattr(imagesets.in_memory.TestBatches, "some", lambda self, n: asked.append(n) or some(self, n))
    content = torch.load(backbone, weights_only=True)
    content["net"]["fc.bias"][0] -= 1000
    torch.save({"net": content["net"], "acc": 98.76}, tmp_path / "t.pth")
    statistics = ("--teacher-mean", *OTHER[0], "--teacher-std", *OTHER[1])
    assert distil(folder, tmp_path, tmp_path / "t.pth", *statistics)["tested"] == {"teacher": {"top1": 75}}
    output = capsys.readouterr()
    assert "98.76" in output.out and "warning" not in output.err and asked == [2000]


def test_every_head_that_is_matched_is_tested(folder, teacher, tmp_path, capsys):
    """Its classes are matched by name: here the student has them in another order."""
    (tmp_path / "names.txt").write_text("red\nblue\n\ngrey\ngreen\n")
    names = ("--class-names", tmp_path / "names.txt")
    right = distil(folder, tmp_path / "right", teacher, *names, method="hsakd", arch="resnet8_aux")
    found, output = right["tested"]["teacher"], capsys.readouterr()
    assert list(found) == ["top1", "aux1", "aux2", "aux3"] and min(found.values()) >= 75
    assert right["class_names"] == ["red", "blue", "grey", "green"]
    assert "by name" in output.out and "warning" not in output.err
    wrong = changed(teacher, tmp_path / "t.pth", permute("auxiliary_classifier.fc2"))
    tested = distil(folder, tmp_path / "wrong", wrong, method="hsakd", arch="resnet8_aux")["tested"]["teacher"]
    assert tested == {**found, "aux2": tested["aux2"]} and tested["aux2"] < 28
    assert "(aux2)" in capsys.readouterr().err


def adapted(name="resnet8_aux"):
    """Return (network, the same one for images with another normalisation and its classes in reverse order)."""
    torch.manual_seed(0)
    network = models.create(name, 5).eval()
    return network, Adapted(network, imagesets.STATISTICS["cifar10"], OTHER, [4, 3, 2, 1, 0]).eval()


def test_an_adapted_network_sees_its_own_normalisation_and_answers_in_the_order_asked_for():
    network, wrapped = adapted()
    pixels = torch.rand(2, 3, 32, 32)
    given, own = (
        (pixels - mean) / std for mean, std in ((torch.tensor(x).view(2, 1, 3, 1, 1)) for x in (
            imagesets.STATISTICS["cifar10"], OTHER))
    )  # fmt: skip
    logits, aux_logits = network(own)
    expected = [logits.flip(1), *(aux.view(2, 5, 4).flip(1).flatten(1) for aux in aux_logits)]
    found_logits, found_aux = wrapped(given)
    torch.testing.assert_close([found_logits, *found_aux], expected, rtol=1e-4, atol=1e-4)
    found, wanted = with_features(wrapped, given), with_features(network, own)
    torch.testing.assert_close(found.logits, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.features, wanted.features, rtol=1e-4, atol=1e-4)
    assert (wrapped.arch, wrapped.rotations) == (network.arch, network.rotations)
    assert utils.digest(wrapped.state_dict()) != utils.digest(network.state_dict())
    plain, copy = adapted("resnet8"), speed.inference_copy(wrapped, torch.bfloat16, torch.channels_last)
    torch.testing.assert_close(plain[1](given), plain[0](own).flip(1), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(copy, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(given)[0].float(), expected[0], rtol=0.1, atol=0.1)


def test_a_teacher_of_the_students_images_is_not_wrapped(folder, teacher):
    checkpoint = utils.Checkpoint(teacher)
    network = models.create("resnet8_aux", 4)
    same = imagesets.load("imagefolder", folder, mean=OTHER[0], std=OTHER[1])
    assert start.suited(network, checkpoint, same.test) is network
    other = imagesets.load("imagefolder", folder)
    assert isinstance(start.suited(network, checkpoint, other.test), Adapted)
    assert start.suited(network, checkpoint, other.test, *other.statistics) is network


def test_a_size_that_a_librarys_weights_do_not_record_is_named(tmp_path, capsys):
    network = models.create("torchvision/shufflenet_v2_x0_5", 10)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    checkpoint = utils.Checkpoint(tmp_path / "w.pth")
    assert isinstance(start.suited(network, checkpoint, imagesets.load_test("digits")), Adapted)
    assert "was made for images of 224 pixels a side, these have 32" in capsys.readouterr().err


SCRIPTS = {
    "train_baseline_cifar": ("resnet8", ("",)),
    "train_teacher_cifar": ("resnet8_aux", ("backbone.",)),
    "train_online_kd_cifar": ("resnet8_resnet8", ("net1.backbone.", "net2.backbone.")),
    "train_student_cifar": ("resnet8_aux", ("backbone.",)),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_network_can_start_from_weights_of_other_classes(script, folder, teacher, tmp_path, capsys):
    """With a rate that changes nothing, the last checkpoint holds the weights that the run started from."""
    source, (arch, prefixes) = models.create("resnet8", 1000), SCRIPTS[script]
    torch.save({"state_dict": source.state_dict()}, tmp_path / "thousand.pth")
    frozen = ("--init-lr", 1e-20, "--limit-batches", 1, "--arch", arch)
    taught = ("--tarch", "resnet8_aux", "--tcheckpoint", teacher) if "student" in script else ()
    run(script, *words(folder, tmp_path, *frozen, *taught, "--pretrained-backbone", tmp_path / "thousand.pth"))
    assert "a new classifier" in capsys.readouterr().out
    (last,) = tmp_path.glob(f"{script}_*/{arch}.pth.tar")
    found = torch.load(last, weights_only=True)["net"]
    for prefix in prefixes:
        assert torch.equal(found[f"{prefix}layer3.0.conv1.weight"], source.state_dict()["layer3.0.conv1.weight"])
        assert found[f"{prefix}fc.weight"].shape == (4, 64)
    assert "backbone" not in json.loads((last.parent / "args.json").read_text())["tested"]


def test_weights_of_as_many_classes_are_tested_with_their_classes_by_name(folder, backbone, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("red\nblue\ngrey\ngreen\n")
    names = ("--class-names", tmp_path / "names.txt", *AS_TRAINED, "--pretrained-backbone", backbone)
    run("train_teacher_cifar", *words(folder, tmp_path, *names, "--arch", "resnet8_aux", "--freezed"))
    (found,) = tmp_path.glob("train_teacher*/args.json")
    assert json.loads(found.read_text())["tested"] == {"backbone": {"top1": 100}}
    assert "warning" not in capsys.readouterr().err
    untrained = changed(backbone, tmp_path / "b.pth", lambda weights: weights["fc.weight"].zero_())
    run("train_baseline_cifar", *words(folder, tmp_path, "--arch", "resnet8", "--pretrained-backbone", untrained))
    said = capsys.readouterr().err
    assert "near chance" in said and "--mean 0.3 0.4 0.2 --std 0.3 0.2 0.4" in said


def test_a_frozen_backbone_keeps_no_new_classifier(folder, tmp_path, capsys):
    torch.save(models.create("resnet8", 1000).state_dict(), tmp_path / "thousand.pth")
    frozen = ("--freezed", "--pretrained-backbone", tmp_path / "thousand.pth", "--arch", "resnet8_aux")
    assert "fc.weight" in refused(capsys, *words(folder, tmp_path, *frozen), script="train_teacher_cifar")


def result_of(folder, weights, capsys, *more):
    """Return what test_model.py finds."""
    capsys.readouterr()
    data = ("--dataset", "imagefolder", "--data", folder, "--num-workers", 1, "--student-weights", weights)
    run("test_model", "--arch", "resnet8", *data, "--json", *more)
    return json.loads(capsys.readouterr().out)


def test_weights_are_tested_as_they_were_trained_unless_flags_say_otherwise(folder, backbone, capsys):
    assert tuple(result_of(folder, backbone, capsys)[name] for name in ("mean", "std")) == tuple(map(list, OTHER))
    found = result_of(folder, backbone, capsys, "--mean", 0.5, "--image-size", 12)
    assert found["mean"] == [0.5] * 3 and found["std"] == list(OTHER[1])
    assert found["backbone"]["multiply_adds"] < result_of(folder, backbone, capsys)["backbone"]["multiply_adds"]


def test_class_names_that_are_not_the_images_are_refused(folder, backbone, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("blue\ngreen\ngray\nred\n")
    data = ("--dataset", "imagefolder", "--data", folder, "--student-weights", backbone)
    assert "--class-names" in refused(capsys, *data, "--class-names", tmp_path / "names.txt", script="test_model")


def test_a_librarys_weights_are_tested_at_the_librarys_size(folder, tmp_path, capsys):
    name = "torchvision/shufflenet_v2_x0_5"
    torch.save(models.create(name, 4).state_dict(), tmp_path / "foreign.pth")
    found = result_of(folder, tmp_path / "foreign.pth", capsys, "--arch", name)
    assert found["backbone"]["multiply_adds"] > 3e7  # of 224 pixels


def test_the_accuracy_of_each_class(folder, backbone, tmp_path, capsys):
    """The first class is never recognised; where it is taken for others, the table names the most frequent one."""
    weights = changed(backbone, tmp_path / "t.pth", lambda weights: weights["fc.bias"][0].sub_(1000))
    found = result_of(folder, weights, capsys)["classes"]
    assert [entry["name"] for entry in found] == list(COLOURS) and {entry["images"] for entry in found} == {4}
    assert [entry["top1"] for entry in found] == [0, 100, 100, 100]
    assert found[0]["taken_for"] in list(COLOURS)[1:] and found[1]["taken_for"] is None
    data = ("--dataset", "imagefolder", "--data", folder, "--num-workers", 1, "--student-weights", weights)
    run("test_model", "--arch", "resnet8", *data)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1][:3] == ["blue", "4", "0.00"] and rows[2] == ["green", "4", "100.00"]


def test_files_of_this_project_without_statistics_have_those_of_their_data_set(backbone, tmp_path):
    content = torch.load(backbone, weights_only=True)
    del content["info"]
    torch.save({**content, "size": 16}, tmp_path / "old.pth")
    known = imagesets.recorded(utils.Checkpoint(tmp_path / "old.pth").info)
    assert (known["mean"], known["std"]) == imagesets.folders.STATISTICS and known["size"] == 16
    torch.save({"net": content["net"], "acc": 90.0, "epoch": 3, "dataset": "mine"}, tmp_path / "foreign.pth")
    assert imagesets.recorded(utils.Checkpoint(tmp_path / "foreign.pth").info) == {}


def test_weights_are_chosen_by_their_key(folder, backbone, tmp_path, capsys):
    good = torch.load(backbone, weights_only=True)["net"]
    bad = {**good, "fc.weight": torch.zeros_like(good["fc.weight"])}
    torch.save({"state_dict": bad, "state_dict_ema": good}, tmp_path / "both.pth")
    assert result_of(folder, tmp_path / "both.pth", capsys, *AS_TRAINED)["top1"] == 100
    key = ("--weights-key", "state_dict")
    assert result_of(folder, tmp_path / "both.pth", capsys, *AS_TRAINED, *key)["top1"] == 25
    found = distil(folder, tmp_path, tmp_path / "both.pth", *key)["tested"]
    assert found == {"teacher": {"top1": 25}}
    torch.save(
        {f"{n}.{k}": v for n, w in (("student", bad), ("teacher", good)) for k, v in w.items()}, tmp_path / "d.pth"
    )
    assert result_of(folder, tmp_path / "d.pth", capsys, *AS_TRAINED, "--weights-key", "teacher")["top1"] == 100
    data = ("--dataset", "digits", "--student-weights", tmp_path / "d.pth")
    assert "student, teacher" in refused(capsys, "--arch", "resnet8", *data, script="test_model")


def test_the_network_of_a_pair_that_the_file_names_is_taken(folder, backbone, tmp_path, capsys):
    content = torch.load(backbone, weights_only=True)
    pair = {f"net1.backbone.{name}": torch.zeros_like(value) for name, value in content["net"].items()}
    pair |= {f"net2.backbone.{name}": value for name, value in content["net"].items()}
    best = {"best": {"net": 2}, "arch": "resnet8_resnet8"}
    torch.save({**content, **best, "net": pair}, tmp_path / "pair.pth")
    assert result_of(folder, tmp_path / "pair.pth", capsys)["top1"] == 100
    assert result_of(folder, tmp_path / "pair.pth", capsys, "--net", 1)["top1"] == 25
    assert distil(folder, tmp_path, tmp_path / "pair.pth")["tested"] == {"teacher": {"top1": 100}}


def test_what_shapes_a_run_is_changed_at_resume_and_logged(folder, tmp_path, capsys):
    def trains(*more):
        capsys.readouterr()
        return status("train_baseline_cifar", *words(folder, tmp_path, "--arch", "resnet8", *more))

    assert trains("--override", "init_lr=0.01") == 2  # nothing to resume
    assert trains() == 0
    change = ("--resume", "--epochs", 2, "--override", "init_lr=0.01", "milestones=5,7")
    for number in (2, 3):  # asked for again, nothing changes
        assert trains(*change, "--epochs", number, "--accumulate", 2) == 0
    assert trains("--resume", "--epochs", 4) == 2 and "--override" in capsys.readouterr().err
    assert trains("--resume", "--override", "rate=1") == 2 and "NAME=VALUE" in capsys.readouterr().err
    place = tmp_path / "train_baseline_cifar_arch_resnet8_dataset_imagefolder_seed0"
    args = json.loads((place / "args.json").read_text())
    assert args["overrides"] == [
        {"epoch": 2, "name": "init_lr", "from": 0.05, "to": 0.01},
        {"epoch": 2, "name": "milestones", "from": [150, 180, 210], "to": [5, 7]},
    ]
    assert [json.loads(line)["lr"] for line in (place / "log.jsonl").read_text().splitlines()] == [0.05, 0.01, 0.01]
    batches = words(folder, tmp_path, "--tag", "batches", "--arch", "resnet8")
    assert stopped("train_baseline_cifar", *batches, after=1, by=signal.SIGTERM) == 143
    assert trains("--tag", "batches", "--resume", "--override", "batch_size=4") == 0
    assert "resuming at epoch 1, step 3" in capsys.readouterr().out  # after as many images
    import report

    report.main(report.parse_args([str(tmp_path)]))
    assert "init_lr 0.05 -> 0.01 from epoch 2" in capsys.readouterr().out


@needs_faults
@pytest.mark.parametrize(
    ("file", "flags", "found"),
    [
        ("05_distiller_student_teacher.pth", ("--weights-key", "student"), 99.44),
        ("06_lightning.ckpt", (), 99.44),
        ("08_timm_ema.pth.tar", (), 99.44),
        ("08_timm_ema.pth.tar", ("--weights-key", "state_dict"), 14.72),
        ("14_model_state_dict.pth", (), 99.44),
        ("32_model.safetensors", (), 99.44),
        ("11_whole_model.pth", (), "torch.save(model.state_dict()"),
        ("33_lfs_pointer.pth", (), "git lfs pull"),
    ],
)
def test_the_weights_that_were_refused_or_read_wrongly(file, flags, found, capsys):
    data = ("--dataset", "digits", "--student-weights", FAULTS / file)
    ended = status("test_model", "--arch", "resnet8", *data, "--json", *flags)
    output = capsys.readouterr()
    if isinstance(found, str):
        assert ended == 2 and found in output.err
    else:
        assert json.loads(output.out)["top1"] == pytest.approx(found, abs=0.01)


@needs_faults
@pytest.mark.parametrize(
    ("name", "top1", "warned"), [("right", 99.44, False), ("permuted", 0, True), ("untrained", 9.17, True)]
)
def test_the_teachers_that_were_wrong_without_a_word(name, top1, warned, tmp_path, capsys):
    student = ("--method", "kd", "--arch", "resnet8", "--tarch", "resnet8", "--tcheckpoint", FAULTS / f"T_{name}.pth")
    quick = ("--dataset", "digits", "--limit-batches", 2, "--epochs", 1, "--amp", "off", "--checkpoint-dir", tmp_path)
    run("train_student_cifar", *student, *quick)
    (found,) = tmp_path.glob("*/args.json")
    assert json.loads(found.read_text())["tested"]["teacher"]["top1"] == pytest.approx(top1, abs=0.01)
    assert ("near chance" in capsys.readouterr().err) == warned


@needs_faults
def test_older_weights_keep_their_normalisation():
    """They were trained on a folder of CIFAR-10's images, whose statistics are not those of --dataset cifar10."""
    weights = FAULTS / "resnet8_cifar10jpeg_imagenetstats.pth.tar"
    known = imagesets.recorded(utils.Checkpoint(weights).info)
    assert (known["mean"], known["std"]) == imagesets.folders.STATISTICS
