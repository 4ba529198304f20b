"""Methods and the Trainer from Python and by the scripts: constants, flags, own networks, own methods, resumption."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import methods
import models
import train_student_cifar
import utils
from scripts import QUICK, checkpoint, log_lines, parsed, readme_code, run, same, save_teacher, status, stopping
from training import Trainer, launch
from training.optim import rate_factor

SEED = "dataset_digits_seed0"


class Small(nn.Module):
    """A network of four classes that is in no list."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, images):
        return self.fc(self.norm(self.conv(images)).relu().mean((2, 3)))


def loader(count=32, shuffle=True):
    """Return a plain DataLoader of images whose class is the brightness of their channels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    shades = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[labels]
    images = shades[:, :, None, None] + 0.3 * torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=shuffle)


def network(seed=0):
    """Return a freshly initialised small network."""
    torch.manual_seed(seed)
    return Small()


def trainer(model=None, objective=None, **settings):
    """Return a Trainer in float32, by default of a small network taught by another one."""
    common = {"train": loader(), "test": loader(16, False), "epochs": 4, "amp": "off"}
    return Trainer(model or network(), objective or methods.KD(network(1)), **common | settings)


def test_a_network_of_ones_own_is_trained_without_a_command_line_and_without_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, test, teacher, student = loader(), loader(16, shuffle=False), network(0), network(1)
    Trainer(teacher, methods.Supervised(), train=train, test=test, epochs=12, lr=0.3).fit()
    objective = methods.KD(teacher, temperature=2.0)
    best = Trainer(student, objective, train=train, test=test, epochs=12, lr=0.3, schedule="cosine").fit()
    assert best["top1"] == best["value"] == 100 and 1 <= best["epoch"] <= 12
    assert not list(tmp_path.iterdir())


CHOICES = {
    "sgd": {"lr": 0.1, "milestones": (3,)},
    "adamw, cosine": {"optimizer": "adamw", "schedule": "cosine", "warmup": 1},
    "callables": {
        "optimizer": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9),
        "schedule": lambda progress: 1 - progress,
    },
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_stopped_run_resumes_bit_exactly(choice, tmp_path):
    """With each optimizer and schedule, at the last finished epoch of a plain DataLoader; from memory as well."""
    whole = trainer(**CHOICES[choice])
    best = whole.fit()
    with stopping(after=11, by=signal.SIGTERM), pytest.raises(launch.Preempted):  # in the third epoch
        trainer(folder=tmp_path, **CHOICES[choice]).fit()
    saved = utils.Checkpoint(tmp_path / "Small.pth.tar").content
    assert saved["epoch"] == 2
    resumed = trainer(folder=tmp_path, resume=True, **CHOICES[choice])
    loaded = trainer(**CHOICES[choice])
    loaded.load_state_dict(saved)
    for continued in (resumed, loaded):
        assert continued.fit() == best
        assert same(continued.model.state_dict(), whole.model.state_dict())
    assert len(log_lines(tmp_path)) == 4


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_momentum_of_another_memory_order_trains_to_the_same_weights(amp):
    first = trainer(epochs=2, amp=amp)
    first.fit()
    assert first.layout == (torch.channels_last if amp == "bf16" else torch.contiguous_format)
    state, finished = first.state_dict(), []
    for layout in (torch.contiguous_format, torch.channels_last):
        for entry in state["optimizer"]["state"].values():
            momentum = entry["momentum_buffer"]
            entry["momentum_buffer"] = momentum.to(memory_format=layout) if momentum.dim() == 4 else momentum
        finished.append(trainer(epochs=4, amp=amp))
        finished[-1].load_state_dict(state)
        finished[-1].fit()
    assert same(*(found.model.state_dict() for found in finished))


def test_another_optimizers_state_is_refused(tmp_path):
    first = trainer(epochs=1, folder=tmp_path)
    first.fit()
    state = first.state_dict()
    with pytest.raises(ValueError):
        trainer(optimizer="adamw").load_state_dict(state)
    with pytest.raises(utils.UserError):
        trainer(optimizer="adamw", folder=tmp_path, resume=True)
    entry = state["optimizer"]["state"][0]
    entry["momentum_buffer"] = entry["momentum_buffer"][:1]  # would broadcast
    with pytest.raises(ValueError):
        trainer().load_state_dict(state)


def test_settings_without_a_part_in_an_optimizer_or_schedule_are_refused():
    without = [{"optimizer": "adamw", "momentum": 0.9}, {"optimizer": torch.optim.Adagrad, "lr": 0.1}]
    for settings in [*without, {"optimizer": "adam"}, {"schedule": lambda progress: 1.0, "milestones": (2,)}]:
        with pytest.raises(ValueError):
            trainer(**settings)


def test_rate_factor_by_hand():
    """The warm-up's first step counts as done, and it shifts the milestones; a callable is given the progress."""

    def factors(schedule, **settings):
        return [rate_factor(schedule, epoch, 1, 4, epochs=10, **settings) for epoch in range(10)]

    expected = [1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.01]
    assert factors("multistep", milestones=(3, 5)) == pytest.approx(expected)
    expected = [0.25, 0.75, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01]
    assert factors("multistep", milestones=(3, 5), warmup=2) == pytest.approx(expected)
    progress = torch.tensor([(epoch + 0.25) / 10 for epoch in range(10)], dtype=torch.float64)
    assert factors("cosine") == pytest.approx((0.5 + 0.5 * torch.cos(torch.pi * progress)).tolist())
    assert factors(lambda progress: progress) == pytest.approx(progress.tolist())
    assert rate_factor("cosine", 5, 0, 4, epochs=10, warmup=5) == 1


