"""Networks against the contract: layouts, forward values, names, frozen backbones, image sizes and initialisation."""

import functools
import math

import numpy as np
import pytest
import torch
import torchvision
from contract import classes, filled_network, forward_values, layouts
from torch import nn

import models

CIFAR_BACKBONES = [name for name in models.names() if not models.is_aux(name) and not models.is_pair(name)]
CIFAR_BACKBONES = [name for name in CIFAR_BACKBONES if not models.is_imagenet(name)]
ONE_PER_FAMILY = ["resnet8", "wrn_16_1", "vgg8_bn", "resnet18_imagenet", "mobilenetV2_s2", "ShuffleV1", "ShuffleV2"]


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


def fast_random_network(name, num_classes=10, rotations=4):
    """Return a network in a small number of classes with default initialisation, seeded."""
    torch.manual_seed(0)
    return models.create(name, num_classes, rotations)


@pytest.mark.parametrize("name", layouts())
def test_layout_is_the_contracts(name):
    assert name in models.names()
    assert shapes_of(name, classes(name)) == layouts()[name]


@pytest.mark.parametrize("name", ["mobilenetV2", "mobilenetV2_aux"])
def test_mobilenet_with_stem_stride_2_has_the_same_layout(name):
    assert shapes_of(name.replace("V2", "V2_s2"), 100) == layouts()[name]


@pytest.mark.parametrize("name", [name for name in layouts() if models.is_aux(name) or models.is_pair(name)])
def test_one_rotation_changes_only_the_auxiliary_heads_width(name):
    expected = {
        key: [shape[0] // 4, *shape[1:]] if "auxiliary_classifier.fc" in key else shape
        for key, shape in layouts()[name].items()
    }
    assert shapes_of(name, classes(name), rotations=1) == expected


FORWARD_CASES = sorted({tuple(key.split("/")[:2]) for key in forward_values()})


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


def test_names_are_unique_and_all_can_be_created():
    assert len(set(models.names())) == len(models.names())
    assert {"mobilenetV2_s2", "mobilenetV2_s2_aux", "resnet8_aux", "resnet14_aux"} <= set(models.names())
    for name in set(models.names()) - set(layouts()):
        assert shapes_of(name, 10)


@pytest.mark.parametrize(
    ("name", "within"),
    [
        ("mobilenetV2_s2", {}),
        ("mobilenetV2_s2_aux", {"backbone": "mobilenetV2_s2"}),
        ("mbv2_mbv2", {f"net{net}": "mobilenetV2_aux" for net in (1, 2)} | {"net2.backbone": "mobilenetV2"}),
    ],
)
def test_every_network_within_knows_its_name(name, within):
    with torch.device("meta"):
        network = models.create(name, 10)
    assert network.arch == name
    assert {part: network.get_submodule(part).arch for part in within} == within


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("wrn_16_3_aux", "wrn_16_2_aux"),
        ("shufflev2_aux", "ShuffleV2_aux"),
        ("resnet56_resnet20", "resnet56_resnet56"),
        ("resnet56\n", "resnet56"),
        ("", "wrn"),
        ("_", "wrn"),
        ("wrn_40_2_aux_aux", "wrn_40_2_aux"),
    ],
)
def test_unknown_name_lists_the_nearest_ones_on_one_line(name, nearest):
    create = functools.partial(models.create, num_classes=10)
    for function in (create, models.backbone_name, models.is_imagenet):
        with pytest.raises(ValueError, match=f"unknown architecture .* nearest: .*{nearest}") as error:
            function(name)
        assert "\n" not in str(error.value)
    assert not models.is_aux(name)
    assert not models.is_pair(name)


