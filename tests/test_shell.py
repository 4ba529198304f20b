"""Every line of every .sh file: it parses, and the weights it reads are those that a training line writes."""

import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest

import models
import options

ROOT = Path(__file__).resolve().parent.parent
FILES = ["test_model.sh", *sorted(f"scripts/{path.name}" for path in ROOT.glob("scripts/*_*.sh"))]
WEIGHTS = ("tcheckpoint", "student_weights", "s_path", "pretrained_backbone")
STUB = '#!/bin/sh\nfor word; do printf "%s\\t" "$word"; done\necho\n'


def run_files(folder, *flags, **environment):
    """Return {.sh file: [parsed arguments of a line]}; `folder` gets a stand-in for python that prints its words."""
    (folder / "python").write_text(STUB)
    (folder / "python").chmod(0o755)
    known = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), **environment}
    found = {}
    for name in FILES:
        done = subprocess.run(["bash", ROOT / name, *flags], capture_output=True, text=True, env=known, cwd=folder)
        assert done.returncode == 0 and done.stdout and not done.stderr, name
        found[name] = [parse(*line.rstrip("\t").split("\t")) for line in done.stdout.splitlines()]
    return found


def parse(script, *words):
    """Return the arguments as the script itself reads them; a line that it rejects fails the test."""
    try:
        return importlib.import_module(script.removesuffix(".py")).parse_args(words)
    except SystemExit:
        pytest.fail(f"{script} {' '.join(words)}: rejected")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Return `run_files` of the files called without flags."""
    return run_files(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def written(commands):
    """Return {path of weights: arguments of the training line that writes them}."""
    files = {}
    for args in (args for lines in commands.values() for args in lines if hasattr(args, "checkpoint_dir")):
        folder = Path(args.checkpoint_dir) / options.run_name(args)
        for name in (f"{args.arch}.pth.tar", f"{args.arch}_best.pth.tar"):
            assert files.setdefault(folder / name, args) is args, f"two lines write {folder / name}"
    return files


def test_flags_and_environment_reach_every_line(commands, tmp_path):
    found = run_files(tmp_path, "--amp", "bf16", DATA="elsewhere", WEIGHTS="")
    for name, lines in found.items():
        assert len(lines) == len(commands[name])
        assert all(args.amp == "bf16" and args.data.startswith("elsewhere") for args in lines)
    assert not any("_best" in args.student_weights for args in found["test_model.sh"])


def test_weights_read_are_weights_written(commands, written):
    """Every path of weights is one that a training line writes, of the architecture that the reader takes it for."""
    for args in (args for lines in commands.values() for args in lines):
        for flag in WEIGHTS:
            path = Path(getattr(args, flag, None) or "pretrained_backbones/none")
            if path.parts[0] != "pretrained_backbones":
                assert path in written, f"no line of a .sh file writes {path}"
                arch = args.tarch if flag == "tcheckpoint" else args.arch
                assert models.backbone_name(written[path].arch) == models.backbone_name(arch)


def test_teachers_fit_the_methods(commands, written):
    """HSAKD's teachers have heads of four views, DPCD's of one; the tag says whether a teacher is frozen."""
    for args in commands["scripts/train_student_cifar.sh"]:
        teacher = written[Path(args.tcheckpoint)]
        if args.method == "hsakd":
            assert teacher.rotations == 4 and teacher.freezed == (args.tag == "freezed")
        elif args.method == "dpcd":
            assert teacher.rotations == 1 and args.tcheckpoint.endswith("_best.pth.tar")


def test_learning_rates_are_the_recipes(commands):
    """0.01 for the light networks, 0.05 for the others, 0.1 for linear classifiers and ImageNet."""
    for args in (args for lines in commands.values() for args in lines if hasattr(args, "init_lr")):
        light = any(part in args.arch.lower() for part in ("mobilenet", "mbv2", "shuffle"))
        usual = 0.1 if args.script == "eval_rep" or args.dataset == "imagenet" else 0.01 if light else 0.05
        assert args.init_lr == usual, args.arch


def test_every_published_row_has_a_line(commands):
    """The pairs and networks of the published tables are those of the files."""
    table = json.loads((ROOT / "results" / "published_results.json").read_text())

    def plain(name):
        return models.backbone_name(name).removesuffix("_bn")

    lines = {name.removeprefix("scripts/").removesuffix(".sh"): found for name, found in commands.items()}
    rows = (("hsakd", None, "offline"), ("hsakd", "freezed", "offline"), ("kd", "kd", "offline"), ("dpcd", "dpcd", ""))
    for method, tag, block in rows:
        students = [args for args in lines["train_student_cifar"] if (args.method, args.tag) == (method, tag)]
        published = table["cifar100_offline" if block else "dpcd_cifar100"]["columns"]
        assert [f"{plain(args.tarch)}->{plain(args.arch)}" for args in students] == published
    assert [plain(args.arch) for args in lines["train_online_kd_cifar"]] == table["cifar100_online"]["columns"]
    ratios = [args.few_ratio for args in lines["train_student_few_shot"]]
    assert ratios == table["cifar100_few_shot_resnet56->resnet20"]["ratio"]
    assert {args.dataset for args in lines["eval_rep"]} == {"stl10", "tinyimagenet"}


def test_every_written_best_is_tested(commands, written):
    """test_model.sh names every network that the CIFAR files train."""
    tested = {Path(args.student_weights) for args in commands["test_model.sh"]}
    trained = {path for path, args in written.items() if args.dataset == "cifar100" and "_best" in path.name}
    assert tested == trained
