"""Command lines: every script runs, every flag is read, published commands parse, every mistake is one line."""

import argparse
import importlib
import json
import math
import os
import shlex
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scripts
import step
import torch
from scripts import QUICK, QUICK_RUN, TRAINING, WORLD, own_signal_handlers, parsed, save_teacher, status

import distributed
import launcher
import loading
import losses
import methods
import models
import runs
import utils

SCRIPTS = (*TRAINING, "eval_rep", "test_model")
ROOT = Path(__file__).parents[1]
# What torchrun sets for the first of two processes.
ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "2222"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return the folder of small random weights: a teacher, a plain backbone, a pair."""
    folder = tmp_path_factory.mktemp("weights")
    save_teacher(folder / "aux.pth")
    save_teacher(folder / "backbone.pth", "resnet8")
    save_teacher(folder / "pair.pth", "resnet8_resnet8")
    return folder


def student(weights, *more):
    """Return the flags of a student of the small teacher."""
    return ("--arch", "resnet8_aux", "--tarch", "resnet8_aux", "--tcheckpoint", weights / "aux.pth", *more)


def commands(weights):
    """Return (script, flags) of runs that between them use every script and method."""
    frozen = ("--freezed", "--pretrained-backbone", weights / "backbone.pth")
    return [
        ("train_baseline_cifar", ("--arch", "resnet8", "--few-ratio", "0.5")),
        ("train_teacher_cifar", ("--arch", "resnet8_aux")),
        ("train_teacher_cifar", ("--arch", "resnet8_aux", *frozen, "--tag", "frozen")),
        ("train_teacher_cifar", ("--arch", "resnet8_aux", "--rotations", "1", "--tag", "one_view")),
        *(("train_student_cifar", student(weights, "--method", name, "--tag", name)) for name in methods.METHODS),
        ("train_student_few_shot", student(weights)),
        ("train_online_kd_cifar", ("--arch", "resnet8_resnet8")),
        ("eval_rep", ("--arch", "resnet8", "--s-path", weights / "backbone.pth")),
    ]


def test_no_training_script_is_left_out():
    """The ImageNet scripts have tests of their own, on images of that kind."""
    assert {path.stem for path in ROOT.glob("train_*.py") if "imagenet" not in path.stem} == set(TRAINING)


class Recorder(argparse.Namespace):
    """Arguments that note which of them are read."""

    read = set()

    def __getattribute__(self, name):
        if not name.startswith("_"):
            Recorder.read.add(name)
        return super().__getattribute__(name)


def flags_read(script, argv, monkeypatch):
    """Run a script in one process, and relaunch it in several in name only; return (its flags, those read)."""
    module, plain = importlib.import_module(script), vars(parsed(script, *argv))
    args = Recorder(**plain)
    Recorder.read = set()
    with own_signal_handlers(), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        module.main(args, distributed.setup(args))
        if "dist_url" in plain:
            patch.setattr("torch.distributed.run.main", lambda argv: None)
            patch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
            for name, value in ENVIRONMENT.items():
                patch.setenv(name, value)
            patch.setattr("logging.disable", lambda level: None)
            patch.setenv("OMP_NUM_THREADS", "1")
            distributed.setup(args)
            for name in ENVIRONMENT:
                patch.delenv(name)
            distributed.run(lambda: args, lambda *_: None)
            args.multiprocessing_distributed = True
            with pytest.raises(SystemExit):
                distributed.run(lambda: args, lambda *_: None)
            assert launcher.PID not in os.environ  # else processes of a later launcher would take it for their parent
    return set(plain), set(Recorder.read)


def test_every_script_runs_and_reads_every_flag(weights, tmp_path, monkeypatch, capsys):
    defined, read = {}, {}
    for script, flags in commands(weights):
        found = flags_read(script, [*QUICK_RUN, *flags, "--checkpoint-dir", tmp_path], monkeypatch)
        defined.setdefault(script, set()).update(found[0])
        read.setdefault(script, set()).update(found[1])
        (log,) = [path for path in tmp_path.glob(f"{script}_*/log.jsonl") if path.stat().st_size]
        log.rename(tmp_path / "log")
        record = json.loads((tmp_path / "log").read_text())
        assert record["epoch"] == 1 and math.isfinite(record["train/loss"])
    capsys.readouterr()
    # The few-shot script is the student's but for one flag, those of ImageNet are CIFAR's with other defaults.
    same_main = {f"train_{kind}_imagenet": f"train_{kind}_cifar" for kind in ("teacher", "student", "online_kd")}
    for script, twin in (same_main | {"train_student_few_shot": "train_student_cifar"}).items():
        assert importlib.import_module(script).main is importlib.import_module(twin).main
    read["train_student_few_shot"] |= read["train_student_cifar"] - {"few_ratio"}
    # Flags of ImageNet's input pipeline, which the parsers share; `finish` refuses them for every other data set.
    imagenet = {"decode", "skip_bad_images"}
    for script in defined:
        assert defined[script] - read[script] - imagenet == set(), script


@pytest.mark.parametrize(
    ("file", "arch", "flags"),
    [
        ("aux.pth", "resnet8_aux", ["--export-backbone", "exported.pth"]),
        ("backbone.pth", "resnet8", []),
        ("aux.pth", "resnet8", []),
        ("pair.pth", "resnet8_resnet8", ["--net", "2"]),
    ],
)
def test_test_model(file, arch, flags, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*QUICK, "--arch", arch, "--student-weights", weights / file, "--json", *flags]
    defined, read = flags_read("test_model", argv, monkeypatch)
    assert not defined - read - {"script", "decode", "skip_bad_images"}
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 360 and 0 <= result["top1"] <= result["top5"] <= 100
    heads = {name for name in result if name.startswith("aux")}
    assert len(heads) == (0 if arch == "resnet8" else 6)
    with_heads, backbone = result["with_heads"], result["backbone"]
    assert (with_heads["parameters"] > backbone["parameters"]) == (arch != "resnet8")
    assert backbone["parameters"] == sum(p.numel() for p in models.create("resnet8", 10).parameters())
    if flags[:1] == ["--export-backbone"]:
        network = models.create("resnet8", 10)
        utils.load_weights(network, "exported.pth")
        start = torch.load(weights / file, weights_only=True)["net"]
        assert all(torch.equal(value, start[f"backbone.{key}"]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("acc", [76.5, torch.tensor(76.5), np.array([76.5])])
def test_recorded_numbers_may_be_arrays_of_one(acc):
    content = {"net": {}, "epoch": 239, "acc": acc}
    assert utils.recorded(content) == {"recorded_epoch": 239, "recorded_acc": 76.5}
    assert utils.recorded({"acc": "none", "epoch": None}) == {}


def test_test_model_prints_lines_for_a_reader(weights, capsys):
    scripts.run("test_model", *QUICK, "--arch", "resnet8_aux", "--student-weights", weights / "aux.pth")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("top1: ") for line in lines) and any("M multiply-adds" in line for line in lines)


PUBLISHED = r"""
python test_model.py --arch wrn_16_2_aux --student-weights ./checkpoint/train_student_cifar_tarch_wrn_40_2_aux_arch_wrn_16_2_aux_dataset_cifar100_seed0/wrn_16_2_aux_best.pth.tar
python train_student_few_shot.py --tarch resnet56_aux --arch resnet20_aux --tcheckpoint ./checkpoint/train_teacher_cifar_arch_resnet56_aux_dataset_cifar100_seed0/resnet56_aux.pth.tar --checkpoint-dir ./checkpoint --data ./data/ --few-ratio 0.25 --gpu 2 --manual 0
python eval_rep.py --arch mobilenetV2 --dataset STL-10 --data ./data/ --s-path ./checkpoint/train_student_cifar_tarch_vgg13_bn_aux_arch_mobilenetV2_aux_dataset_cifar100_seed0/mobilenetV2_aux.pth.tar
python eval_rep.py --arch mobilenetV2 --dataset TinyImageNet --data ./data/tiny-imagenet-200/ --s-path ./checkpoint/train_student_cifar_tarch_vgg13_bn_aux_arch_mobilenetV2_aux_dataset_cifar100_seed0/mobilenetV2_aux.pth.tar
python train_teacher_imagenet.py --dist-url 'tcp://127.0.0.1:55515' --data ./data/ImageNet/ --dist-backend 'nccl' --multiprocessing-distributed --checkpoint-dir ./checkpoint/ --pretrained-backbone ./pretrained_backbones/resnet34-333f7ec4.pth --freezed --gpu 0,1,2,3,4,5,6,7 --world-size 1 --rank 0 --manual_seed 0
python train_teacher_imagenet.py --dist-url 'tcp://127.0.0.1:2222' --data ./data/ImageNet/ --dist-backend 'nccl' --multiprocessing-distributed --checkpoint-dir ./checkpoint/ --gpu 0,1,2,3,4,5,6,7 --world-size 1 --rank 0 --manual_seed 1
python train_student_imagenet.py --data ./data/ImageNet/ --arch resnet18_imagenet_aux --tarch resnet34_imagenet_aux --tcheckpoint ./checkpoint/train_teacher_imagenet_arch_resnet34_aux_dataset_imagenet_seed0/resnet34_imagenet_aux_best.pth.tar --dist-url 'tcp://127.0.0.1:2222' --dist-backend 'nccl' --multiprocessing-distributed --gpu-id 0,1,2,3,4,5,6,7 --world-size 1 --rank 0 --manual_seed 0
python train_student_imagenet.py --data ./data/ImageNet/ --arch resnet18_imagenet_aux --tarch resnet34_imagenet_aux --tcheckpoint ./checkpoint/train_teacher_imagenet_arch_resnet34_aux_dataset_imagenet_seed1/resnet34_imagenet_aux_best.pth.tar --dist-url 'tcp://127.0.0.1:2222' --dist-backend 'nccl' --multiprocessing-distributed --gpu-id 0,1,2,3,4,5,6,7 --world-size 1 --rank 0 --manual_seed 1
python train_online_kd_imagenet.py --data ./data/ImageNet/ --arch resnet18_resnet18 --dist-url 'tcp://127.0.0.1:2222' --dist-backend 'nccl' --multiprocessing-distributed --gpu-id 0,1,2,3,4,5,6,7 --world-size 1 --rank 0
"""  # noqa: E501


@pytest.mark.parametrize("line", PUBLISHED.strip().splitlines())
def test_published_commands_parse_as_written(line):
    _, script, *argv = shlex.split(line)
    args = vars(parsed(script.removesuffix(".py"), *argv))
    expected = {"--gpu": "gpu_id", "--manual": "manual_seed"}
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag.startswith("--"):
            found = args[expected.get(flag, flag.strip("-").replace("-", "_"))]
            if flag == "--dataset":
                value = value.lower().replace("-", "")
            assert found is True if value.startswith("--") or not value else str(found) == value


def test_published_commands_values():
    test, few_shot = (shlex.split(line) for line in PUBLISHED.strip().splitlines()[:2])
    args = parsed("test_model", *test[2:])
    assert args.arch == "wrn_16_2_aux" and args.student_weights.endswith("wrn_16_2_aux_best.pth.tar")
    assert (args.dataset, args.data, args.gpu_id) == ("cifar100", "./data", None)
    args = parsed("train_student_few_shot", *few_shot[2:])
    assert (args.gpu_id, args.manual_seed, args.few_ratio) == ("2", 0, 0.25)
    assert runs.run_name(args.script, args) == (
        "train_student_few_shot_tarch_resnet56_aux_arch_resnet20_aux_dataset_cifar100_few_ratio_0.25_seed0"
    )


@pytest.mark.parametrize("script", TRAINING)
def test_published_abbreviations_and_folder_names(script):
    words = ["--gpu", "0", "--manual", "3", "--dataset", "CIFAR-100", "--data", "./data/", "--checkpoint-dir", "./c"]
    args = parsed(script, *words, *(["--tcheckpoint", "t.pth"] if "student" in script else []))
    assert (args.gpu_id, args.manual_seed, args.dataset, args.checkpoint_dir) == ("0", 3, "cifar100", "./c")
    name = runs.run_name(args.script, args)
    assert name.startswith(f"{script}_") and name.endswith("_seed3") and "dataset_cifar100" in name
    assert runs.run_name(args.script, argparse.Namespace(**{**vars(args), "tag": "x"})) == f"{name}_x"


def test_folder_name_is_the_published_one():
    args = parsed("train_student_cifar", "--tcheckpoint", "t.pth")
    expected = "train_student_cifar_tarch_wrn_40_2_aux_arch_wrn_16_2_aux_dataset_cifar100_seed0"
    assert runs.run_name(args.script, args) == expected


@pytest.mark.parametrize(("given", "rate"), [((), "0.05"), (("--init-lr", "0.02"), "0.02")])
def test_learning_rate_is_printed(given, rate, tmp_path, capsys):
    scripts.run("train_baseline_cifar", *QUICK_RUN, "--arch", "resnet8", "--checkpoint-dir", tmp_path, *given)
    assert f": lr {rate}, float32, " in capsys.readouterr().out


def one_line(script, argv, capsys):
    """Return the one line that a mistaken command ends in, with status 2."""
    assert status(script, *argv) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line != "no GPU found: running on the CPU"]
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), error
    return lines[0]


BAD_VALUES = [
    ("--epochs", "0"),
    ("--epochs", "many"),
    ("--batch-size", "-1"),
    ("--batch-size", str(2**31)),
    ("--milestones", "5", "3"),
    ("--milestones", "0"),
    ("--init-lr", "0"),
    ("--init-lr", "nan"),
    ("--weight-decay", "-1"),
    ("--warmup-epoch", "-2"),
    ("--num-workers", "-1"),
    ("--manual_seed", "-1"),
    ("--manual_seed", str(2**70)),
    ("--val-split", "1"),
    ("--limit-batches", "0"),
    ("--accumulate", "0"),
    ("--gpu-id", "none"),
    ("--gpu-id", "²"),
    ("--amp", "nonsense"),
    ("--dist-backend", "mpi"),
    ("--world-size", "0"),
    ("--checkpoint-dir", ""),
    ("--nonsense", "1"),
]


@pytest.mark.parametrize("words", BAD_VALUES, ids=" ".join)
def test_impossible_values(words, capsys):
    assert words[0] in one_line("train_baseline_cifar", words, capsys)


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_names_are_answered_with_the_nearest(script, capsys):
    text = one_line(script, ["--arch", "wrn_16_3_aux"], capsys)
    assert "wrn_16_3_aux" in text and "wrn_16_2_aux" in text
    text = one_line(script, ["--dataset", "cifar1000"], capsys)
    assert "cifar1000" in text and "cifar100," in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dist-url", "tcp://127.0.0.1:99999"], "expected tcp://HOST:PORT"),
        (["--dist-url", "tcp://:2222"], "expected tcp://HOST:PORT"),
        (["--dist-url", "file:///tmp/x"], "expected tcp://HOST:PORT"),
        (["--rank", "1"], "--rank 1: expected a machine's number below --world-size 1"),
    ],
)
def test_addresses_of_machines(words, said, capsys):
    assert said in one_line("train_baseline_cifar", ["--multiprocessing-distributed", *words], capsys)


def test_one_process_of_a_machine_tells_a_mistake(monkeypatch, capsys):
    """torchrun starts them all with the same words."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert status("train_baseline_cifar", "--epochs", "0") == 2 and not capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "--epochs" in one_line("train_baseline_cifar", ["--epochs", "0"], capsys)


