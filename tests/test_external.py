"""Networks of torchvision, timm and files: names, taps by rule, generated branches, and what cannot be cut."""

import copy
import json
import random
import sys
import urllib.error

import pytest
import torch
import torchvision
from torch import nn

import models
import utils
from models.auxiliary import read_taps
from models.cost import branch_costs, cost
from scripts import QUICK_RUN, ROOT, checkpoint, readme_code, refused, run, save_teacher, status

SMALL = torch.zeros(1, 3, 32, 32)

# The smallest of each of torchvision's families, and some of timm's.
TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1
swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 wide_resnet50_2
"""
TIMM = """
cait_xxs24_224 convnext_atto deit_tiny_patch16_224 edgenext_xx_small efficientformerv2_s0 ghostnet_050 hrnet_w18_small
levit_128s mixer_s32_224 mobilenetv3_small_050 mobilevit_xxs poolformer_s12 pvt_v2_b0 regnetx_002 repvit_m0_9 resnet10t
vit_tiny_patch16_224 xcit_nano_12_p16_224
"""
FAMILIES = [f"torchvision/{name}" for name in TORCHVISION.split()] + [f"timm/{name}" for name in TIMM.split()]
# Networks that train only at more than 32 pixels a side (timm's: 64).
SIZES = {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224, "efficientformerv2_s0": 224, "levit_128s": 224}


class Tiny(nn.Module):
    """Three stages for images of any size; each begins with a change in place, and the forward pass makes constants."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = self.stage(8, 8, 1)
        self.stage2 = self.stage(8, 16, 2)
        self.stage3 = self.stage(16, 32, 2)
        self.scale = nn.Parameter(torch.ones(32))
        self.fc = nn.Linear(32, num_classes)

    def stage(self, in_width, width, stride):
        layers = [nn.ReLU(inplace=True), nn.Conv2d(in_width, width, 3, stride, 1), nn.BatchNorm2d(width)]
        return nn.Sequential(*layers, nn.Dropout(0.2), nn.Conv2d(width, width, 3, 1, 1))

    def forward(self, x, mask=None):
        x = self.stage3(self.stage2(self.stage1(self.stem(x - torch.tensor(0.5)))))
        return self.fc(x.mean((2, 3)) * self.scale + torch.tensor(2.0))


def tiny_aux(**options):
    torch.manual_seed(0)
    return models.attach_auxiliary(Tiny(), 10, example=SMALL, fresh=Tiny, **options)


def branch_shapes(network, level):
    """Return the sorted shapes of all weights of a branch before its last layer."""
    auxiliary = network.auxiliary_classifier
    parts = [f"block_extractor{level}."]
    if auxiliary.tail_prefix is not None:
        parts.append(f"{auxiliary.tail_prefix}{level}.")
    return sorted(tuple(value.shape) for key, value in auxiliary.named_parameters() if key.startswith(tuple(parts)))


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("resnet20", ["layer1", "layer2", "layer3"]),
        ("wrn_16_2", ["block1", "block2", "block3"]),
        ("mobilenetV2", ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]),
    ],
)
def test_the_rule_finds_the_hand_written_taps_and_branches(name, taps):
    published = models.create(f"{name}_aux", 10)
    network = models.attach_auxiliary(models.create(name, 10), 10, example=SMALL)
    assert list(network.backbone.stage_reader.taps) == taps
    expected, _ = published.backbone.features(SMALL)
    assert [tuple(tap.shape[1:]) for tap in expected] == list(network.backbone.stage_reader.taps.values())
    for level in range(1, len(taps)):
        assert branch_shapes(network, level) == branch_shapes(published, level)


def check(network, plain, images):
    """Assert that a network has the plain one's logits in both modes, and two to four heads that all train."""
    plain.load_state_dict(network.backbone.state_dict(), strict=True)
    for mode in (False, True):
        torch.manual_seed(1)
        logits, aux_logits = network.train(mode)(images)
        torch.manual_seed(1)
        assert torch.equal(logits, plain.train(mode)(images))
    assert 2 <= len(aux_logits) <= 4 and all(aux.shape == (len(images), 40) for aux in aux_logits)
    sum(aux.square().mean() for aux in (logits, *aux_logits)).backward()
    weights = network.auxiliary_classifier.named_parameters()
    assert not [key for key, weight in weights if weight.grad is None or not weight.grad.isfinite().all()]


