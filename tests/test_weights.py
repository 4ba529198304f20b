"""Weights: every published layout of a file, what is refused, and how a file is written."""

import argparse
import collections
import math
import pathlib
import pickle
import random
import re
from unittest import mock

import numpy as np
import pytest
import torch
from contract import classes, layouts
from safetensors.torch import save_file
from torch import nn

import methods
import models
import utils
from scripts import Payload
from utils import Checkpoint, UserError

ONE_PER_FAMILY = ["resnet20_aux", "wrn_16_2_aux", "vgg8_bn_aux", "mobilenetV2_aux", "ShuffleV1_aux", "ShuffleV2_aux"]
ONE_PER_FAMILY += ["resnet18_imagenet_aux", "WRN_16_2_WRN_16_2"]


def numbered(shapes):
    """Return a state dict of {key: shape} whose entries each hold one number of their own: small in a file."""
    return {key: torch.full((), i % 251 + 0.5).expand(list(shape)) for i, (key, shape) in enumerate(shapes.items())}


def numbered_state(name, num_classes=100, rotations=4):
    """Return such a state dict of a network."""
    with torch.device("meta"):
        network = models.create(name, num_classes, rotations)
    return numbered({key: value.shape for key, value in network.state_dict().items()})


def empty_network(name, num_classes=100):
    """Return a network whose weights are zeros."""
    with torch.device("meta"):
        network = models.create(name, num_classes)
    network = network.to_empty(device="cpu")
    for value in network.state_dict().values():
        value.zero_()
    return network


def small(seed=0, name="resnet8_aux"):
    """Return a small network."""
    torch.manual_seed(seed)
    return models.create(name, 10)


def prefixed(prefix, state):
    """Return a state dict with a prefix before each key."""
    return {f"{prefix}{key}": value for key, value in state.items()}


def zeroed(state):
    """Return a state dict of zeros."""
    return {key: torch.zeros_like(value) for key, value in state.items()}


def part(prefix, state):
    """Return the entries of a state dict with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def assert_same(found, expected):
    """Check that all weights of a state dict are those expected."""
    counts = {key for key in found if key.endswith("num_batches_tracked")}
    assert found.keys() - counts == expected.keys() - counts
    for key in expected:
        assert torch.equal(found[key], expected[key].to(found[key].dtype)), key


def loaded(path, name="resnet8", key=None, net=None):
    """Return the weights of a new small network once the file at `path` is loaded into it."""
    network = small(9, name)
    Checkpoint(path, key).load_into(network, net)
    return network.state_dict()


def refused(path, model=None):
    """Return the one line that loading `path` ends in."""
    with pytest.raises(UserError) as error:
        utils.load_weights(model or small(), path)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and str(path) in text
    return text


@pytest.fixture
def path(tmp_path):
    """Return the path of a file of weights to write."""
    return tmp_path / "a.pth"


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in layouts() if name not in ONE_PER_FAMILY]


@pytest.mark.parametrize("name", ONE_PER_FAMILY + OTHERS)
def test_published_weights_load_strictly(name, path):
    """Under the wrapper of several GPUs; of an auxiliary network's weights the backbone takes its part."""
    state = numbered(layouts()[name])
    torch.save({"net": prefixed("module.", state), "acc": np.float64(1), "epoch": 1}, path)
    network = empty_network(name, classes(name))
    utils.load_weights(nn.DataParallel(network), path)
    assert_same(network.state_dict(), state)
    if models.is_aux(name):
        backbone = empty_network(models.backbone_name(name), classes(name))
        utils.load_weights(backbone, path)
        assert_same(backbone.state_dict(), part("backbone.", state))


WRAPPINGS = {
    "net": lambda state: {"net": state, "acc": np.float64(76.5), "epoch": 239, "optimizer": {"state": {}}},
    "state_dict": lambda state: {"state_dict": state, "acc": torch.tensor(76.5)},
    "model": lambda state: {"model": state, "best_acc": 74.2, "opt": argparse.Namespace(lr=0.1, dir=pathlib.Path("a"))},
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "nested": lambda state: {"epoch": 3, "trainer": {"weights": state}},
    "bare": lambda state: state,
    "wrapped": lambda state: collections.OrderedDict(prefixed("module._orig_mod.", state)),
    "lightning": lambda state: {"state_dict": prefixed("model.", state), "pytorch-lightning_version": "2.4.0"},
    "thop's counters": lambda state: {
        "net": state | {"total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)}
    },
    "timm's EMA": lambda state: {"state_dict": zeroed(state), "state_dict_ema": state},
    "torchvision's EMA": lambda state: {
        "model": zeroed(state),
        "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.", state)},
    },
    "another EMA": lambda state: {"state_dict": zeroed(state), "ema_state_dict": state},
    "no whole EMA": lambda state: {"state_dict": state, "ema": {"bn1.weight": torch.zeros(16)}},
    "no counts": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_layouts(wrap, legacy, path):
    saved = small(1).state_dict()
    torch.save(wrap(saved), path, _use_new_zipfile_serialization=not legacy)
    assert_same(loaded(path, "resnet8_aux"), saved)
    assert Checkpoint(path).recorded.get("recorded_acc", 76.5) == 76.5 and Checkpoint(path).widths == (10, 4)
    save_file(saved, path)  # as safetensors
    assert_same(loaded(path, "resnet8_aux"), saved)