@pytest.mark.parametrize(("rotations", "rule", "value", "epoch"), [(4, "joint", 30.0, 2), (1, "top1", 70.0, 4)])
def test_the_best_teacher_by_the_published_rules(rotations, rule, value, epoch, tmp_path, monkeypatch):
    """The first of equals, rounded to 0.01. `acc` is the backbone's top-1, and both accuracies are logged."""
    tests = [(50.0, 20.0, 10.0), (40.0, 25.0, 30.0), (60.0, 30.004, 29.0), (70.0, 29.0, 29.0)]
    records = iter([{"top1": a, "aux1_joint": b, "aux2_joint": c} for a, b, c in tests])
    monkeypatch.setattr("training.trainer.evaluate", lambda *_, **__: dict(next(records)))
    best = trainer(models.create("resnet8_aux", 4, rotations), methods.Teacher(), folder=tmp_path).fit()
    assert best == {"epoch": epoch, "value": value, "top1": tests[epoch - 1][0], "net": None}
    for name, number in (("resnet8_aux_best", epoch), ("resnet8_aux", 4)):
        saved = utils.Checkpoint(tmp_path / f"{name}.pth.tar").content
        assert (saved["acc"], saved["best"], saved["best_by"]) == (tests[number - 1][0], best, rule)
    logged = [(line["test/top1"], line["test/joint"]) for line in log_lines(tmp_path)]
    assert logged == [(top1, max(heads)) for top1, *heads in tests]
    frozen = models.create("resnet8_aux", 4, rotations)
    frozen.freeze_backbone()
    assert methods.Teacher().best_by(frozen) == "joint"  # its top-1 never changes


@pytest.mark.parametrize("method", [methods.DIST, methods.CRD, methods.DPCD])
def test_terms_of_whole_batches_are_not_computed_in_parts(method):
    with pytest.raises(utils.UserError, match="whole batches"):
        Trainer(Small(), method(Small()), train=loader(8), test=loader(8), epochs=1, accumulate=2)


def test_hsakd_freezes_heads_without_a_partner():
    student, teacher = models.create("mobilenetV2_aux", 4), models.create("resnet8_aux", 4)
    Trainer(student, methods.HSAKD(teacher), train=loader(8), test=loader(8), epochs=1, amp="off")
    heads = student.auxiliary_classifier.named_parameters()
    trained = {name.partition(".")[0][-1] for name, weight in heads if weight.requires_grad}
    assert trained == {"2", "3", "4"}