@pytest.mark.parametrize("branches", ["copy", "light"])
def test_attached_network_keeps_the_logits_and_trains_every_weight(branches):
    network = tiny_aux(branches=branches)
    check(network, Tiny(), torch.randn(5, 3, 40, 24))
    assert network.auxiliary_classifier.num_branches == 3
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())


def test_branches_are_new_and_their_own():
    network = tiny_aux()
    owned = {id(weight) for weight in network.backbone.parameters()}
    assert owned.isdisjoint(id(weight) for weight in network.auxiliary_classifier.parameters())
    branch = network.auxiliary_classifier.block_extractor1[0]
    assert not torch.equal(branch.get_submodule("stage3.1").weight, network.backbone.stage3[1].weight)


def test_without_a_second_network_branches_are_reset_and_the_rest_is_named():
    net = Tiny()
    with torch.no_grad():
        net.scale.fill_(3.0)
    with pytest.warns(UserWarning, match="keep the network's values"):
        network = models.attach_auxiliary(net, 10, example=SMALL)
    branch = network.auxiliary_classifier.block_extractor1[0]
    assert (branch.scale == 3).all()
    assert not torch.equal(branch.get_submodule("stage3.1").weight, net.stage3[1].weight)


def test_copies_state_dicts_and_compilation():
    network, other = tiny_aux().eval(), tiny_aux(branches="copy").eval()
    images = torch.randn(2, 3, 32, 32)
    other.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(other(images), network(images), rtol=0, atol=0)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        copied.backbone.fc.weight.zero_()
    assert not torch.equal(copied(images)[0], network(images)[0])
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), network(images))


FILES = """
import torch
from torch import nn


class Lazy(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        conv = lambda width: nn.Sequential(nn.LazyConv2d(width, 3, 2, 1), nn.ReLU())
        self.stages, self.fc = nn.Sequential(conv(4), conv(8), conv(16)), nn.LazyLinear(num_classes)

    def forward(self, images):
        return self.fc(self.stages(images).mean((2, 3)))


class Features(Lazy):
    def forward(self, images):
        return super().forward(images), {"features": images}


def frozen(num_classes):
    net = Lazy(num_classes)
    net(torch.zeros(1, 3, 32, 32))
    net.stages.requires_grad_(False)
    return net


def fixed(num_classes):
    return Lazy(7)


def unnamed():
    return Lazy(7)
"""


def test_files_of_several_habits(tmp_path, capsys):
    """Lazy layers, frozen stages; outputs of another form and other arguments end in one line."""
    (tmp_path / "nets.py").write_text(FILES)
    for name, words in ((f"{tmp_path}/nets.py:other", "no function other, but "), ("missing.py:build", "no such file")):
        with pytest.raises(ValueError, match=words):
            models.create(name, 10)
    for name in ("Lazy", "frozen"):
        network = models.create(f"{tmp_path}/nets.py:{name}_aux", 10, size=32)
        assert all(weight.requires_grad for weight in network.auxiliary_classifier.parameters())
    said = {"Features": "a tuple, not logits", "fixed": "7 logits for 10 classes", "unnamed": "num_classes"}
    torch.save(models.create(f"{tmp_path}/nets.py:frozen", 10).state_dict(), tmp_path / "w.pth")
    pair = ("--arch", f"{tmp_path}/nets.py:frozen", "--arch2", "resnet8", "--checkpoint-dir", tmp_path)
    assert status("train_online_kd_cifar", *QUICK_RUN, *pair) == 0
    for name, words in said.items():
        arch = f"{tmp_path}/nets.py:{name}"
        assert status("train_baseline_cifar", *QUICK_RUN, "--arch", arch, "--checkpoint-dir", tmp_path) == 2
        assert words in capsys.readouterr().err
        reading = ("--arch", arch, "--image-size", 32, "--mean", 0.5, "--std", 0.5)
        assert status("predict", tmp_path / "none.png", "--weights", tmp_path / "w.pth", *reading) == 2
        assert words in capsys.readouterr().err