METHOD_MISTAKES = [
    (["--method", "hsakd", "--slope", "3"], "--slope has no part in --method hsakd"),
    (["--method", "kd", "--ced-beta", "3"], "--ced-beta has no part"),
    (["--method", "dpcd", "--ce-weight", "1"], "--ce-weight has no part"),
    (["--method", "mine"], "--method: invalid choice: 'mine'"),
    (["--method", "dpcd", "--beta-range", "5", "3"], "--beta-range: 5 is above 3"),
    (["--method", "dpcd", "--ema", "1.5"], "--ema: expected a number of at least 0 and below 1, got '1.5'"),
    (["--method", "dpcd", "--quantile", "2"], "--quantile: expected a share above 0 and at most 1, got '2'"),
    (["--method", "dpcd", "--history", "0"], "--history: expected a whole number from 1"),
    (["--kd_T", "0"], "--kd_T: expected a number above 0, got '0'"),
    (["--arch", "resnet8"], "use one such as resnet8_aux"),
    (["--tarch", "resnet8"], "--tarch resnet8 has no auxiliary"),
    (["--tarch", "resnet8_resnet8"], "mutual pair"),
]


@pytest.mark.parametrize(("words", "said"), METHOD_MISTAKES, ids=[" ".join(words) for words, _ in METHOD_MISTAKES])
def test_methods_flags(words, said, weights, capsys):
    assert said in one_line("train_student_cifar", [*student(weights), *words], capsys)


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("train_student_cifar", [], "--tcheckpoint"),
        ("test_model", [], "--student-weights"),
        ("train_student_few_shot", ["--tcheckpoint", "t", "--few-ratio", "1.5"], "--few-ratio"),
        ("train_student_few_shot", ["--tcheckpoint", "t", "--few-ratio", "0"], "--few-ratio"),
        ("train_teacher_cifar", ["--arch", "resnet8"], "resnet8_aux"),
        ("train_teacher_cifar", ["--freezed"], "--pretrained-backbone"),
        ("train_teacher_cifar", ["--rotations", "3"], "--rotations"),
        ("train_baseline_cifar", ["--arch", "resnet8_resnet8"], "train_online_kd_cifar.py"),
        ("train_online_kd_cifar", ["--arch", "resnet8_aux"], "resnet8_resnet8"),
    ],
)
def test_mistakes_of_one_script(script, words, said, capsys):
    assert said in one_line(script, words, capsys)