VIEWING = """
import torch
from sizes import WIDTH


class Viewing(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(3, WIDTH, 5, 2), torch.nn.Conv2d(WIDTH, WIDTH, 5, 2)
        self.fc1, self.fc2 = torch.nn.Linear(WIDTH * 5 * 5, 12), torch.nn.Linear(12, 11)
        self.out = torch.nn.Linear(11, num_classes)

    def forward(self, images):
        features = self.conv2(self.conv1(images).relu()).relu()
        return self.out(self.fc2(self.fc1(features.view(-1, WIDTH * 5 * 5)).relu()).relu())
"""


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_file_of_the_users_whose_network_flattens_by_view(amp, tmp_path, capsys):
    """As older tutorials do: an error on channels-last features. The file imports its neighbour."""
    (tmp_path / "sizes.py").write_text("WIDTH = 4")
    (tmp_path / "viewing.py").write_text(VIEWING)
    name = f"{tmp_path}/viewing.py:Viewing"
    quick = (*QUICK, "--epochs", 1, "--amp", amp, "--checkpoint-dir", tmp_path / "runs")
    run("train_baseline_cifar", "--arch", name, *quick)
    (weights,) = tmp_path.glob("runs/*/*Viewing.pth.tar")
    teaching = ("--method", "kd", "--tarch", name, "--tcheckpoint", weights, "--arch")
    run("train_student_cifar", *teaching, "resnet8", *quick)
    run("train_student_cifar", *teaching, name, *quick, "--tag", "own")
    bare = utils.Checkpoint(weights).state
    torch.save(bare, tmp_path / "bare.pth")
    for script, flag in (("test_model", "--student-weights"), ("export", "--weights")):
        more = () if script == "test_model" else ("--format", "pt2", "--output", tmp_path / "file")
        reading = ("--image-size", 32, "--mean", 0.5, "--std", 0.5) if script == "export" else ()
        run(script, flag, tmp_path / "bare.pth", "--arch", name, "--dataset", "digits", *reading, *more)
    assert utils.Checkpoint(tmp_path / "bare.pth").num_classes == 10
    (tmp_path / "viewing.py").rename(tmp_path / "renamed.py")
    run("test_model", "--student-weights", weights, "--arch", name.replace("viewing", "renamed"), "--dataset", "digits")