@pytest.mark.parametrize(
    ("pair", "member"),
    [
        ("mbv2_mbv2", "mobilenetV2_aux"),
        ("WRN_16_2_WRN_16_2", "wrn_16_2_aux"),
        ("vgg13_vgg13", "vgg13_bn_aux"),
        ("shufflev1_shufflev1", "ShuffleV1_aux"),
        ("resnet18_resnet18", "resnet18_imagenet_aux"),
        ("resnet8_resnet8", "resnet8_aux"),
        ("resnet20_aux_resnet20_aux", "resnet20_aux"),
        ("mobilenetV2_s2_mobilenetV2_s2", "mobilenetV2_s2_aux"),
        ("WRN_16_1_WRN_16_1", "wrn_16_1_aux"),
    ],
)
def test_pairs_hold_two_networks_of_the_member_architecture(pair, member):
    assert models.is_pair(pair)
    assert not models.is_aux(pair)
    assert models.member_name(pair) == member
    assert models.backbone_name(pair) == models.backbone_name(member) == member.removesuffix("_aux")
    one = shapes_of(member, 10)
    expected = {f"{net}.{key}": shape for net in ("net1", "net2") for key, shape in one.items()}
    assert shapes_of(pair, 10) == expected


def test_members_of_a_pair_start_from_different_weights():
    pair = fast_random_network("resnet8_resnet8")
    assert (pair.num_classes, pair.rotations) == (10, 4)
    assert not torch.equal(pair.net1.backbone.conv1.weight, pair.net2.backbone.conv1.weight)


def test_member_name_refuses_a_single_network():
    with pytest.raises(ValueError, match="mutual pair 'resnet20_aux'; nearest: resnet20_resnet20"):
        models.member_name("resnet20_aux")


def test_imagenet_family():
    assert models.is_imagenet("resnet18_resnet18")
    assert models.is_imagenet("resnet50_imagenet_aux")
    assert not models.is_imagenet("ResNet50_aux")
    assert not models.is_imagenet("resnet20")


@pytest.mark.parametrize("name", [f"{name}_aux" for name in ONE_PER_FAMILY])
def test_frozen_backbone_stands_still(name):
    network = fast_random_network(name)
    assert not network.frozen
    network.freeze_backbone()
    assert network.frozen
    assert not network.backbone.training
    assert network.train() is network
    assert network.auxiliary_classifier.training
    assert not any(module.training for module in network.backbone.modules())
    before = {key: value.clone() for key, value in network.backbone.state_dict().items()}
    moving = {key: value.clone() for key, value in network.auxiliary_classifier.named_buffers() if "mean" in key}

    logits, aux_logits = network(torch.randn(2, 3, 32, 32))
    assert not logits.requires_grad
    sum(aux.sum() for aux in aux_logits).backward()
    assert all(parameter.grad is None for parameter in network.backbone.parameters())
    assert all(parameter.grad is not None for parameter in network.auxiliary_classifier.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.backbone.state_dict().items())
    buffers = dict(network.auxiliary_classifier.named_buffers())
    assert all(not torch.equal(value, buffers[key]) for key, value in moving.items())


@pytest.mark.parametrize("name", [f"{name}_aux" for name in ONE_PER_FAMILY])
def test_every_parameter_gets_a_gradient(name):
    network = fast_random_network(name)
    logits, aux_logits = network(torch.randn(2, 3, 32, 32))
    (logits.sum() + sum(aux.sum() for aux in aux_logits)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["resnet8_aux", "wrn_16_1_aux", "vgg8_bn_aux", "mobilenetV2_aux", "ShuffleV2_aux"])
def test_taps_outlive_the_layers_after_them(name):
    backbone = fast_random_network(name).eval().backbone
    calls = []
    for stage in list(backbone.modules())[1:]:
        stage.register_forward_hook(lambda module, inputs, output: calls.append((output, output.clone())))
    with torch.no_grad():
        taps, _ = backbone.forward_features(torch.randn(2, 3, 32, 32))
    recorded = {id(output): (output, copy) for output, copy in calls}
    kept = [recorded[id(tap)] for tap in taps if id(tap) in recorded]
    assert kept
    for output, copy in kept:
        # A VGG block's own output is activated in place to become the tap; nothing may change it after that.
        expected = copy.relu() if name.startswith("vgg") else copy
        assert torch.equal(output, expected)