def file_mistakes(weights, folder):
    """Return (name, command, what the line says) of every wrong file."""
    (folder / "corrupt.pth").write_bytes((weights / "aux.pth").read_bytes()[:5000])
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").write_bytes(b"")
    for number, name in enumerate(["no.pth", "corrupt.pth", "text.pth", "empty.pth"]):
        said = "no such file" if number == 0 else name
        yield "train_student_cifar", [*student(weights), "--tcheckpoint", folder / name], said
        yield "test_model", ["--arch", "resnet8_aux", "--student-weights", folder / name], said
        frozen = ["--arch", "resnet8_aux", "--freezed", "--pretrained-backbone", folder / name]
        yield "train_teacher_cifar", frozen, said
    for arch, said in (("resnet14_aux", "missing: backbone."), ("wrn_16_1_aux", "unexpected: ")):
        yield "test_model", ["--arch", arch, "--student-weights", weights / "aux.pth"], said
        yield "train_student_cifar", [*student(weights), "--tarch", arch], said
    yield "test_model", ["--arch", "resnet8_aux", "--student-weights", weights / "backbone.pth"], "missing: "
    for name in ("backbone.pth", "c.pth.tmp"):
        shutil.copy(weights / "backbone.pth", folder / name)
    # Exports into a folder that is not there, onto the weights themselves, and through a temporary file that is the weights.
    for name, out, said in (
        ("backbone.pth", folder / "none" / "b.pth", "cannot write"),
        ("backbone.pth", folder / ".." / folder.name / "backbone.pth", "would overwrite"),
        ("c.pth.tmp", folder / "c.pth", "would overwrite"),
    ):
        yield "test_model", ["--arch", "resnet8", "--student-weights", folder / name, "--export-backbone", out], said
    yield "train_baseline_cifar", ["--arch", "resnet8", "--tag", "a/b"], "expected letters, digits and any of"
    yield "train_baseline_cifar", ["--arch", "resnet8", "--few-ratio", "0.001"], "stratified"
    imagefolder = ["--arch", "resnet8", "--dataset", "imagefolder", "--data", folder / "nowhere"]
    yield "train_baseline_cifar", imagefolder, "put them at"


