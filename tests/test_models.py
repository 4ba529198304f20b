"""Networks against the contract: layouts, forward values, names, frozen backbones, image sizes and initialisation."""

import math
import re

import numpy as np
import pytest
import torch
from contract import classes, filled_network, forward_values, layouts
from torch import nn

import models

ONE_PER_CIFAR_FAMILY = ["resnet8", "wrn_16_1", "vgg8", "vgg8_bn", "mobilenetV2_s2", "ShuffleV1", "ShuffleV2"]
ONE_PER_FAMILY = [*ONE_PER_CIFAR_FAMILY, pytest.param("resnet18_imagenet", marks=pytest.mark.slow)]
# Networks that take a second and more.
LARGE = re.compile("imagenet|ResNet50|32x4|vgg13_bn_aux|resnet18|_40_|mbv2|shufflev._")


def shapes_of(name, num_classes, rotations=4):
    """Return {state_dict key: shape}, built without memory for the weights."""
    with torch.device("meta"):
        network = models.create(name, num_classes, rotations)
    return {key: list(value.shape) for key, value in network.state_dict().items()}


def contract_input(name):
    """Return the images that the contract's forward values were computed for."""
    shape = (2, 3, 224, 224) if models.is_imagenet(name) else (4, 3, 32, 32)
    return torch.from_numpy(np.random.RandomState(0).standard_normal(shape).astype(np.float32))


def named_outputs(name, output):
    """Return {contract's output name: tensor} of any network's output."""
    if models.is_pair(name):
        pairs = zip(*output, strict=True)
        members = [(f"net{index}/", logits, aux) for index, (logits, aux) in enumerate(pairs, start=1)]
    elif models.is_aux(name):
        members = [("", *output)]
    else:
        members = [("", output, [])]
    named = {}
    for prefix, logits, aux_logits in members:
        named[f"{prefix}logits"] = logits
        named |= {f"{prefix}aux{level}": aux for level, aux in enumerate(aux_logits, start=1)}
    return named


def random_network(name, num_classes=10, rotations=4):
    """Return a network in a small number of classes with default initialisation, seeded."""
    torch.manual_seed(0)
    return models.create(name, num_classes, rotations)


@pytest.mark.parametrize("name", layouts())
def test_layout_is_the_contracts(name):
    """MobileNetV2 with another stride has the same; one rotation changes the width of the auxiliary heads alone."""
    assert name in models.names()
    for twin in {name, name.replace("mobilenetV2", "mobilenetV2_s2")}:
        assert shapes_of(twin, classes(name)) == layouts()[name]
    narrow = {key: shape for key, shape in layouts()[name].items() if "auxiliary_classifier.fc" in key}
    narrow = {key: [shape[0] // 4, *shape[1:]] for key, shape in narrow.items()}
    assert shapes_of(name, classes(name), rotations=1) == layouts()[name] | narrow


FORWARD_CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if LARGE.search(case[1]) else [])
    for case in sorted({tuple(key.split("/")[:2]) for key in forward_values()})
]


@pytest.mark.parametrize(("rotations", "name"), FORWARD_CASES)
def test_forward_values_are_the_contracts(rotations, name):
    prefix = f"{rotations}/{name}"
    network = filled_network(name, int(rotations.removeprefix("rotations")))
    images = contract_input(name)
    found = {}
    with torch.no_grad():
        for mode in ("eval", "train"):
            outputs = named_outputs(name, network.train(mode == "train")(images))
            found |= {f"{prefix}/{mode}/{output}": value.numpy()[:, ::7] for output, value in outputs.items()}
    expected = {key: value for key, value in forward_values().items() if key.startswith(f"{prefix}/")}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape
        error = np.abs(found[key] - value).max() / np.abs(value).max()
        assert error < 1e-3, f"{key}: relative error {error:.1e}"


def test_all_names_can_be_created():
    assert {"mobilenetV2_s2", "mobilenetV2_s2_aux", "resnet8_aux", "resnet14_aux", "vgg8"} <= set(models.names())
    assert "block0.1.weight" not in shapes_of("vgg8", 10)  # DPCD's, without BatchNorm
    assert all(shapes_of(name, 10) for name in set(models.names()) - set(layouts()))