def test_number_of_taps():
    assert list(tiny_aux(taps=2).backbone.stage_reader.taps) == ["stage2", "stage3"]


def test_stage_features_of_any_network_are_maps():
    images = torch.randn(2, 3, 32, 32)
    for net in (models.create("resnet8", 10), models.create("resnet8_aux", 10)):
        features, _, logits = models.stage_features(net, images)
        assert [tuple(found.shape[1:]) for found in features] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    vit = torchvision.models.VisionTransformer(32, 8, 4, 2, 16, 32, num_classes=10).eval()
    models.read_stages(vit, SMALL, taps=2)
    features, embedding, logits = models.stage_features(vit, images)
    assert [tuple(found.shape) for found in features] == [(2, 16, 4, 4)] * 2
    assert torch.equal(logits, vit(images))
    assert embedding.shape == (2, 16)


def test_create_from_torchvision_and_a_pair_of_two():
    network = models.create("torchvision/resnet18_aux", 7, rotations=1, size=32)
    assert (network.arch, network.backbone.arch) == ("torchvision/resnet18_aux", "torchvision/resnet18")
    logits, aux_logits = network.eval()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and [aux.shape[1] for aux in aux_logits] == [7] * 4
    assert type(models.create("torchvision/resnet18", 7)) is torchvision.models.ResNet
    pair = models.create("resnet8+torchvision/squeezenet1_1", 7, size=64)
    assert pair.arch == "resnet8+torchvision/squeezenet1_1"
    logits, aux_logits = pair.eval()(torch.randn(2, 3, 64, 64))
    assert [len(found) for found in aux_logits] == [3, 4]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("torchvision/resnet19_aux", "torchvision/resnet18"),
        ("mobilenet_v2", "nearest: torchvision/mobilenet_v2"),
        ("wrn_16_3_aux", "nearest: .*wrn_16_2_aux"),
        ("shufflev2", "nearest: .*ShuffleV2"),
        ("timm/resnet18.a1_in2k_aux", "timm/resnet18.a1_in1k"),
    ],
)
def test_unknown_names_list_the_nearest(name, nearest):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=nearest):
        models.create(name, 10)


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        models.create("timm/resnet10t_aux", 10)


def test_hub_weights_and_normalisation(monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="no route to host"):
        models.hub_weights("torchvision/resnet18_aux")
    with pytest.raises(ValueError, match="in no hub"):
        models.hub_weights("resnet20")
    assert models.normalisation("torchvision/resnet18_aux") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert models.normalisation("resnet20") is None
    assert models.hub.margin("torchvision/resnet50") == pytest.approx(232 / 224)


def test_hub_weights_behave_as_a_file_of_them(tmp_path, monkeypatch, capsys):
    """Of a network whose classifier is a convolution, and whose weights hold the library's own auxiliary heads."""
    name = "torchvision/squeezenet1_1"
    state = models.create(name, 1000).state_dict()
    monkeypatch.setattr(models, "hub_weights", lambda arch: state | {"AuxLogits.fc.bias": torch.ones(1000)})
    words = (*QUICK_RUN, "--checkpoint-dir", tmp_path, "--arch", name)
    taught = ("--method", "kd", "--tarch", name, "--tcheckpoint", "hub")
    assert "1000" in refused(capsys, *words, *taught, script="train_student_cifar")
    run("train_baseline_cifar", *words, "--init-lr", "1e-20", "--pretrained-backbone", "hub")
    found = checkpoint(tmp_path)["net"]
    assert torch.equal(found["features.0.weight"], state["features.0.weight"])
    assert found["classifier.1.weight"].shape == (10, 512, 1, 1)


