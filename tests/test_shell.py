"""The commands of the .sh files and the documentation parse, and the weights they read are those that others write."""

import importlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import models
import options

ROOT = Path(__file__).resolve().parent.parent
FILES = ["test_model.sh", *sorted(f"scripts/{path.name}" for path in ROOT.glob("scripts/*_*.sh"))]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
WEIGHTS = ("tcheckpoint", "student_weights", "s_path", "pretrained_backbone")
STUB = '#!/bin/sh\nfor word; do printf "%s\\t" "$word"; done\necho\n'


def run_bash(folder, *words, **environment):
    """Run bash and return the parsed arguments of each line that calls a script; `folder` gets stand-ins for python."""
    for name, text in {"python": STUB, "torchrun": STUB, "srun": '#!/bin/sh\nexec "$@"\n'}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    known = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), **environment}
    done = subprocess.run(["bash", *words], capture_output=True, text=True, env=known, cwd=folder)
    assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr
    return [args for line in done.stdout.splitlines() for args in parse(line.rstrip("\t").split("\t"))]


def parse(words):
    """Return the arguments of a command as its script reads them, nothing for programs that are no script."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1] == "-m")  # after torchrun's own
    if words[at].endswith(".py") and not (ROOT / Path(words[at]).name).is_file():
        return []
    try:
        return [importlib.import_module(words[at].removesuffix(".py")).parse_args(words[at + 1 :])]
    except SystemExit:
        pytest.fail(f"{' '.join(words)}: rejected")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Return {.sh file: parsed arguments of its lines} of the files called without flags."""
    folder = tmp_path_factory.mktemp("bin")
    return {name: run_bash(folder, ROOT / name) for name in FILES}


@pytest.fixture(scope="module")
def written(commands):
    """Return {path of weights: arguments of the training line that writes them}."""
    files = {}
    for args in (args for lines in commands.values() for args in lines if hasattr(args, "checkpoint_dir")):
        folder = Path(options.run_folder(args))
        for name in (f"{args.arch}.pth.tar", f"{args.arch}_best.pth.tar"):
            assert files.setdefault(folder / name, args) is args, f"two lines write {folder / name}"
    return files


def test_flags_and_environment_reach_every_line(commands, tmp_path):
    for name in FILES:
        lines = run_bash(tmp_path, ROOT / name, "--amp", "bf16", DATA="elsewhere", WEIGHTS="")
        assert len(lines) == len(commands[name])
        assert all(args.amp == "bf16" and args.data.startswith("elsewhere") for args in lines)
        assert not any("_best" in args.student_weights for args in lines if args.script == "test_model")


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
    """HSAKD's teachers have heads of four views, DPCD's of one; the tag says whether a teacher is frozen.

    DPCD's students, and all on ImageNet, read the best epoch.
    """
    for args in commands["scripts/train_student_cifar.sh"]:
        teacher = written[Path(args.tcheckpoint)]
        if args.method == "hsakd":
            assert teacher.rotations == 4 and teacher.freezed == (args.tag == "freezed")
        elif args.method == "dpcd":
            assert teacher.rotations == 1
        assert args.tcheckpoint.endswith("_best.pth.tar") == (args.method == "dpcd")
    imagenet = commands["scripts/train_student_imagenet.sh"]
    assert [args.method for args in imagenet] == ["hsakd", "hsakd", "dpcd"]
    assert [written[Path(args.tcheckpoint)].freezed for args in imagenet] == [True, False, False]
    assert all(args.tcheckpoint.endswith("_best.pth.tar") for args in imagenet)


def test_every_published_row_has_a_line(commands):
    """The pairs and networks of the published tables are those of the files."""
    tables = json.loads((ROOT / "results" / "published_results.json").read_text())["tables"]

    def plain(name):
        return models.backbone_name(name).removesuffix("_bn")

    lines = {Path(name).stem: found for name, found in commands.items()}
    rows = {("hsakd", None): "cifar100_offline", ("hsakd", "freezed"): "cifar100_offline"}
    rows |= {("kd", "kd"): "cifar100_offline", ("dpcd", "dpcd"): "dpcd_cifar100"}
    for key, block in rows.items():
        students = [args for args in lines["train_student_cifar"] if (args.method, args.tag) == key]
        assert [f"{plain(args.tarch)} -> {plain(args.arch)}" for args in students] == tables[block]["networks"]
    assert [plain(args.arch) for args in lines["train_online_kd_cifar"]] == tables["cifar100_online"]["networks"]
    ratios = [f"cifar100_few_shot_{args.few_ratio}" for args in lines["train_student_few_shot"]]
    assert ratios == [name for name in tables if "few_shot" in name]
    assert {args.dataset for args in lines["eval_rep"]} == {"stl10", "tinyimagenet"}


def test_line_ends_stay_those_of_unix():
    """Bash does not read the files of a checkout with Windows line ends."""
    assert "*.sh text eol=lf" in (ROOT / ".gitattributes").read_text().splitlines()


def test_every_written_best_is_tested(commands, written):
    """test_model.sh names every network that the CIFAR files train."""
    tested = {Path(args.student_weights) for args in commands["test_model.sh"]}
    trained = {path for path, args in written.items() if args.dataset == "cifar100" and "_best" in path.name}
    assert tested == trained


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_parse(page, tmp_path):
    """Every code block that calls a script runs through bash, with its variables and its continued lines."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if not language and re.search("^(python|torchrun|srun) ", block, re.MULTILINE):
            run_bash(tmp_path, "-c", block)