@pytest.mark.parametrize("nested", [False, True])
def test_a_file_of_student_and_teacher(nested, path):
    student, teacher = small(1, "resnet8").state_dict(), small(2, "resnet14").state_dict()
    one = {**prefixed("student.", student), **prefixed("teacher.", teacher)}
    one = {"model": prefixed("module.", one), "epoch": 1}  # as mdistiller saves both
    torch.save({"student": student, "teacher": teacher} if nested else one, path)
    assert_same(loaded(path, key="student"), student)
    assert_same(loaded(path, key="student" if nested else "module.student"), student)
    assert_same(loaded(path, "resnet14", "teacher"), teacher)
    refused(path)


@pytest.mark.filterwarnings("ignore:for ")  # that nothing is copied to the meta device
def test_files_of_libraries_networks(path):
    """MNASNet asks for a version, torchvision's DenseNets have older names, PyTorch's example wraps a part of a VGG."""
    state = numbered_state("torchvision/mnasnet0_5", 10)
    torch.save(state, path)
    network = models.create("torchvision/mnasnet0_5", 10)
    utils.load_weights(network, path)
    assert_same(network.state_dict(), state)
    state = numbered_state("torchvision/densenet121", 10)
    torch.save({re.sub(r"(denselayer\d+\.[a-z]+)(\d)", r"\1.\2", key): value for key, value in state.items()}, path)
    network = models.create("torchvision/densenet121", 10)
    utils.load_weights(network, path)
    assert_same(network.state_dict(), state)
    with torch.device("meta"):
        network = models.create("torchvision/vgg11_bn", 10)
    state = numbered_state("torchvision/vgg11_bn", 10).items()
    state = {key.replace("features.", "features.module."): value for key, value in state}
    torch.save({"arch": "vgg11_bn", "state_dict": state}, path)
    utils.load_weights(network, path)


def test_numbers_of_either_numpy(path):
    """numpy 1 calls the module of its scalars and arrays numpy.core, numpy 2 numpy._core."""
    content = {**small().state_dict(), "acc": np.float64(76.5), "epoch": np.array([3])}
    content |= {"random": np.zeros(2, np.uint32), "names": np.array(["a", "b"])}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    content, names = path.read_bytes(), (b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n")
    assert any(name in content for name in names)
    for old, new in (names, names[::-1]):
        path.write_bytes(content.replace(old, new))
        assert Checkpoint(path).recorded == {"recorded_acc": 76.5, "recorded_epoch": 3}


def test_networks_of_a_pair(tmp_path):
    """The first, or the better one if the file names it, or the one asked for."""
    state = small(2, "resnet8_resnet8").state_dict()
    torch.save({"net": state}, tmp_path / "pair.pth")
    torch.save({"net": state, "best": {"net": 2}}, tmp_path / "second.pth")
    for name, number, member in (("pair", None, 1), ("pair", 2, 2), ("second", None, 2), ("second", 1, 1)):
        network = part(f"net{member}.", state)
        assert_same(loaded(tmp_path / f"{name}.pth", "resnet8_aux", net=number), network)
        assert_same(loaded(tmp_path / f"{name}.pth", net=number), part("backbone.", network))
    assert_same(loaded(tmp_path / "pair.pth", "resnet8_resnet8"), state)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_classes_and_rotations_are_read_off_the_weights(name, path):
    for num_classes, rotations in ((10, 1), (100, 4)):
        torch.save(numbered_state(name, num_classes, rotations), path)
        assert Checkpoint(path).widths == (num_classes, rotations)
    torch.save(numbered_state(models.backbone_name(name), 7), path)
    assert Checkpoint(path).widths == (7, None)


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small_aux", "torchvision/squeezenet1_1_aux"])
def test_classes_and_rotations_of_a_librarys_network(name, path):
    torch.save(models.create(name, 7, size=64, branches="light").state_dict(), path)
    assert Checkpoint(path).widths == (7, 4)
    save_file({"head.weight": torch.ones(7, 8), "layers.0.mlp.fc2.weight": torch.ones(8, 16)}, path)  # sorted by name
    assert Checkpoint(path).widths == (7, None)


def test_the_classifier_of_safetensors_is_the_outermost_layer(path):
    """Its keys are sorted by type, then by name."""
    state = {"a.linear.weight": torch.ones(6, 4), "head.weight": torch.ones(3, 4), "z.linear.weight": torch.ones(6, 4)}
    save_file({**state, "norm.num_batches_tracked": torch.tensor(1)}, path)
    assert Checkpoint(path).num_classes == 3


def test_weights_without_a_classifier_start_a_network(path):
    """As those of self-supervised training; another layer may not be missing."""
    state = small(1, "resnet8").state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("fc.")}, path)
    network = small(2, "resnet8")
    Checkpoint(path).load_into(network, renew=True)
    assert torch.equal(network.conv1.weight, state["conv1.weight"])
    assert not torch.equal(network.fc.weight, state["fc.weight"])
    torch.save({name: value for name, value in state.items() if not name.startswith("bn1.")}, path)
    with pytest.raises(UserError, match="missing: bn1.weight"):
        Checkpoint(path).load_into(network, renew=True)


