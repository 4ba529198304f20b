"""Weights: every published layout of a file, what is refused, and what a checkpoint of this project holds."""

import argparse
import json
import math
import os
import pickle
import random
from collections import OrderedDict, defaultdict
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import scripts
import torch
import torchvision
from contract import classes, fill, filled_network, forward_values, layouts
from torch import nn

import loading
import methods
import models
import test_model
import utils

AUX = [name for name in models.names() if models.is_aux(name)]
ONE_PER_FAMILY = ["resnet8_aux", "wrn_16_1_aux", "vgg8_bn_aux", "mobilenetV2_aux", "ShuffleV1_aux", "ShuffleV2_aux"]
ONE_PER_FAMILY += ["resnet18_imagenet_aux", "ResNet50_aux"]


def numbered_state(network):
    """Return a state dict of `network`'s shapes whose entries each hold one number of their own: small in a file."""
    shapes = network.state_dict().items()
    return {k: torch.full((), i % 251, dtype=v.dtype).expand(v.shape) for i, (k, v) in enumerate(shapes)}


def on_meta(name, num_classes=100, rotations=4):
    """Return a network without memory for its weights."""
    with torch.device("meta"):
        return models.create(name, num_classes, rotations)


def empty_network(name, num_classes=100, rotations=4):
    """Return a network whose weights are not filled in."""
    network = on_meta(name, num_classes, rotations).to_empty(device="cpu")
    for buffer in network.buffers():
        buffer.zero_()
    return network


def small(seed=0):
    """Return a small network with auxiliary classifiers."""
    torch.manual_seed(seed)
    return models.create("resnet8_aux", 10)


def assert_same(found, expected):
    """Check two state dicts to the bit."""
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def refused(path, model=None):
    """Return the one line that loading `path` ends in."""
    with pytest.raises(utils.UserError) as error:
        utils.load_weights(model or small(), path)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and str(path) in text
    return text


# Of a pair the contract names the outputs net1/logits and net2/logits.
LOGITS = sorted(key for key in forward_values() if key.startswith("rotations4/") and key.endswith("/eval/logits"))
LOGITS += ["rotations4/WRN_16_2_WRN_16_2/eval/net1/logits", "rotations4/WRN_16_2_WRN_16_2/eval/net2/logits"]


@pytest.mark.parametrize("key", [key for key in LOGITS if "imagenet" not in key])
def test_published_weights_load_and_compute_the_published_outputs(key, tmp_path):
    _, name, _, *net, _ = key.split("/")
    state = {key: torch.as_tensor(fill(key, tuple(shape))) for key, shape in layouts()[name].items()}
    torch.save({"net": state, "acc": np.float64(1), "epoch": 1, "optimizer": {}}, tmp_path / "a.pth")
    network = models.create(name, classes(name))
    utils.load_weights(network, tmp_path / "a.pth")
    assert network.state_dict().keys() == state.keys()
    assert_same({key: network.state_dict()[key] for key in state}, state)
    images = torch.from_numpy(np.random.RandomState(0).standard_normal((4, 3, 32, 32)).astype(np.float32))
    network = network.get_submodule(net[0]) if net else network
    with torch.no_grad():
        logits = getattr(network, "backbone", network).eval()(images)
    torch.testing.assert_close(logits[:, ::7], torch.from_numpy(forward_values()[key]), rtol=1e-3, atol=1e-3)


def test_weights_saved_here_have_the_published_layout(tmp_path):
    network = models.create("resnet20_aux", 100)
    utils.save_checkpoint({"net": utils.to_cpu(network.state_dict())}, tmp_path / "a.pth")
    saved = torch.load(tmp_path / "a.pth", weights_only=True)["net"]
    assert {key: list(value.shape) for key, value in saved.items()} == layouts()["resnet20_aux"]
    published = filled_network("resnet20_aux")
    published.load_state_dict(saved, strict=True)
    assert_same(published.state_dict(), network.state_dict())


