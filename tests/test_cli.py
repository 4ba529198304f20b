"""Command lines: every script runs, every flag is read, published commands parse, every mistake is one line."""

import argparse
import importlib
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import methods
import models
import options
from scripts import QUICK, QUICK_RUN, ROOT, TRAINING, own_signal_handlers, parsed, refused, run, save_teacher, status
from training import launch

SCRIPTS = (*TRAINING, "eval_rep", "test_model")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return the folder of small random weights: a teacher, a plain backbone, a pair."""
    folder = tmp_path_factory.mktemp("weights")
    for name, arch in (("aux", "resnet8_aux"), ("backbone", "resnet8"), ("pair", "resnet8_resnet8")):
        save_teacher(folder / f"{name}.pth", arch)
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
        *(("train_student_cifar", student(weights, "--method", name, "--tag", name)) for name in methods.names()),
        ("train_student_few_shot", student(weights)),
        ("train_online_kd_cifar", ("--arch", "resnet8_resnet8")),
        ("eval_rep", ("--arch", "resnet8", "--s-path", weights / "backbone.pth")),
    ]


class Recorder(argparse.Namespace):
    """Arguments that note which of them are read."""

    read = set()

    def __getattribute__(self, name):
        if not name.startswith("_"):
            Recorder.read.add(name)
        return super().__getattribute__(name)


def flags_read(script, argv, monkeypatch):
    """Run a script, and launch it in several processes in name only; return (its flags, those that were read)."""
    module, plain = importlib.import_module(script), vars(parsed(script, *argv))
    args, Recorder.read = Recorder(**plain), set()
    with own_signal_handlers(), monkeypatch.context() as patch:
        with pytest.raises(SystemExit) as stop:
            launch.run(lambda: args, module.main)
        assert not stop.value.code
        if "world_size" in plain:
            patch.setattr("torch.distributed.run.main", lambda argv: None)
            patch.setattr("logging.disable", lambda level: None)
            patch.setenv("OMP_NUM_THREADS", "1")
            args.multiprocessing_distributed = True
            with pytest.raises(SystemExit):
                launch.run(lambda: args, module.main)
    return set(plain), set(Recorder.read)


@pytest.mark.slow
def test_every_script_runs_and_reads_every_flag(weights, tmp_path, monkeypatch):
    defined, read = {}, {}
    for script, flags in commands(weights):
        found = flags_read(script, [*QUICK_RUN, *flags, "--checkpoint-dir", tmp_path], monkeypatch)
        defined.setdefault(script, set()).update(found[0])
        read.setdefault(script, set()).update(found[1])
        (log,) = tmp_path.glob(f"{script}_*/log.jsonl")
        record = json.loads(log.rename(tmp_path / "log").read_text())
        assert record["epoch"] == 1 and math.isfinite(record["train/loss"])
    assert set(TRAINING) == {path.stem for path in ROOT.glob("train_*_*.py") if "imagenet" not in path.stem}
    # The few-shot script is the student's but for one flag, those of ImageNet are CIFAR's with other defaults.
    same_main = {f"train_{kind}_imagenet": f"train_{kind}_cifar" for kind in ("teacher", "student", "online_kd")}
    for script, twin in (same_main | {"train_student_few_shot": "train_student_cifar"}).items():
        assert importlib.import_module(script).main is importlib.import_module(twin).main
    read["train_student_few_shot"] |= read["train_student_cifar"] - {"few_ratio"}
    for script in defined:
        assert defined[script] - read[script] - {"override", "arch2"} == set(), script  # they are read while parsing


@pytest.mark.parametrize(
    ("file", "arch", "flags"), [("aux.pth", "resnet8", []), ("pair.pth", "resnet8_resnet8", ["--net", "2"])]
)
def test_test_model(file, arch, flags, weights, monkeypatch, capsys):
    argv = [*QUICK, "--arch", arch, "--student-weights", weights / file, "--json", *flags]
    defined, read = flags_read("test_model", argv, monkeypatch)
    assert not defined - read - {"script"}
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 360 and 0 <= result["top1"] <= result["top5"] <= 100
    assert sum(name.endswith("_joint") for name in result) == (0 if arch == "resnet8" else 3)
    backbone, with_heads = (result[part]["parameters"] for part in ("backbone", "with_heads"))
    assert (with_heads > backbone) == (arch != "resnet8")
    assert backbone == sum(p.numel() for p in models.create("resnet8", 10).parameters())


PUBLISHED = r"""
python test_model.py --arch wrn_16_2_aux --student-weights ./checkpoint/train_student_cifar_tarch_wrn_40_2_aux_arch_wrn_16_2_aux_dataset_cifar100_seed0/wrn_16_2_aux_best.pth.tar
python train_baseline_cifar.py --arch vgg8 --data ./data/  --gpu 0
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


