"""The driver of the table of methods: its commands run, what is done is left out, and report.py reads its file."""

import json
import os
import subprocess
import sys

import pytest
from test_recorded_losses import CLASSES, write_cifar

import report
from scripts import ROOT, parsed, save_teacher
from tools import repeats

ROWS = ["alone", "kd", "dkd", "dist", "wttm", "crd", "reviewkd", "dpcd", "hssakd", "hsakd"]
BEYOND = ["hsakd_standardized", "hsakd_dist", "hsakd_strong"]
SMALL = ["--epochs", "1", "--milestones", "1", "--limit-batches", "2", "--batch-size", "4", "--amp", "off"]


def table(folder, *words, **settings):
    """Run the driver with its files in `folder`; return the lines that it prints."""
    known = {"CHECKPOINTS": folder, "DATA": folder, "RESULTS": folder / "table.jsonl", "TEACHER": folder / "t.pth"}
    known = {**os.environ, **{name: str(value) for name, value in {**known, **settings}.items()}}
    done = subprocess.run(["bash", ROOT / "scripts/table.sh", *words], capture_output=True, text=True, env=known)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def commands(folder, **settings):
    """Return {(row, seed): parsed arguments} of the training commands that the driver would run."""
    lines = table(folder, PYTHON="echo", **settings)
    words = [line.split() for line in lines if not line.startswith("-m")]
    found = [parsed(script.removesuffix(".py"), *argv) for script, *argv in words]
    return {(args.tag, args.manual_seed): args for args in found}


def test_every_row_is_a_command_of_equal_steps(tmp_path):
    found = commands(tmp_path, ROWS=" ".join(ROWS + BEYOND))
    assert found.keys() == {(row, seed) for row in ROWS + BEYOND for seed in range(3)} - {("hssakd", 2)}
    for args in found.values():
        assert (args.epochs, args.milestones, args.init_lr, args.batch_size) == (15, [9, 11, 13], 0.05, 64)
        assert getattr(args, "loss_warmup", 1) == 1 and args.dataset == "cifar100"
    assert found["crd", 0].negatives == 4096 and found["hsakd", 0].views == 4
    args = found["hsakd_standardized", 0]
    assert args.standardize and (args.kd_T, args.kd_weight) == (2.0, 9.0) and not found["hsakd", 0].standardize
    assert found["hsakd_strong", 0].augment == "strong" and found["hsakd", 0].augment is None


def test_stored_outputs_serve_the_methods_that_read_logits_or_heads(tmp_path):
    found = commands(tmp_path, ROWS=" ".join(ROWS + BEYOND), SEEDS="0", VIEWS="8", STORE=tmp_path / "store")
    stored = {row for (row, _), args in found.items() if vars(args).get("views") == 8 and args.teacher_cache}
    assert stored == set(ROWS + BEYOND) - {"alone", "crd", "reviewkd", "hssakd"}


def test_another_teacher_takes_the_same_rows(tmp_path):
    found = commands(tmp_path, ROWS="hsakd hsakd_dist", SEEDS="0", TARCH="resnet14_aux", TEACHER="t14.pth")
    assert {(args.tarch, args.tcheckpoint) for args in found.values()} == {("resnet14_aux", "t14.pth")}


def test_rows_of_repeated_views(tmp_path):
    rows = ["few_fresh", "few_1", "few_4", "few_16", "all_fresh", "all_4"]
    found = commands(tmp_path, ROWS=" ".join(rows), SEEDS="0", STORE=tmp_path / "store")
    views = {row: (args.views, bool(args.teacher_cache)) for (row, _), args in found.items()}
    fresh, stored = (None, False), {f"few_{count}": (count, True) for count in (1, 4, 16)}
    assert views == {"few_fresh": fresh, "all_fresh": fresh, "all_4": (4, True), **stored}
    assert {(args.few_ratio, args.epochs) for (row, _), args in found.items() if row[:3] == "few"} == {(0.2, 60)}
    assert {args.epochs for (row, _), args in found.items() if row[:3] == "all"} == {12}


@pytest.mark.slow
def test_a_run_is_collected_and_then_left_out(tmp_path):
    """One row's command for two steps on made images; its line is what report.py reads."""
    write_cifar(tmp_path)
    save_teacher(tmp_path / "t.pth", "resnet20_aux", CLASSES)
    table(tmp_path, "row", "hsakd", "1", *SMALL, PYTHON=sys.executable, VIEWS="2", STORE=tmp_path / "store")
    (line,) = map(json.loads, (tmp_path / "table.jsonl").read_text().splitlines())
    assert (line["name"], line["seed"], len(line["log"])) == ("hsakd", 1, 1) and "torch" in line["versions"]
    assert line["args"]["method"] == "hsakd" and "checkpoint_dir" not in line["args"]
    assert line["args"]["tcheckpoint"] == f"{tmp_path.name}/t.pth" and str(tmp_path) not in json.dumps(line)
    (run,) = report.find_runs([tmp_path / "table.jsonl"])
    assert run.finished and run.epochs[-1]["test/top1"] >= 0
    assert commands(tmp_path, ROWS="hsakd kd", SEEDS="1").keys() == {("kd", 1)}


def test_the_table_of_repeats_by_hand(tmp_path, capsys):
    """Two epochs of 10 s with fresh views end at 50; one view is half as slow, and at 60 after its first epoch."""
    lines = []
    for name, views, seconds, accuracies in (("few_fresh", None, 10, (40, 50)), ("few_1", 1, 5, (60, 45))):
        args = {"epochs": 2, "views": views, "image_set": {"images": 300}}
        log = [{"epoch": i + 1, "seconds": seconds, "test/top1": top1} for i, top1 in enumerate(accuracies)]
        lines += [json.dumps({"name": name, "seed": seed, "args": args, "log": log}) for seed in (0, 1)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    repeats.main([str(tmp_path / "r.jsonl"), "--filling", "100"])
    found = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert found[0] == ["few_fresh", "fresh", "50.00, 50.00", "50.00 ± 0.00", "10.0", "20", "20", "20, 20"]
    assert found[1] == ["few_1", "2", "45.00, 45.00", "45.00 ± 0.00", "5.0", "10", "13", "5, 5"]