def test_members_of_a_pair_start_from_different_weights():
    pair = random_network("resnet8_resnet8")
    assert (pair.num_classes, pair.rotations) == (10, 4)
    assert not torch.equal(pair.net1.backbone.conv1.weight, pair.net2.backbone.conv1.weight)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_every_parameter_gets_a_gradient_until_the_backbone_is_frozen(name):
    network = random_network(f"{name}_aux")
    logits, aux_logits = network(torch.randn(2, 3, 32, 32))
    (logits.sum() + sum(aux.sum() for aux in aux_logits)).backward()
    assert not network.frozen and all(parameter.grad is not None for parameter in network.parameters())
    network.zero_grad()
    network.freeze_backbone()
    assert network.train().frozen and network.auxiliary_classifier.training
    assert not any(module.training for module in network.backbone.modules())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    logits, aux_logits = network(torch.randn(2, 3, 32, 32))
    assert not logits.requires_grad
    sum(aux.sum() for aux in aux_logits).backward()
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert all(parameter.grad is not None for parameter in network.auxiliary_classifier.parameters())
    moved = {key for key, value in network.state_dict().items() if not torch.equal(before[key], value)}
    means = {key for key in before if key.startswith("auxiliary_classifier.") and "running_mean" in key}
    assert means <= moved and not any(key.startswith("backbone.") for key in moved)


@pytest.mark.parametrize("name", [*ONE_PER_CIFAR_FAMILY, pytest.param("ResNet50", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [64, 96])
def test_cifar_networks_take_larger_images(name, size):
    network, images = random_network(f"{name}_aux", rotations=1).eval(), torch.randn(1, 3, size, size)
    levels = 4 if name.startswith(("vgg", "mobilenet", "ResNet50")) else 3
    with torch.no_grad():
        logits, aux_logits = network(images)
        taps, _ = network.backbone.features(images)
    assert not name.startswith("vgg") or taps[-1].shape[-1] == {64: 4, 96: 12}[size]  # its fourth pool: 64 pixels alone
    assert logits.shape == (1, 10) and torch.isfinite(logits).all()
    assert [tuple(aux.shape) for aux in aux_logits] == [(1, 10)] * levels


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_channels_last_is_kept_and_computes_the_same(name):
    network = random_network(f"{name}_aux").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
        network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
        found = network(images)
        taps, _ = network.backbone.features(images)
    assert all(tap.is_contiguous(memory_format=torch.channels_last) for tap in taps)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def convs_follow_fan_out(module):
    """Assert that every convolution of useful size has standard deviation sqrt(2 / (k * k * out_channels))."""
    for key, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 2000:
            expected = math.sqrt(2 / (layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels))
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.1), key


def convs_are_pytorchs(module):
    """Assert that every convolution's weights are bounded as PyTorch's uniform default is."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.abs().max() <= 1 / math.sqrt(layer.weight[0].numel()) + 1e-6


def biases(module):
    """Return whether the biases of a network's linear layers are all zero, or none of them is."""
    (zero,) = {not layer.bias.any() for layer in module.modules() if isinstance(layer, nn.Linear)}
    return "zero" if zero else "random"


@pytest.mark.parametrize(
    ("name", "of_backbone", "of_heads"),
    [
        ("resnet20", "random", "zero"),
        ("wrn_16_2", "zero", "zero"),
        ("resnet18_imagenet", "random", "random"),
        pytest.param("ResNet50", "random", "random", marks=pytest.mark.slow),
        ("mobilenetV2", "zero", "zero"),
        ("vgg8_bn", "zero", "random"),
        ("ShuffleV1", "random", "zero"),
        ("ShuffleV2", "random", "random"),
    ],
)
def test_initialisation_is_the_released_codes(name, of_backbone, of_heads):
    """METHOD.md: Kaiming's fan-out or PyTorch's default for convolutions, N(0, 0.01) for some linear layers."""
    network = random_network(f"{name}_aux", num_classes=100)
    parts = {"backbone": network.backbone, "heads": network.auxiliary_classifier}
    assert {part: biases(module) for part, module in parts.items()} == {"backbone": of_backbone, "heads": of_heads}
    default = {"ShuffleV1": {"backbone"}, "ShuffleV2": {"backbone", "heads"}, "vgg8_bn": {"heads"}}.get(name, set())
    narrow = {"mobilenetV2": {"backbone", "heads"}, "vgg8_bn": {"backbone"}}.get(name, set())
    for part, module in parts.items():
        (convs_are_pytorchs if part in default else convs_follow_fan_out)(module)
        for layer in (layer for layer in module.modules() if isinstance(layer, nn.Linear)):
            if part in narrow:
                assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
            else:
                assert layer.weight.abs().max() <= 1 / math.sqrt(layer.in_features) + 1e-6
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)