@pytest.mark.parametrize("script", TRAINING)
def test_spellings_of_flags_and_folder_names(script):
    """Abbreviated as the published commands are; with `-` for `_` and the reverse."""
    needed = ["--tcheckpoint", "t.pth"] if "student" in script else []
    published = ["--gpu", "0", "--manual", "3", "--batch-size", "8", "--dataset", "CIFAR-100", "--checkpoint-dir", "c"]
    args = parsed(script, *needed, *published)
    other = ["--gpu_id", "0", "--manual-seed=3", "--batch_size=8", "--dataset", "cifar_100", "--checkpoint_dir", "c"]
    assert parsed(script, *needed, *other) == args
    assert options.run_folder(parsed(script, *needed, *published, "--tag", "x")) == f"{options.run_folder(args)}_x"


FOLDERS = """
train_student_cifar_tarch_wrn_40_2_aux_arch_wrn_16_2_aux_dataset_cifar100_seed0
train_student_few_shot_tarch_wrn_40_2_aux_arch_wrn_16_2_aux_dataset_cifar100_few_ratio_0.25_seed0
train_student_imagenet_tarch_resnet34_aux_arch_resnet18_aux_dataset_imagenet_seed0
"""


@pytest.mark.parametrize("name", FOLDERS.split())
def test_folder_names_are_the_published_ones(name):
    assert Path(options.run_folder(parsed(name.partition("_tarch")[0], "--tcheckpoint", "t.pth"))).name == name


@pytest.mark.parametrize("words", ["--lr --init-lr", "--seed --manual_seed", "--workers=4 --num-workers"])
def test_flags_of_other_projects_are_answered(words, capsys):
    flag, ours = words.split()
    assert refused(capsys, flag, "1").endswith(f" {ours}")


# Of the words in a line each, the last flag is the one that the error names.
BAD_VALUES = """
--epochs 0; --epochs many; --milestones 5 3; --init-lr nan; --weight-decay -1; --manual_seed -1; --val-split 1
--gpu-id none; --amp nonsense; --nonsense 1; --tag a/b; --optimizer adamw --nesterov; --override init_lr=1
--arch resnet8_resnet8; --few-ratio 0; --class-names no/such/file; --world-size 2; --rank 1
--dataset digits --image-size 16; --dataset stl10 --in-memory; --dataset cifar10 --resize pad; --in-memory --from-files
--mean 0.5 0.4; --mean 125; --std 0; --std 0.2 --mean auto; --pretrained-backbone=; --test-split 1
"""
METHOD_MISTAKES = """
--method kd --ced-beta 3; --method kd --ema 0.9; --method mine; --method mine.py; --method supervised; --kd_T 0
--arch resnet8; --tarch resnet8; --tarch resnet8_resnet8; --arch resnet8_resnet8; --few-ratio 1.5; --net 3
--arch torchvision/resnet18; --method kd --recipe plus
"""
MISTAKES = [(words, False) for words in re.split("[;\n] *", BAD_VALUES.strip())]
MISTAKES += [(words, True) for words in re.split("[;\n] *", METHOD_MISTAKES.strip())]