def test_wrong_files(weights, tmp_path, capsys):
    for script, words, said in file_mistakes(weights, tmp_path):
        training = [] if script == "test_model" else ["--epochs", "1", "--checkpoint-dir", tmp_path / "runs"]
        text = one_line(script, [*QUICK, *training, *words], capsys)
        assert said in text, text
    assert not (tmp_path / "runs").exists()


def test_weights_of_other_classes_or_sizes(weights, tmp_path, capsys):
    content = torch.load(weights / "aux.pth", weights_only=True)
    for classes, size, warned in ((map(str, range(10)), 32, False), ("abcdefghij", 48, True)):
        data = {"classes": loading.class_digest(classes), "size": size}
        torch.save({**content, "dataset": "imagefolder", "data": data}, tmp_path / "w.pth")
        scripts.run("test_model", *QUICK, "--arch", "resnet8_aux", "--student-weights", tmp_path / "w.pth")
        args = parsed("train_student_cifar", *student(weights), "--tcheckpoint", tmp_path / "w.pth")
        methods.create_pair(args, scripts.seen(10))
        words = ["--arch", "resnet8_aux", "--checkpoint-dir", tmp_path / str(warned)]
        scripts.run("train_teacher_cifar", *scripts.QUICK_RUN, *words, "--pretrained-backbone", tmp_path / "w.pth")
        told = capsys.readouterr().err
        assert told.count("w.pth: trained on the classes of another data set (imagefolder)") == 3 * warned, told
        assert told.count("w.pth: trained on images of 48 pixels a side, not 32") == 3 * warned, told