def test_teachers_of_the_wrong_kind(path):
    """Of other rotations, without heads, of other classes."""
    args = argparse.Namespace(tarch="resnet8_aux", method="hsakd", net=None)
    for given in (("resnet8_aux", 10, 1), ("resnet8_aux", 10, 3), ("resnet8", 10), ("resnet8_aux", 7)):
        torch.save(numbered_state(*given), path)
        with pytest.raises(UserError, match="a.pth"):
            methods.load_teacher(args, Checkpoint(path), 10, 32)


@pytest.mark.parametrize(
    ("name", "num_classes", "said"),
    [
        ("resnet14_aux", 10, "missing: backbone.layer1.1.conv1.weight"),
        ("resnet8_aux", 100, "[10, 64] instead of [100, 64]"),
        ("wrn_16_1", 10, "unexpected: "),
        ("resnet8", 10, "unexpected: other.weight"),
    ],
)
def test_wrong_architecture_names_the_first_keys(name, num_classes, said, path):
    torch.save({"net": {**small().state_dict(), "other.weight": torch.zeros(1)}}, path)
    assert said in refused(path, models.create(name, num_classes))


def test_weights_of_the_twin_with_another_stride(path):
    """The keys and shapes of mobilenetV2 and mobilenetV2_s2 are equal, what they compute is not."""
    state = numbered_state("mobilenetV2_s2_aux")
    torch.save({"net": state, "arch": "mobilenetV2_s2_aux"}, path)
    for network in (empty_network("mobilenetV2"), empty_network("mbv2_mbv2").net1):
        assert "weights of mobilenetV2_s2, not of mobilenetV2" in refused(path, network)
    utils.load_weights(empty_network("mobilenetV2_s2_aux").backbone, path)


def test_a_flipped_bit_is_found(path):
    state = small().state_dict()
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[content.find(state["backbone.fc.weight"].numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    assert "checksum" in refused(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"hello, I am a text file\n" * 9, "not a checkpoint"),
        (b"\n<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (pickle.dumps({"net": {}}, 4), "not a checkpoint"),
        (b"PK\x03\x04", "corrupt"),
        (nn.Linear(1, 1), "torch.save(model.state_dict()"),
        ([1, 2], "not a checkpoint"),
        ({"net": {}, "epoch": 1}, "no weights"),
        ({"net": {"fc.weight": torch.full((2, 2), math.nan)}}, "fc.weight"),
    ],
)
def test_files_without_weights(content, said, path):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert said in refused(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_end_in_one_line(legacy, path):
    content = {"net": {"fc.weight": torch.zeros(9, 9)}, "acc": np.float64(1)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    whole, draw, network = path.read_bytes(), random.Random(0), small()
    for number in range(100):
        content = bytearray(whole[: draw.randrange(len(whole))] if number < 50 else whole)
        for _ in range(4 * (number >= 50)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
        refused(path, network)  # an unharmed one does not fit the network either


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_nothing_in_a_file_is_executed(form, path):
    content = {"net": small().state_dict(), "acc": Payload(path.with_name("executed"))}
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    refused(path)
    assert not path.with_name("executed").exists()


def test_a_file_is_replaced_whole_or_not_at_all(path):
    """torch.save raises a RuntimeError on a full disk."""
    utils.save_checkpoint({"epoch": 1}, path)
    full = mock.patch.object(torch, "save", side_effect=RuntimeError("unexpected pos 64 vs 0"))
    with full, pytest.raises(UserError, match="cannot write .*a.pth"):
        utils.save_checkpoint({"epoch": 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1} and [*path.parent.iterdir()] == [path]


def test_a_mask_is_finite_and_a_diverged_weight_is_not(path):
    """Networks of shifted windows keep masks of 0 and -inf as weights."""
    for values, fits in (([0.0, -math.inf], True), ([1.0, -math.inf], False), ([0.0, math.nan], False)):
        torch.save({**small().state_dict(), "mask": torch.tensor(values)}, path)
        if fits:
            assert "mask" in Checkpoint(path).state
        else:
            assert "not finite" in refused(path)