def test_networks_of_files_may_name_their_parts_as_they_like(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = (
        "class Net(nn.Module):",
        "    def __init__(self, num_classes):",
        "        super().__init__()",
        "        self.backbone, self.net1 = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)",
        "        self.fc = nn.Linear(8, num_classes)",
        "    def forward(self, x):",
        "        return self.fc(self.net1(self.backbone(x)).relu().mean((2, 3)))",
    )
    (tmp_path / "own.py").write_text("\n".join(["from torch import nn", *lines]))
    words = (*QUICK_RUN, "--arch", "own.py:Net", "--checkpoint-dir")
    run("train_baseline_cifar", *words, "first")
    torch.save(checkpoint(tmp_path / "first")["net"], "first.pth")
    run("train_baseline_cifar", *words, "second", "--init-lr", "1e-20", "--pretrained-backbone", "first.pth")
    first, second = (checkpoint(tmp_path / name)["net"] for name in ("first", "second"))
    assert torch.equal(first["fc.weight"], second["fc.weight"])
    capsys.readouterr()
    run("test_model", "--dataset", "digits", "--arch", "own.py:Net", "--student-weights", "first.pth", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["backbone"] == found["with_heads"] == {"parameters": 330, "multiply_adds": 225 * 27 * 8 + 80}


def test_a_network_that_cannot_be_traced_serves_methods_without_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "from test_external import Untraceable\n\ndef net(num_classes):\n    return Untraceable(num_classes)\n"
    (tmp_path / "own.py").write_text(code)
    teacher = save_teacher(tmp_path / "t.pth", "resnet8")
    words = (*QUICK_RUN, "--tarch", "resnet8", "--tcheckpoint", teacher, "--arch", "own.py:net")
    assert status("train_student_cifar", *words, "--method", "kd") == 0
    words += ("--method", "fitnet", "--tag", "fitnet")
    assert "Untraceable" in refused(capsys, *words, script="train_student_cifar")
    assert cost(Untraceable(), 32) == cost(Tiny(), 32)  # counted by running it


READS_VALUES = """
import torch
from test_external import Tiny

def net(num_classes):
    assert torch.linspace(0, 1, 3)[2].item() == 1  # as rates of stochastic depth are often made
    return Tiny(num_classes)
"""


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1_aux", "own.py:net_aux"])
def test_what_branches_cost_is_counted_without_their_memory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(READS_VALUES)
    before = torch.get_rng_state()
    costs = branch_costs(name, 10, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert costs["light"]["multiply_adds"] < costs["copy"]["multiply_adds"]
    for branches in ("copy", "light"):
        network = models.create(name, 10, size=64, branches=branches)
        assert costs[branches]["parameters"] == sum(parameter.numel() for parameter in network.parameters())
        assert costs["plain"]["parameters"] == sum(parameter.numel() for parameter in network.backbone.parameters())


@pytest.mark.slow
def test_weights_say_how_their_branches_were_made(tmp_path, monkeypatch, capsys):
    """A teacher of few and light branches teaches a student of others; what each kind costs is printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("from test_external import Tiny as net\n")
    words = (*QUICK_RUN, "--arch", "own.py:net_aux", "--checkpoint-dir")
    run("train_teacher_cifar", *words, "teacher", "--branches", "light", "--taps", "2")
    (path,) = tmp_path.glob("teacher/*/*_aux.pth.tar")
    costs = branch_costs("own.py:net_aux", 10, 32, taps=2)
    assert f"light {costs['light']['parameters'] / 1e6:.2f} M" in capsys.readouterr().out
    run("train_student_cifar", *words, "student", "--tarch", "own.py:net_aux", "--tcheckpoint", path)
    run("test_model", "--dataset", "digits", "--arch", "own.py:net_aux", "--student-weights", path)
    assert "auxiliary_classifier.fc3.weight" in checkpoint(tmp_path / "student")["net"]


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = readme_code("attach_auxiliary")
    images = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    names = {"train_loader": loader, "test_loader": loader, "my_large_network": Tiny(), "my_small_network": Tiny()}
    with pytest.warns(UserWarning, match="keep the network's values"):
        exec(code.replace("epochs=30", "epochs=2").replace("milestones=(15, 25)", "milestones=(1,)"), names)
    assert names["best"]["epoch"] in (1, 2) and (tmp_path / "runs" / "student" / "log.jsonl").exists()


def test_torch_hub_loads_a_published_network(tmp_path):
    weights = save_teacher(tmp_path / "t.pth", "wrn_16_2_aux")
    network = torch.hub.load(str(ROOT), "wrn_16_2", source="local", weights=weights).eval()
    expected = models.create("wrn_16_2", 10).eval()
    utils.load_weights(expected, weights)
    assert torch.equal(network(SMALL), expected(SMALL))
    assert torch.hub.load(str(ROOT), "resnet8_aux", source="local").num_classes == 100


class TwoHeads(Tiny):
    """Tiny with a second classifier, which reads another tensor."""

    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x):
        x = self.stage2(self.stage1(self.stem(x)))
        return self.fc(self.stage3(x).mean((2, 3))) + self.fc2(x.mean((2, 3)))


class Untraceable(Tiny):
    """Tiny with control flow that depends on the image."""

    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (TwoHeads(), "several classifiers .fc, fc2."),
        (Untraceable(), "cannot be traced: .* tensor"),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "no classifier"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), "cannot be cut"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10)), "32 x 32 pixels"),
        (Tiny(num_classes=7), "7 classes, not 10"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(net, words):
    with pytest.raises(ValueError, match=words) as caught:
        models.attach_auxiliary(net, 10, example=SMALL)
    assert "\n" not in str(caught.value)


def test_a_branch_has_what_is_changed_in_place_without_a_result():
    class Statement(Tiny):
        def forward(self, x):
            x = self.stage2(self.stage1(self.stem(x)))
            x.neg_().mul_(2)
            return self.fc(self.stage3(x).mean((2, 3)))

    net = Statement()
    network = models.attach_auxiliary(net, 10, example=SMALL, fresh=lambda: net).eval()  # branches of its own weights
    taps, embedding, _ = read_taps(net, torch.randn(2, 3, 32, 32))
    assert len(taps) == 3
    for level, tap in enumerate(taps[:-1], 1):
        branch = getattr(network.auxiliary_classifier, f"block_extractor{level}")
        torch.testing.assert_close(branch(tap), embedding)


class Skipping(nn.Module):
    """A block that is skipped by a draw in Python, as stochastic depth often is written."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return x if self.training and random.random() < 0.5 else x + self.conv(x)


class Dropping(nn.Module):
    """A block that draws its mask on the host."""

    def forward(self, x):
        return x * (torch.rand(16, 1, 1) < 0.5).to(x.device) if self.training else x


def test_the_modules_around_a_draw_are_looked_into():
    class Deep(Tiny):
        def __init__(self):
            super().__init__()
            self.stage2.append(Dropping())
            self.stages = nn.Sequential(self.stage1, self.stage2, self.stage3)

        def forward(self, x):
            return self.fc(self.stages(self.stem(x)).mean((2, 3)) * self.scale)

    network = models.attach_auxiliary(Deep(), 10, example=SMALL, fresh=Deep)
    assert len(network.backbone.stage_reader.taps) == 3


def test_draws_in_python_stay_draws():
    class Deep(Tiny):
        def __init__(self):
            super().__init__()
            self.stage2 = nn.Sequential(self.stage2, Skipping(), Skipping())

    network = models.attach_auxiliary(Deep(), 10, example=SMALL, fresh=Deep).train()
    network.backbone.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)
    images = torch.randn(2, 3, 32, 32)
    assert len({round(network(images)[0].sum().item(), 4) for _ in range(20)}) > 2


def test_a_named_classifier_settles_which_embedding_is_meant():
    network = models.attach_auxiliary(TwoHeads(), 10, example=SMALL, classifier="fc2", fresh=TwoHeads)
    assert models.stage_features(network, SMALL)[1].shape == (1, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    library, _, bare = name.partition("/")
    pytest.importorskip(library)
    torch.manual_seed(0)
    size = SIZES.get(bare, 64 if library == "timm" else 32)
    network, other = (models.create(f"{name}_aux", 10, size=size) for _ in range(2))
    other.load_state_dict(network.state_dict(), strict=True)
    check(network, models.create(name, 10, size=size), torch.randn(2, 3, size, size))
