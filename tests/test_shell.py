"""Every line of every .sh file: it parses, and the weights it reads are those that a training line writes."""

import functools
import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest

import models
import runs

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.sh"))
WEIGHTS = ("tcheckpoint", "student_weights", "s_path", "pretrained_backbone")
STUB = '#!/bin/sh\nfor word; do printf "%s\\t" "$word"; done\necho\n'


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Return `lines_of` the files called without flags."""
    return lines_of(tmp_path_factory.mktemp("bin"))


def lines_of(folder, *flags, **environment):
    """Return {.sh file: [parsed arguments of a line]} of the files called with `flags`; `folder` gets a stand-in for python."""
    for name in ("python", "python3"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    known = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), **environment}
    found = {}
    for name in SCRIPTS:
        done = subprocess.run(["bash", ROOT / name, *flags], capture_output=True, text=True, env=known, check=True)
        lines = [line.rstrip("\t").split("\t") for line in done.stdout.splitlines()]
        assert lines and not done.stderr
        found[name] = [parse(script, argv) for script, *argv in lines]
    return found


def test_flags_go_to_every_line(commands, tmp_path):
    for name, lines in lines_of(tmp_path, "--amp", "bf16").items():
        assert len(lines) == len(commands[name]) and all(args.amp == "bf16" for args in lines), name


def test_either_weights_of_a_run_can_be_tested(commands, tmp_path):
    """WEIGHTS of test_model.sh: those of the best epoch, or where it is empty of the last one."""
    last = [args.student_weights for args in lines_of(tmp_path, WEIGHTS="")["test_model.sh"]]
    best = [args.student_weights for args in commands["test_model.sh"]]
    assert not any("_best" in path for path in last) and any("_best" in path for path in best)
    assert last == [path.replace("_best", "") for path in best]


@functools.cache
def script_module(name):
    """Return a script of the project as a module."""
    assert (ROOT / name).is_file()
    return importlib.import_module(name.removesuffix(".py"))


def parse(script, argv):
    """Return the arguments as the script itself reads them; a line that it rejects fails the test."""
    try:
        return script_module(script).parse_args(argv)
    except SystemExit:
        pytest.fail(f"{script} {' '.join(argv)}: rejected")


@pytest.fixture(scope="module")
def written(commands):
    """Return {path of weights: arguments of the training line that writes them}."""
    files = {}
    for args in (args for lines in commands.values() for args in lines if hasattr(args, "checkpoint_dir")):
        folder = runs.RunFolder(args.script, args)
        for path in (folder.last, folder.best):
            assert files.setdefault(os.path.normpath(path), args) is args, f"two lines write {path}"
    return files


@pytest.mark.parametrize("name", SCRIPTS)
def test_weights_read_are_weights_written(commands, written, name):
    """Every path of weights is one that a training line writes, of the architecture that the reader takes it for."""
    for args in commands[name]:
        for flag in WEIGHTS:
            path = getattr(args, flag, None)
            if path and "pretrained_backbones/" not in path:
                assert os.path.normpath(path) in written, f"no line of a .sh file writes {path}"
                arch = args.tarch if flag == "tcheckpoint" else args.arch
                assert models.backbone_name(written[os.path.normpath(path)].arch) == models.backbone_name(arch)


def test_teachers_fit_the_methods(commands, written):
    """HSAKD learns from heads of four views, and DPCD's teachers and frozen ones are the ones their tags name."""
    for args in (args for lines in commands.values() for args in lines if getattr(args, "tcheckpoint", None)):
        if args.dataset == "imagenet":
            continue  # there the published commands tell the two teachers apart by the seed
        teacher = written[os.path.normpath(args.tcheckpoint)]
        if args.method == "hsakd":
            assert getattr(teacher, "rotations", 4) == 4 and teacher.freezed == (args.tag == "freezed")
        elif args.method == "dpcd":
            assert teacher.rotations == 1


def test_learning_rates_are_the_recipes(commands):
    """0.01 for the light networks, 0.05 for the others, 0.1 for linear classifiers and ImageNet."""
    for args in (args for lines in commands.values() for args in lines if hasattr(args, "init_lr")):
        light = any(part in args.arch.lower() for part in ("mobilenet", "mbv2", "shuffle"))
        usual = 0.1 if args.script == "eval_rep" or models.is_imagenet(args.arch) else 0.01 if light else 0.05
        assert args.init_lr == usual, args.arch


def test_every_published_row_has_a_line(commands):
    """The pairs and networks of the published tables are those of the scripts."""
    table = json.loads((ROOT / "results" / "published_results.json").read_text())
    short = {"vgg13_bn": "vgg13", "vgg8_bn": "vgg8"}

    def plain(name):
        name = models.backbone_name(name)
        return short.get(name, name)

    students = commands["train_student_cifar.sh"]
    for method, tag, block in (("hsakd", None, "cifar100_offline"), ("hsakd", "freezed", "cifar100_offline"),
                               ("kd", "kd", "cifar100_offline"), ("dpcd", "dpcd", "dpcd_cifar100")):  # fmt: skip
        pairs = [f"{plain(a.tarch)}->{plain(a.arch)}" for a in students if (a.method, a.tag) == (method, tag)]
        assert pairs == table[block]["columns"]
    assert [plain(a.arch) for a in commands["train_online_kd_cifar.sh"]] == table["cifar100_online"]["columns"]
    ratios = [a.few_ratio for a in commands["train_student_few_shot.sh"]]
    assert ratios == table["cifar100_few_shot_resnet56->resnet20"]["ratio"]
    assert {a.dataset for a in commands["eval_rep.sh"]} == {"stl10", "tinyimagenet"}


def test_every_written_best_is_tested(commands, written):
    """test_model.sh names every network that the CIFAR scripts train."""
    tested = {os.path.dirname(os.path.normpath(args.student_weights)) for args in commands["test_model.sh"]}
    trained = {os.path.dirname(path) for path, args in written.items() if "imagenet" not in path and args.script != "eval_rep"}
    assert tested >= trained