@pytest.mark.parametrize(("words", "distils"), MISTAKES)
def test_impossible_values(words, distils, weights, capsys):
    flag = re.findall("--[a-z_A-Z-]+", words)[-1]
    script, needed = ("train_student_few_shot", student(weights)) if distils else ("train_baseline_cifar", ())
    assert flag in refused(capsys, *needed, *words.split(), script=script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_names_are_answered_with_the_nearest(script, capsys):
    assert "wrn_16_2_aux" in refused(capsys, "--arch", "wrn_16_3_aux", script=script)
    assert "cifar100," in refused(capsys, "--dataset", "cifar1000", script=script)


def test_one_process_of_a_machine_prints_a_mistake(monkeypatch, capsys):
    """torchrun starts them all with the same words."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert status("train_baseline_cifar", "--epochs", "0") == 2 and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("train_student_cifar", [], "--tcheckpoint"),
        ("test_model", [], "--student-weights"),
        ("test_model", ["--student-weights", "w.pth", "--mean", "auto"], "--mean auto"),
        ("train_teacher_cifar", ["--arch", "resnet8"], "resnet8_aux"),
        ("train_teacher_cifar", ["--freezed"], "--pretrained-backbone"),
        ("train_online_kd_cifar", ["--arch", "resnet8_aux"], "resnet8_resnet8"),
        ("eval_rep", ["--arch", "resnet18_imagenet", "--s-path", "w.pth"], "resnet18_imagenet"),
    ],
)
def test_mistakes_of_one_script(script, words, said, capsys):
    assert said in refused(capsys, *words, script=script)


def file_mistakes(weights, folder):
    """Return (script, flags, what the line says) of every wrong file."""
    (folder / "corrupt.pth").write_bytes((weights / "aux.pth").read_bytes()[:5000])
    for name in ("no.pth", "corrupt.pth"):
        yield "train_student_cifar", [*student(weights), "--tcheckpoint", folder / name], name
        yield "test_model", ["--arch", "resnet8_aux", "--student-weights", folder / name], name
        frozen = ["--arch", "resnet8_aux", "--freezed", "--pretrained-backbone", folder / name]
        yield "train_teacher_cifar", frozen, name
        yield "eval_rep", ["--arch", "resnet8", "--s-path", folder / name], name
    yield "test_model", ["--arch", "resnet14_aux", "--student-weights", weights / "aux.pth"], "missing: backbone."
    yield "test_model", ["--arch", "resnet8", "--student-weights", weights / "aux.pth", "--net", "2"], "--net 2"
    yield "test_model", ["--arch", "resnet8", "--student-weights", weights / "aux.pth", "--weights-key", "x"], "'x'"
    yield "train_student_cifar", [*student(weights), "--tarch", "wrn_16_1_aux"], "unexpected: "
    yield "train_baseline_cifar", ["--arch", "resnet8", "--few-ratio", "0.001"], "stratified"
    yield "train_baseline_cifar", ["--arch", "resnet8", "--dataset", "imagefolder", "--data", folder / "no"], "put them"


def test_wrong_files(weights, tmp_path, capsys):
    for script, words, said in file_mistakes(weights, tmp_path):
        training = [] if script == "test_model" else ["--epochs", "1", "--checkpoint-dir", tmp_path / "runs"]
        assert said in refused(capsys, *QUICK, *training, *words, script=script)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("differs", [{"class_names": list("abcdefghij")}, {"size": 48}, {}])
def test_weights_of_other_classes_or_sizes_are_warned_of(differs, weights, tmp_path, capsys):
    info = {"dataset": "digits", "class_names": list("0123456789"), "size": 32, **differs}
    torch.save({**torch.load(weights / "backbone.pth", weights_only=True), "info": info}, tmp_path / "w.pth")
    run("test_model", *QUICK, "--arch", "resnet8", "--student-weights", tmp_path / "w.pth")
    argv = [*QUICK_RUN, "--arch", "resnet8", "--tarch", "resnet8", "--method", "kd", "--checkpoint-dir", tmp_path]
    run("train_student_cifar", *argv, "--tcheckpoint", tmp_path / "w.pth")
    assert capsys.readouterr().err.count("w.pth: trained on") == 2 * len(differs)