def test_an_epoch_cut_short_on_a_plain_loader_begins_anew():
    """As by Ctrl-C in a notebook."""
    made, rates = trainer(epochs=1, lr=0.1, warmup=1), []
    made.step.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    with stopping(after=2, by=KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        made.fit()
    made.fit()
    assert rates == pytest.approx([0.025, 0.05, 0.025, 0.05, 0.075, 0.1])


def test_labels_may_be_probabilities_or_bytes():
    """As of MixUp, and of numpy's arrays; an epoch on the labels 0 to 3 is the same for each form."""
    images, numbers, found = torch.randn(32, 3, 8, 8), torch.arange(32) % 4, []
    test = DataLoader(TensorDataset(images, numbers.to(torch.uint8)), 8)
    for labels in (numbers, numbers.to(torch.uint8), torch.eye(4)[numbers]):
        torch.manual_seed(0)
        record = trainer(train=DataLoader(TensorDataset(images, labels), 8), test=test).one_epoch(0, None)
        found.append({name: value for name, value in record.items() if name.startswith(("train/", "test/"))})
    assert found[0] == found[1] and found[0] == pytest.approx(found[2])


def test_parts_of_a_batch_are_of_two_images_at_least():
    made = Trainer(Small(), methods.Supervised(), train=loader(8), test=loader(8), epochs=1, accumulate=4)
    for count, expected in ((1, [1]), (3, [3]), (5, [2, 3]), (8, [2] * 4), (10, [3, 3, 4])):
        batch = methods.Batch(torch.zeros(count, 3, 8, 8), torch.zeros(count, dtype=torch.int64), 0)
        assert [len(part.images) for part in made.step.parts(batch)] == expected


def test_an_objective_serves_several_runs():
    """Each has a state of its own, and the teacher stays as it is."""
    student, teacher = models.create("resnet8_aux", 4, rotations=1), models.create("resnet8", 4)
    objective = methods.DPCD(teacher)
    for amp in ("bf16", "off"):
        Trainer(student, objective, train=loader(8), test=loader(8), epochs=1, amp=amp).fit()
        assert objective.state["count"] == 0 and objective.teacher is teacher
        assert teacher.fc.weight.dtype == torch.float32


def test_a_distributed_sampler_gets_the_epoch():
    images = TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    sampler = DistributedSampler(images, num_replicas=2, rank=0)
    before = list(sampler)
    trainer(train=DataLoader(images, 4, sampler=sampler), epochs=2).fit()
    assert list(sampler) != before  # that of the second epoch


def test_a_folder_is_free_after_a_mistake(tmp_path):
    student, teacher = models.create("resnet8", 4), models.create("resnet8", 4)
    with pytest.raises(utils.UserError, match="stage 5") as kept:
        trainer(student, methods.FitNet(teacher, stage=5), folder=tmp_path)
    assert student.bn1.num_batches_tracked == 0  # the look at its stages was in evaluation mode
    trainer(student, methods.FitNet(teacher), folder=tmp_path, epochs=1).fit()
    assert kept.traceback


@pytest.mark.parametrize("changed", [{"weight_decay": 0.0}, {"nesterov": False}, {"epochs": 3}, {"temperature": 8.0}])
def test_what_shapes_a_run_is_compared_without_a_command_line(changed, tmp_path):
    """A method's constants, too."""

    def made(temperature=4.0, **settings):
        settings = {"epochs": 2, "folder": tmp_path, "schedule": lambda progress: 1.0, **settings}
        return trainer(objective=methods.KD(network(1), temperature=temperature), **settings)

    made().fit()
    with pytest.raises(utils.UserError, match=next(iter(changed))):
        made(**changed, resume=True)


def test_a_value_in_a_subclass_fixes_a_constant():
    class Soft(methods.KD):
        name, temperature = "soft", 8.0

    assert Soft(network()).temperature == 8.0 and "temperature" not in Soft.constants()


def test_dpcd_refuses_heads_of_rotations():
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="rotations=1"):
        methods.DPCD(models.create("resnet8", 4))(models.create("resnet8_aux", 4), images, labels)


def test_a_method_that_needs_numbers_refuses_batches_without():
    class Indexed(methods.Supervised):
        needs_index = True

    with pytest.raises(utils.UserError):
        Trainer(network(), Indexed(), train=loader(), test=loader(), epochs=1).fit()


DPCD = {"temperature": 3.0, "ced_temperature": 3.0, "beta": 6.0, "alpha_range": [0.5, 2.0], "warmup_epochs": 20}
DPCD |= {"ema": 0.9, "history": 2000, "threshold": 0.6, "quantile": 0.65, "slope": 18.0, "ced_beta": 8.0}
KD = {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9, "standardize": False}
DKD = {"temperature": 4.0, "alpha": 1.0, "warmup_epochs": 20, "standardize": False}
HSAKD = {"temperature": 3.0, "kd_weight": 1.0, "standardize": False}
FITNET = {"stage": 2, "feature_weight": 100.0}


def constants(script, *words):
    """Return the constants that a student script gives its method."""
    args = parsed(script, "--tcheckpoint", "t.pth", *words)
    found = methods.constants_of(args, methods.find(args.method))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