@pytest.mark.parametrize("name", CIFAR_BACKBONES)
def test_cifar_networks_take_64_pixel_images(name):
    network = fast_random_network(f"{name}_aux", rotations=1).eval()
    levels = 4 if name.startswith(("vgg", "mobilenet", "ResNet50")) else 3
    with torch.no_grad():
        logits, aux_logits = network(torch.randn(1, 3, 64, 64))
    assert logits.shape == (1, 10)
    assert [tuple(aux.shape) for aux in aux_logits] == [(1, 10)] * levels
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8_bn", "mobilenetV2_s2", "ShuffleV1", "ShuffleV2"])
def test_cifar_networks_take_96_pixel_images(name):
    network = fast_random_network(f"{name}_aux").eval()
    with torch.no_grad():
        logits, aux_logits = network(torch.randn(1, 3, 96, 96))
    assert logits.shape == (1, 10)
    assert all(aux.shape == (1, 40) for aux in aux_logits)


@pytest.mark.parametrize(("size", "last"), [(32, 4), (64, 4), (96, 12)])
def test_vgg_keeps_its_fourth_pool_for_64_pixel_images_only(size, last):
    backbone = fast_random_network("vgg8_bn").eval()
    with torch.no_grad():
        taps, _ = backbone.forward_features(torch.randn(1, 3, size, size))
    assert [tap.shape[-1] for tap in taps] == [size, size // 2, size // 4, last]


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_channels_last_is_kept_and_computes_the_same(name):
    network = fast_random_network(f"{name}_aux").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
        network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
        found = network(images)
        taps, _ = network.backbone.forward_features(images)
    assert all(tap.is_contiguous(memory_format=torch.channels_last) for tap in taps)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vgg8_bn_aux", "ShuffleV2_aux"])
def test_networks_are_one_graph_for_the_compiler(name):
    torch.compiler.reset()
    network = fast_random_network(name).eval()
    network.freeze_backbone()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), network(images))


def test_channel_shuffle_is_torchs_in_either_memory_format():
    images = torch.randn(2, 12, 4, 5)
    expected = nn.functional.channel_shuffle(images, 3)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = models.layers.channel_shuffle(images.to(memory_format=memory_format), 3)
        assert found.is_contiguous(memory_format=memory_format)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_imagenet_resnets_are_torchvisions(depth):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=20)
    network = models.create(f"resnet{depth}_imagenet", 20)
    network.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for training in (True, False):
            expected = reference.train(training)(images)
            torch.testing.assert_close(network.train(training)(images), expected, rtol=1e-4, atol=1e-5)


def convs_follow_fan_out(module):
    """Assert that every convolution of useful size has standard deviation sqrt(2 / (k * k * out_channels))."""
    for key, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 2000:
            expected = math.sqrt(2 / (layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels))
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.1), key


def is_default_init(module):
    """Say whether every convolution's weights are bounded as PyTorch's uniform default is."""
    convs = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return all(layer.weight.abs().max() <= 1 / math.sqrt(layer.weight[0].numel()) + 1e-6 for layer in convs)


def linears_of(module):
    """Return the linear layers of a network."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "wrn_16_2", "resnet18_imagenet"])
def test_initialisation_of_residual_networks(name):
    network = fast_random_network(f"{name}_aux", num_classes=100)
    convs_follow_fan_out(network)
    for linear in linears_of(network):
        assert not linear.bias.any()
        assert linear.weight.abs().max() <= 1 / math.sqrt(linear.in_features) + 1e-6
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in norms)


def test_initialisation_of_mobilenet():
    network = fast_random_network("mobilenetV2_aux", num_classes=100)
    convs_follow_fan_out(network)
    for linear in linears_of(network):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not linear.bias.any()


def test_initialisation_of_vgg_backbone_and_branches():
    network = fast_random_network("vgg8_bn_aux", num_classes=100)
    convs_follow_fan_out(network.backbone)
    head = network.backbone.head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.bias.any()
    assert is_default_init(network.auxiliary_classifier)
    assert all(linear.bias.any() for linear in linears_of(network.auxiliary_classifier))


def test_initialisation_of_the_shufflenets():
    first = fast_random_network("ShuffleV1_aux", num_classes=100)
    assert is_default_init(first.backbone)
    assert first.backbone.head.bias.any()
    convs_follow_fan_out(first.auxiliary_classifier)
    assert not any(linear.bias.any() for linear in linears_of(first.auxiliary_classifier))
    second = fast_random_network("ShuffleV2_aux", num_classes=100)
    assert is_default_init(second)
    assert all(linear.bias.any() for linear in linears_of(second))