WRAPPINGS = {
    "net": lambda state: {"net": state, "acc": np.float64(76.5), "epoch": 239, "optimizer": {"state": {}}},
    "float32 accuracy": lambda state: {"net": state, "acc": np.float32(76.5), "epoch": np.int64(239)},
    "tensor accuracy": lambda state: {"net": state, "acc": torch.tensor(76.5)},
    "state_dict": lambda state: {"state_dict": state, "epoch": 1, "best_acc1": torch.tensor(1.0)},
    "float16 accuracy": lambda state: {"net": state, "acc": np.array([76.5], np.float16), "epoch": np.int32(239)},
    "small numbers": lambda state: {"net": state, "flags": [np.bool_(True), np.int8(1), np.uint8(2), np.float16(3)]},
    "small arrays": lambda state: {"net": state, "flags": [np.ones(3, kind) for kind in (bool, "i1", "u1", "f2", "i4")]},
    "paths": lambda state: {"net": state, "args": argparse.Namespace(data=Path("data"), other=PureWindowsPath("a"))},
    "defaults": lambda state: {"net": state, "seen": {kind: defaultdict(kind, {1: kind()}) for kind in (list, dict, int)}},
    "model": lambda state: {"model": state, "best_acc": 74.2, "opt": argparse.Namespace(lr=0.05, tags=["a"], none=None)},
    "bare": lambda state: state,
    "ordered": OrderedDict,
    "module": lambda state: {"net": {f"module.{k}": v for k, v in state.items()}},
    "bare module": lambda state: OrderedDict((f"module.{k}", v) for k, v in state.items()),
    "compiled": lambda state: {"net": {f"module._orig_mod.{k}": v for k, v in state.items()}},
    "no counts": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_wrappings(wrap, legacy, tmp_path):
    saved, loaded = small(1), small(2)
    torch.save(wrap(saved.state_dict()), tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    content = utils.load_weights(loaded, tmp_path / "a.pth")
    assert_same(loaded.state_dict(), saved.state_dict())
    assert "acc" not in content or 76 < content["acc"] < 77


@pytest.mark.parametrize("acc", [np.float64(76.5), np.array(76.5), np.array([76.5])])
def test_numpy_numbers_of_either_numpy(acc, tmp_path):
    """numpy 1 calls the module of its scalars and arrays numpy.core, numpy 2 numpy._core."""
    torch.save({"net": small().state_dict(), "acc": acc}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pth").read_bytes()
    names = [b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"]
    assert any(name in content for name in names)
    for name in names:
        for other in names:
            content = content.replace(other, name)
        (tmp_path / "a.pth").write_bytes(content)
        assert utils.load_weights(small(), tmp_path / "a.pth")["acc"] == 76.5


def test_flags_of_numpys_types_are_not_taken_from_the_file(tmp_path):
    """They would tell numpy that the numbers are addresses of objects, which ends the process."""
    torch.save({"net": small().state_dict(), "acc": np.array([76.5])}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pth").read_bytes()
    assert content.count(b"K\x00t") == 1
    (tmp_path / "a.pth").write_bytes(content.replace(b"K\x00t", b"K?t"))
    acc = utils.load_weights(small(), tmp_path / "a.pth")["acc"]
    assert acc == 76.5 and acc.dtype.flags == 0


def test_parts_of_larger_weights(tmp_path):
    aux, pair = small(1), models.create("resnet8_resnet8", 10)
    torch.save({"net": aux.state_dict()}, tmp_path / "aux.pth")
    torch.save({"net": pair.state_dict()}, tmp_path / "pair.pth")
    backbone = models.create("resnet8", 10)
    utils.load_weights(backbone, tmp_path / "aux.pth")
    assert_same(backbone.state_dict(), aux.backbone.state_dict())
    for number, member in ((1, pair.net1), (2, pair.net2)):
        network = small(3)
        utils.load_weights(network, tmp_path / "pair.pth", number)
        assert_same(network.state_dict(), member.state_dict())
        utils.load_weights(backbone, tmp_path / "pair.pth", number)
        assert_same(backbone.state_dict(), member.backbone.state_dict())
    again = models.create("resnet8_resnet8", 10)
    utils.load_weights(again, tmp_path / "pair.pth")
    assert_same(again.state_dict(), pair.state_dict())


@pytest.mark.parametrize("wrap", [dict, lambda state: {"model": state}, lambda state: {"state_dict": state}])
def test_torchvisions_resnet34_becomes_a_backbone(wrap, tmp_path):
    with torch.device("meta"):
        published = torchvision.models.resnet34()
    state = numbered_state(published)
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(wrap(state), tmp_path / "resnet34.pth")
    network = empty_network("resnet34_imagenet_aux", 1000)
    utils.load_weights(network.backbone, tmp_path / "resnet34.pth")
    loaded = network.backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert all(not v.any() for k, v in loaded.items() if k.endswith("num_batches_tracked"))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_backbone_of_every_family_out_of_auxiliary_weights(name, tmp_path):
    state = numbered_state(on_meta(name))
    torch.save({"net": state}, tmp_path / "a.pth")
    backbone = empty_network(models.backbone_name(name))
    utils.load_weights(backbone, tmp_path / "a.pth")
    assert all(torch.equal(v, state[f"backbone.{k}"]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize("name", AUX)
def test_classes_and_rotations_are_read_off_the_weights(name, tmp_path):
    for num_classes, rotations in ((10, 1), (100, 4)):
        state = numbered_state(on_meta(name, num_classes, rotations))
        torch.save({"net": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
        assert utils.weights_layout(tmp_path / "a.pth") == (num_classes, rotations)
    torch.save(numbered_state(on_meta(models.backbone_name(name), 7)), tmp_path / "a.pth")
    assert utils.weights_layout(tmp_path / "a.pth") == (7, None)


def test_layout_of_a_pair(tmp_path):
    torch.save({"net": numbered_state(on_meta("resnet8_resnet8", 10))}, tmp_path / "a.pth")
    assert utils.weights_layout(tmp_path / "a.pth") == (10, 4)


def test_heads_of_no_known_number_of_rotations(tmp_path):
    torch.save({"net": numbered_state(on_meta("resnet8_aux", 10, 3))}, tmp_path / "a.pth")
    with pytest.raises(utils.UserError, match="30 outputs for 10 classes"):
        utils.weights_layout(tmp_path / "a.pth")


def test_teacher_of_the_wrong_kind(tmp_path):
    args = argparse.Namespace(tarch="resnet8_aux", tcheckpoint=tmp_path / "a.pth", method="hsakd", dataset="digits", net=1)
    for state, said in (
        (numbered_state(on_meta("resnet8_aux", 10, 1)), "4 rotations apart, not 1"),
        (numbered_state(on_meta("resnet8", 10)), "missing: "),
        (numbered_state(on_meta("resnet8_aux", 7)), "a teacher of 7 classes, but digits has 10"),
    ):
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(utils.UserError, match=said):
            methods.create_pair(args, scripts.seen(10))


def test_wrong_architecture_names_the_first_keys(tmp_path):
    torch.save({"net": small().state_dict()}, tmp_path / "a.pth")
    assert "missing: backbone.layer1.1.conv1.weight" in refused(tmp_path / "a.pth", models.create("resnet14_aux", 10))
    text = refused(tmp_path / "a.pth", models.create("resnet8_aux", 100))
    assert "wrong shape: backbone." in text and "[10, 64] instead of [100, 64]" in text
    text = refused(tmp_path / "a.pth", models.create("wrn_16_1", 10))
    assert "missing: " in text and "unexpected: " in text
    torch.save({"net": models.create("resnet8", 10).state_dict()}, tmp_path / "b.pth")
    text = refused(tmp_path / "b.pth")
    assert "weights do not fit resnet8_aux: " in text and "missing: " in text


@pytest.mark.parametrize("name", ["resnet8", "resnet8_aux", "resnet8_resnet8"])
def test_keys_beside_the_part_that_is_loaded_do_not_fit(name, tmp_path):
    state = models.create(name, 10).state_dict()
    torch.save({"net": {**state, "other.weight": torch.zeros(1)}}, tmp_path / "a.pth")
    assert "unexpected: other.weight" in refused(tmp_path / "a.pth", models.create("resnet8", 10))


def test_a_refused_file_leaves_the_network_as_it_was(tmp_path):
    network = models.create("resnet14_aux", 10)
    before = utils.to_cpu(network.state_dict())
    torch.save({"net": small().state_dict()}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", network)
    assert_same(network.state_dict(), before)


def test_weights_of_the_twin_with_another_stride(tmp_path):
    """The keys and shapes of mobilenetV2 and mobilenetV2_s2 are equal, what they compute is not."""
    state = numbered_state(on_meta("mobilenetV2_s2_aux"))
    torch.save({"net": state, "arch": "mobilenetV2_s2_aux"}, tmp_path / "w.pth")
    pair = empty_network("mbv2_mbv2")
    backbone = empty_network("mobilenetV2")
    for network in (backbone, empty_network("mobilenetV2_aux").backbone, pair.net1, pair.net2.backbone):
        said = refused(tmp_path / "w.pth", network)
        assert "weights of mobilenetV2_s2, not of mobilenetV2" in said
    twin = empty_network("mobilenetV2_s2_aux")
    for network in (twin, twin.backbone, empty_network("mobilenetV2_s2")):
        utils.load_weights(network, tmp_path / "w.pth")
    # DPCD's released code calls the twin mobilenetV2 too, in its arguments.
    for said in ({"arch": "a name of another project"}, {"arch": 3}, {"args": {"arch": "mobilenetV2"}}):
        torch.save({"net": state, **said}, tmp_path / "w.pth")
        utils.load_weights(backbone, tmp_path / "w.pth")
        utils.load_weights(twin, tmp_path / "w.pth")


def test_second_network_of_no_pair(tmp_path):
    torch.save(models.create("resnet8_aux", 10).state_dict(), tmp_path / "w.pth")
    with pytest.raises(utils.UserError, match="--net 2: these weights are not a mutual pair's"):
        utils.load_weights(models.create("resnet8_aux", 10), tmp_path / "w.pth", net=2)


def test_a_flipped_bit_is_told(tmp_path):
    """Reading alone would hand out the changed weight."""
    state = models.create("resnet8", 10).state_dict()
    torch.save(state, tmp_path / "w.pth")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    at = content.find(state["fc.weight"].numpy().tobytes())
    content[at + 2] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    assert "corrupt (the checksum of" in refused(tmp_path / "w.pth", models.create("resnet8", 10))


def test_missing_file(tmp_path):
    assert "no such file" in refused(tmp_path / "a.pth")
    assert "is a folder, not a file" in refused(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_weights_that_are_no_numbers(value, tmp_path):
    state = small().state_dict()
    state["backbone.conv1.weight"][0, 0, 0, 0] = value or 0
    if value is None:
        state["backbone.conv1.weight"] = state["backbone.conv1.weight"].to_sparse()
    torch.save({"net": state}, tmp_path / "a.pth")
    assert f"backbone.conv1.weight {'is no plain' if value is None else 'holds values'}" in refused(tmp_path / "a.pth")


def test_weights_of_other_types(tmp_path):
    """Float8 becomes float32 as all others do; a tensor of tensors is no weight."""
    state = small().state_dict()
    for value in (torch.float8_e4m3fn, torch.float16, torch.float64):
        torch.save({"net": {**state, "backbone.fc.weight": state["backbone.fc.weight"].to(value)}}, tmp_path / "a.pth")
        network = small(1)
        utils.load_weights(network, tmp_path / "a.pth")
        assert torch.equal(network.backbone.fc.weight, state["backbone.fc.weight"].to(value).float())
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(3, 3)])
    torch.save({"net": {**state, "backbone.fc.weight": nested}}, tmp_path / "a.pth")
    assert "backbone.fc.weight is no plain tensor" in refused(tmp_path / "a.pth")
    torch.save({"net": {**state, "backbone.fc.weight": state["backbone.fc.weight"].to(torch.int8)}}, tmp_path / "a.pth")
    assert "backbone.fc.weight is no plain tensor of floating-point numbers" in refused(tmp_path / "a.pth")


def test_variances_below_zero(tmp_path):
    state = small().state_dict()
    state["backbone.bn1.running_var"][3] = -1
    torch.save({"net": state}, tmp_path / "a.pth")
    assert "backbone.bn1.running_var holds negative variances" in refused(tmp_path / "a.pth")


def test_weights_both_with_and_without_a_prefix(tmp_path):
    """Which of the two are meant nobody knows."""
    torch.save({"net": {**small().state_dict(), "module.backbone.fc.weight": torch.zeros(1)}}, tmp_path / "a.pth")
    assert "holds backbone.fc.weight twice" in refused(tmp_path / "a.pth")


def test_classifier_that_is_a_single_number(tmp_path):
    torch.save({"fc.weight": torch.tensor(1.0)}, tmp_path / "a.pth")
    with pytest.raises(utils.UserError, match="holds no classifier"):
        utils.weights_layout(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"hello, I am a text file\n" * 9, "not a PyTorch file (it begins with 'hello, I ')"),
        (b"<!DOCTYPE html><html></html>", "not a PyTorch file (it begins with '<!DOCTYPE')"),
        (bytes(1000), "not a PyTorch file"),
        (b"\x1f\x8b", "not a PyTorch file"),
        (pickle.dumps({"net": {}}, 0), "not a PyTorch file"),
        (pickle.dumps({"net": {}}, 4), "damaged, or no checkpoint that torch.save wrote"),
        (b"\x80\x02", "it ends too early"),
        (b"PK\x03\x04", "failed reading zip archive"),
    ],
)
def test_files_that_are_no_checkpoint(content, said, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    assert said in refused(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError(101), "KeyError 101"),
        (EOFError(), "it ends too early"),
        (OSError("full\ndisk"), "full"),
        (ValueError(), "ValueError"),
    ],
)
def test_first_line_of_an_error(error, said):
    assert utils.first_line(error) == said


@pytest.mark.parametrize(
    "stored", [[1, 2], small(), {"epoch": 1}, {"net": {}}, {"net": 3}, torch.zeros(3), {1: torch.zeros(3)}, None]
)
def test_contents_that_are_no_weights(stored, tmp_path):
    torch.save(stored, tmp_path / "a.pth")
    refused(tmp_path / "a.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_end_in_one_line(legacy, tmp_path):
    torch.save(
        {"net": {"fc.weight": torch.zeros(9, 9)}, "acc": 1.0}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy
    )
    whole = (tmp_path / "a.pth").read_bytes()
    draw, network = random.Random(0), small()
    for length in [0, 1, 9, *(draw.randrange(len(whole)) for _ in range(40)), len(whole) - 1]:
        (tmp_path / "b.pth").write_bytes(whole[:length])
        refused(tmp_path / "b.pth", network)
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 8])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        (tmp_path / "b.pth").write_bytes(content)
        refused(tmp_path / "b.pth", network)  # an unharmed one does not fit the network either


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True, None])
def test_weights_that_execute_code_are_refused_and_not_executed(legacy, tmp_path):
    content = {"net": small().state_dict(), "acc": Payload(tmp_path / "executed")}
    if legacy is None:
        (tmp_path / "a.pth").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    said = "posix.mkdir" if legacy is not None else "no checkpoint that torch.save wrote"
    assert said in refused(tmp_path / "a.pth")
    assert not (tmp_path / "executed").exists()
    torch.save(nn.Linear(1, 1), tmp_path / "b.pth")  # a whole pickled module is code too
    assert "torch.nn.modules.linear.Linear" in refused(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("acc", "found"),
    [(np.float32(76.5), 76.5), (np.float16([76.5]), 76.5), (np.int64(76), 76), (torch.tensor(76.5), 76.5), (True, None),
     (np.bool_(True), None), (np.str_("76"), None), (np.zeros(2), None), (1j, None)],
)  # fmt: skip
def test_recorded_accuracy_of_any_kind_of_number(acc, found):
    assert utils.recorded({"acc": acc}).get("recorded_acc") == found


@pytest.mark.parametrize(
    ("size", "found"),
    [(8, 8), (96, 96), (224, None), (7, None), (97, None), (-1, None), (10**9, None), (32.0, None), (True, None), ("32", None),
     ([32], None), (torch.tensor(32), None), (None, None)],
)  # fmt: skip
def test_size_that_a_file_names(size, found, monkeypatch):
    """An image folder is read at it where it is one of images in memory."""
    monkeypatch.setattr(loading, "read", lambda args, world, train, size: size)
    monkeypatch.setattr(loading, "test_batches", lambda size, args, world: size)
    assert loading.load_test(None, None, size) == found


@pytest.mark.parametrize("method", ["AT", "kd\n", "", 3, ["kd"], {"kd": 1}, None])
def test_method_that_a_file_names(method):
    assert methods.method_of({"method": method}, 4) == methods.KINDS[4]
    assert methods.method_of({"method": "kd"}, None) == "kd"


def test_method_of_a_pair():
    assert methods.method_of({"arch": "resnet8_resnet8"}, 4) == methods.PAIR
    for arch in ("resnet8_aux", "unknown", 3, ["resnet8_resnet8"], None):
        assert methods.method_of({"arch": arch}, 4) == methods.KINDS[4]


def test_json_of_numbers_that_are_not_finite(tmp_path, capsys):
    content = {"net": small().state_dict(), "acc": math.nan, "epoch": np.float64(math.inf), "size": "large", "method": 3}
    torch.save(content, tmp_path / "a.pth")
    scripts.run("test_model", *scripts.QUICK, "--arch", "resnet8_aux", "--json", "--student-weights", tmp_path / "a.pth")

    def refuse(word):
        raise ValueError(word)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["recorded_acc"] is None and found["recorded_epoch"] is None and found["method"] == methods.KINDS[4]
    assert utils.json_ready({"a": {"b": -math.inf}, "c": 1.5, "d": "nan"}) == {"a": {"b": None}, "c": 1.5, "d": "nan"}


@pytest.mark.parametrize("to", ["absent/b.pth", ".", "sub/", "", "/dev/null"])
def test_export_that_cannot_be_written_is_told_before_the_test(to, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(SystemExit) as stop:
        test_model.parse_args(["--student-weights", "w.pth", "--export-backbone", to])
    told = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and len(told.splitlines()) == 1
        and "--export-backbone: " + ("cannot write" if to else "expected a path") in told
    )
    args = test_model.parse_args(["--student-weights", "~/w.pth", "--export-backbone", "sub/b.pth"])
    assert args.export_backbone == "sub/b.pth" and args.student_weights == str(Path.home() / "w.pth")


def test_export_overwrites_no_run(tmp_path, capsys):
    """Neither the weights that are tested nor another file of a run; a file that is no run's is written anew."""
    words = ("--student-weights", tmp_path / "best.pth", "--export-backbone")
    for name in ("args.json", "last.pth", "best.pth"):
        (tmp_path / name).touch()
    for to, said in (("best.pth", "--student-weights"), ("last.pth", "a file of the run in")):
        with pytest.raises(SystemExit):
            scripts.parsed("test_model", *words, tmp_path / to)
        assert f"--export-backbone would overwrite {said}" in capsys.readouterr().err
    scripts.parsed("test_model", *words, tmp_path / "new.pth")
    (tmp_path / "args.json").unlink()
    scripts.parsed("test_model", *words, tmp_path / "last.pth")


def test_weights_of_a_wrapped_model(tmp_path):
    """As published code wraps it, before it loads weights."""
    state = {f"module.{key}": value for key, value in small().state_dict().items()}
    torch.save({"net": state}, tmp_path / "a.pth")
    wrapped = nn.DataParallel(small())
    utils.load_weights(wrapped, tmp_path / "a.pth")
    assert all(torch.equal(value, state[key]) for key, value in wrapped.state_dict().items())


def test_checkpoint_is_self_describing_and_loads_safely(tmp_path):
    scripts.run("train_teacher_cifar", *scripts.QUICK_RUN, "--arch", "resnet8_aux", "--checkpoint-dir", tmp_path)
    folder = tmp_path / "train_teacher_cifar_arch_resnet8_aux_dataset_digits_seed0"
    for name in ("resnet8_aux.pth.tar", "resnet8_aux_best.pth.tar"):
        content = torch.load(folder / name, weights_only=True)
        assert {"net", "acc", "epoch", "optimizer", "arch", "num_classes", "rotations", "dataset", "method", "args", "versions",
                "rng", "order", "objective", "best"} <= content.keys()  # fmt: skip
        assert (content["arch"], content["num_classes"], content["rotations"]) == ("resnet8_aux", 10, 4)
        assert (content["dataset"], content["epoch"]) == ("digits", 1)
        assert content["acc"] == content["best"]["acc"] == scripts.log_lines(folder)[-1]["test/top1"]
        assert content["args"]["init_lr"] == 0.05 and json.dumps(content["args"]) and "torch" in content["versions"]
        assert {k: v.shape for k, v in content["net"].items()} == {k: v.shape for k, v in small().state_dict().items()}
        assert {value.device.type for value in content["net"].values()} == {"cpu"}
    assert {"args.json", "log.jsonl"} <= {path.name for path in folder.iterdir()}
    assert list(folder.glob("events.out.tfevents*")) and not list(folder.glob("*.tmp"))


def test_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    utils.save_checkpoint({"epoch": 1}, path)

    def fail(content, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(utils.UserError, match="cannot write .*no space"):
            utils.save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1} and [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    utils.save_checkpoint({"epoch": 3}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 3} and [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    link = tmp_path / "link.pth"
    link.symlink_to(path)
    utils.save_checkpoint({"epoch": 4}, link)
    assert torch.load(path, weights_only=True) == {"epoch": 4} and link.is_symlink()