@pytest.mark.parametrize(
    ("tarch", "arch", "beta_range", "dkd_beta", "review_weight"),
    [
        ("wrn_40_2", "wrn_16_2", [5.0, 8.0], 6.0, 5.0),
        ("wrn_40_2", "ShuffleV1", [5.0, 8.0], 8.0, 5.0),
        ("vgg13_bn", "vgg8_bn", [5.0, 8.0], 6.0, 1.0),
        ("resnet56", "resnet20", [1.0, 4.0], 2.0, 0.6),
        ("resnet32x4", "resnet8x4", [6.0, 10.0], 8.0, 5.0),
        ("resnet32x4", "ShuffleV2", [6.0, 10.0], 8.0, 8.0),
        ("ResNet50", "mobilenetV2_s2", [6.0, 10.0], 8.0, 1.0),
    ],
)
def test_published_constants(tarch, arch, beta_range, dkd_beta, review_weight):
    """Those of DPCD, DKD and ReviewKD follow the families."""
    pair = ("train_student_cifar", "--tarch", f"{tarch}_aux", "--arch", f"{arch}_aux", "--method")
    expected = {"kd": KD, "hsakd": HSAKD, "fitnet": FITNET}
    expected |= {"dkd": DKD | {"beta": dkd_beta}, "dpcd": DPCD | {"beta_range": beta_range}}
    expected |= {"reviewkd": {"feature_weight": review_weight, "warmup_epochs": 20}}
    assert {name: constants(*pair, name) for name in expected} == expected


def test_imagenets_constants():
    kd = {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5}
    dkd = {"temperature": 1.0, "beta": 0.5, "warmup_epochs": 1}
    dpcd = {"temperature": 1.0, "beta": 0.5, "beta_range": [0.4, 1.0], "history": 20000, "warmup_epochs": 0}
    dpcd |= {"ced_beta": 2.0}
    expected = {"hsakd": HSAKD, "kd": KD | kd, "dkd": DKD | dkd, "dpcd": DPCD | dpcd}
    assert {name: constants("train_student_imagenet", "--method", name) for name in expected} == expected
    library = ("--arch", "torchvision/mobilenet_v2_aux", "--tarch", "torchvision/resnet34_aux", "--method", "dpcd")
    assert constants("train_student_imagenet", *library) == DPCD | dpcd
    large = ("--tarch", "resnet50_imagenet_aux", "--method", "dkd")
    assert constants("train_student_imagenet", *large)["beta"] == 2.0


def test_constants_from_python_follow_the_teachers_family():
    """Read off its `arch`; a teacher without one has the general default, and a given constant wins."""
    wrn = SimpleNamespace(arch="wrn_40_2_aux")
    assert methods.DPCD(wrn).beta_range == (5.0, 8.0) and methods.DKD(wrn).beta == 6.0
    assert methods.DPCD(network()).beta_range == (1.0, 4.0) and methods.DKD(network()).beta == 8.0
    assert methods.DKD(wrn, beta=3.0).beta == 3.0
    assert methods.DKD(nn.DataParallel(models.create("wrn_40_2", 4))).beta == 6.0
    assert methods.DKD(SimpleNamespace(arch="mine")).beta == methods.DKD(SimpleNamespace(arch=3)).beta == 8.0
    assert methods.HSSAKD().temperature == 3.0 and methods.Teacher().constants() == {}
    with pytest.raises(TypeError):
        methods.KD(network(), beta=3.0)