def test_names_with_line_breaks(monkeypatch, capsys):
    monkeypatch.setattr("train_baseline_cifar.main", mock.Mock(side_effect=utils.UserError("a class\nof two\nlines")))
    assert "error: a class of two lines" in one_line("train_baseline_cifar", [], capsys)
    assert "unrecognized arguments: a b" in one_line("train_baseline_cifar", ["a\nb"], capsys)


def test_memory_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr("train_baseline_cifar.main", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    assert "can't allocate memory" in one_line("train_baseline_cifar", [], capsys)


@pytest.mark.parametrize("script", ["train_baseline_cifar", "test_model"])
def test_gpu_that_is_not_there(script, weights, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    words = ["--student-weights", weights / "aux.pth"] if script == "test_model" else []
    assert "--gpu-id 99: no GPU 99 here" in one_line(script, [*words, "--gpu-id", "99"], capsys)


def test_no_gpu_at_all_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.setup(argparse.Namespace(gpu_id="3")) == WORLD
    assert capsys.readouterr().err == "no GPU found: running on the CPU\n"


@pytest.mark.parametrize(("tarch", "arch"), step.PAIRS)
def test_published_pairs_take_a_step(tarch, arch, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(methods, "load_teacher", lambda args, images: models.create(args.tarch, len(images.classes)))
    args = parsed("train_student_cifar", "--tarch", tarch, "--arch", arch, "--tcheckpoint", "t.pth")
    network, objective = methods.create_pair(args, scripts.seen(100))
    assert isinstance(objective, losses.HSAKDLoss)
    terms = objective(network, torch.randn(2, 3, 32, 32), torch.tensor([3, 99]))
    sum(terms.values()).backward()
    assert list(terms) == ["task", "aux_kl", "logit_kl"] and all(term.isfinite() for term in terms.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert all(p.grad is None for p in objective.teacher.parameters())