TERMS = {
    "hsakd": {"task", "aux_kl", "logit_kl"},
    "hsakd_dist": {"task", "aux_kl", "logit_dist"},
    "kd": {"task", "logit_kl"},
    "dkd": {"task", "teacher_path"},
    "dist": {"task", "logit_dist"},
    "wttm": {"task", "logit_kl"},
    "dpcd": {"task", "aux", "teacher_path", "self_path"},
    "fitnet": {"task", "features"},
    "crd": {"task", "features"},
    "reviewkd": {"task", "features"},
}
FLAGS = {"kd": ("--standardize",), "crd": ("--negatives", 32), "reviewkd": ("--loss-warmup", 1)}
# The state of a method that a checkpoint holds, or a part of it.
HELD = {
    "dpcd": {"c_bar", "history", "count"},
    "fitnet": {"trained.regressor.weight", "trained.regressor.bias"},
    "crd": {"student", "teacher", "labels", "trained.student.weight"},
    "reviewkd": {"trained.fusions.0.narrow.0.weight"},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", TERMS)
def test_every_method_trains_is_saved_and_resumes(tmp_path, method):
    """Its terms are logged, a checkpoint holds its state, and a resumed run is the uninterrupted one bit-exactly."""
    teacher = save_teacher(tmp_path / "teacher.pth.tar")
    arch = "resnet8_aux" if methods.find(method).networks == "auxiliary" else "resnet8"
    command = ("--arch", arch, "--tarch", "resnet8_aux", "--tcheckpoint", teacher, "--method", method, *QUICK)
    command += FLAGS.get(method, ())
    for root, *flags in (("a", "--epochs", 2), ("b", "--epochs", 1), ("b", "--epochs", 2, "--resume")):
        run("train_student_cifar", *command, *flags, "--checkpoint-dir", tmp_path / root)
    folders = [tmp_path / root / f"train_student_cifar_tarch_resnet8_aux_arch_{arch}_{SEED}" for root in "ab"]
    first, second = map(checkpoint, folders)
    assert all(same(first[part], second[part]) for part in ("net", "optimizer", "objective"))
    terms = {key.removeprefix("train/") for key in log_lines(folders[0])[0] if key.startswith("train/")}
    assert {name for name in terms if not name.endswith(("top1", "_joint", "_class"))} == {*TERMS[method], "loss"}
    held = first["objective"].keys()
    assert held >= HELD[method] if method in HELD else not held


def test_the_method_of_the_readme(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(readme_code("LogitMSE"))
    teacher = save_teacher(tmp_path / "teacher.pth.tar")
    command = ("--arch", "resnet8_aux", "--tarch", "resnet8_aux", "--tcheckpoint", teacher, *QUICK, "--epochs", 1)
    command += ("--method", tmp_path / "mine.py", "--checkpoint-dir", tmp_path)
    assert status("train_student_cifar", *command, "--mse-weight", 2, "--beta", 3) == 2
    assert "--beta" in capsys.readouterr().err
    assert status("train_student_cifar", *command, "--mse-weight", 2) == 0
    (folder,) = tmp_path.glob("train_student_cifar*")
    assert json.loads((folder / "args.json").read_text())["mse_weight"] == 2
    assert {"train/task", "train/logit_mse"} <= log_lines(folder)[0].keys()
    with pytest.raises(SystemExit):
        train_student_cifar.parse_args([str(word) for word in command] + ["--help"])
    assert "weight of the squared error (default: 0.1)" in capsys.readouterr().out
    derived = "class Larger(LogitMSE):\n    mse_weight = Constant('mean', 'how', kind=str)\n"
    (tmp_path / "mine.py").write_text(readme_code("LogitMSE") + derived)
    assert methods.find(str(tmp_path / "mine.py")).__name__ == "Larger"
    (tmp_path / "mine.py").write_text(readme_code("LogitMSE") + derived + derived.replace("Larger", "Other"))
    assert status("train_student_cifar", *command) == 2
    (tmp_path / "mine.py").write_text("from utils import what_is_not_there")
    assert status("train_student_cifar", *command) == 2


@pytest.mark.parametrize("method", ["kd", "dkd", "dpcd", "fitnet", "hsakd"])
def test_a_teacher_has_the_heads_that_the_method_reads(tmp_path, method):
    """The others take a plain teacher under its auxiliary name too, as of the teacher zoos."""
    name = "resnet14_aux" if method == "hsakd" else "resnet14"
    weights = utils.Checkpoint(save_teacher(tmp_path / "t.pth", name))
    words = ("--tarch", "resnet14_aux", "--tcheckpoint", "t.pth", "--method", method)
    teacher = methods.load_teacher(parsed("train_student_cifar", *words), weights, 10, 32)
    assert hasattr(teacher, "auxiliary_classifier") == (method == "hsakd")
    assert same(teacher.state_dict(), weights.state)
