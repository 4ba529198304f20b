"""report.py on small generated run folders."""

import csv
import json
import math
import sys

import pytest

import published
import report

FROZEN = "checkpoint/train_teacher_cifar_arch_a_dataset_cifar100_seed0_freezed/a.pth.tar"
JOINT = "checkpoint/train_teacher_cifar_arch_a_dataset_cifar100_seed0/a.pth.tar"


def write_run(root, name, top1, **settings):
    """Write a run folder whose log has these test accuracies, one an epoch."""
    args = {
        "script": "train_student_cifar",
        "arch": "wrn_16_2_aux",
        "tarch": "wrn_40_2_aux",
        "dataset": "cifar100",
        "method": "hsakd",
        "manual_seed": 0,
        "epochs": 240,
        "few_ratio": None,
        "tag": None,
        "tcheckpoint": JOINT,
    }
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args | settings))
    with (folder / "log.jsonl").open("w") as file:
        for i, value in enumerate(top1, 1):
            best = max(top1[:i])
            file.write(
                json.dumps(
                    {
                        "epoch": i,
                        "lr": 0.1,
                        "test/top1": value,
                        "best/top1": best,
                        "best/epoch": top1.index(best) + 1,
                        "images_per_second": 100.0 * i,
                    }
                )
                + "\n"
            )
    return folder


def rows_of(root):
    """Return the table of all runs below `root` as dicts."""
    table = json.loads(published.TABLE.read_text())
    groups = report.group(report.find_runs([root]))
    return [dict(zip(report.COLUMNS, report.make_row(*group, table), strict=True)) for group in groups]


def run_main(monkeypatch, *argv):
    """Run report.py with these arguments and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, argv)])
    try:
        return report.main() or 0
    except SystemExit as end:
        return end.code


def test_seeds_are_one_row_with_hand_computed_mean_and_std(tmp_path):
    """Last: 70, 72, 77 -> 73 and sqrt((9 + 1 + 16) / 2) = 3.61; best: 75, 72, 78 -> 75 and 3; an unfinished run is apart."""
    write_run(tmp_path, "a", [75.0, 71.0, 70.0], epochs=3)
    write_run(
        tmp_path, "b", [70.0, 71.0, 72.0], epochs=3, manual_seed=1, gpu_id="3", tcheckpoint=JOINT.replace("seed0", "seed1")
    )
    write_run(tmp_path, "c", [78.0, 77.0, 77.0], epochs=3, manual_seed=2)
    write_run(tmp_path, "d", [99.0], epochs=3, manual_seed=3)
    (row,) = rows_of(tmp_path)
    assert row == {
        "script": "train_student_cifar",
        "network": "wrn_40_2_aux -> wrn_16_2_aux",
        "method": "hsakd*",
        "data set": "cifar100",
        "settings": "",
        "epochs": "1-3/3",
        "seeds": "0 1 2 (3)",
        "last top-1": "73.00±3.61",
        "best top-1": "75.00±3.00",
        "images/s": "200",
        "published": "78.67±0.20",
    }


def test_single_seed_has_no_std(tmp_path):
    """The standard deviation of one value is not shown."""
    write_run(tmp_path, "a", [50.0, 40.0])
    (row,) = rows_of(tmp_path)
    assert (row["last top-1"], row["best top-1"], row["epochs"]) == ("40.00", "50.00", "2/240")


PUBLISHED = [
    ({"tcheckpoint": FROZEN}, "77.20±0.17"),
    ({"method": "kd", "tarch": "wrn_40_2", "tcheckpoint": "zoo/a.pth"}, "75.23±0.23"),
    ({"method": "kd", "tcheckpoint": JOINT}, "75.23±0.23 (plain teacher)"),
    ({"method": "dpcd", "tcheckpoint": FROZEN}, "77.30"),
    ({"method": "dpcd", "tarch": "vgg13_bn_aux", "arch": "vgg8_bn_aux", "tcheckpoint": FROZEN}, "75.83"),
    ({"method": "dkd"}, ""),
    ({"dataset": "cifar10"}, ""),
    ({"arch": "vgg8_bn_aux"}, ""),
    ({"arch": "ShuffleV1_aux", "tcheckpoint": FROZEN}, "78.51±0.20"),
    ({"script": "train_student_few_shot", "tarch": "resnet56_aux", "arch": "resnet20_aux", "few_ratio": 0.5}, "72.18"),
    ({"script": "train_student_few_shot", "tarch": "resnet56_aux", "arch": "resnet20_aux", "few_ratio": 0.3}, ""),
    (
        {
            "script": "train_student_imagenet",
            "tarch": "resnet34_imagenet_aux",
            "arch": "resnet18_imagenet_aux",
            "dataset": "imagenet",
            "tcheckpoint": FROZEN,
        },
        "72.16",
    ),
    ({"script": "train_teacher_cifar", "tarch": None, "arch": "vgg13_bn_aux", "freezed": True}, "74.64"),
    ({"script": "train_teacher_cifar", "tarch": None, "arch": "vgg13_bn_aux", "freezed": False}, "78.48"),
    ({"script": "train_teacher_cifar", "tarch": None, "arch": "vgg13_bn_aux", "rotations": 1}, ""),
    ({"script": "train_baseline_cifar", "tarch": None, "method": None, "arch": "resnet20", "few_ratio": 0.25}, ""),
    ({"script": "train_teacher_imagenet", "tarch": None, "arch": "resnet34_imagenet_aux", "dataset": "imagenet"}, "75.48"),
    ({"script": "train_baseline_cifar", "tarch": None, "method": None, "arch": "mobilenetV2"}, "73.51±0.26"),
    ({"script": "train_baseline_cifar", "tarch": None, "method": None, "arch": "resnet56"}, "73.00"),
    ({"script": "train_baseline_cifar", "tarch": None, "method": None, "arch": "vgg8_bn"}, "70.36"),
    ({"script": "train_online_kd_cifar", "tarch": None, "method": None, "arch": "WRN_40_2_WRN_40_2"}, "82.58"),
    ({"script": "train_online_kd_cifar", "tarch": None, "method": None, "arch": "mbv2_mbv2"}, "78.85"),
    ({"script": "train_online_kd_imagenet", "tarch": None, "arch": "resnet18_resnet18", "dataset": "imagenet"}, "71.49"),
    (
        {
            "script": "eval_rep",
            "tarch": None,
            "method": None,
            "arch": "mobilenetV2",
            "dataset": "stl10",
            "s_path": "c/train_student_cifar_tarch_vgg13_bn_aux_arch_mobilenetV2_aux_dataset_cifar100_seed0/a.pth.tar",
        },
        "74.66",
    ),
    (
        {
            "script": "eval_rep",
            "tarch": None,
            "method": None,
            "arch": "mobilenetV2",
            "dataset": "tinyimagenet",
            "s_path": "c/train_baseline_cifar_arch_mobilenetV2_dataset_cifar100_seed0/a.pth.tar",
        },
        "34.69",
    ),
]


@pytest.mark.parametrize(("settings", "expected"), PUBLISHED)
def test_published_number(tmp_path, settings, expected):
    """Every kind of run finds its own published number and no other."""
    write_run(tmp_path, "a", [1.0], **settings)
    (row,) = rows_of(tmp_path)
    assert row["published"] == expected


def test_teacher_run_says_whether_it_was_frozen(tmp_path):
    """The teacher's args.json decides, not the name of its folder."""
    teacher = write_run(tmp_path / "teachers", "t", [1.0], script="train_teacher_cifar", tarch=None, freezed=True)
    write_run(tmp_path / "students", "s", [1.0], tcheckpoint=str(teacher / "t.pth.tar"))
    (row,) = rows_of(tmp_path / "students")
    assert (row["method"], row["published"]) == ("hsakd", "77.20±0.17")


def test_other_settings_are_another_row_and_named(tmp_path):
    """Runs that differ in a setting are apart, and the table says in which one."""
    write_run(tmp_path, "a", [1.0], init_lr=0.05)
    write_run(tmp_path, "b", [1.0], init_lr=0.1, tag="high", limit_batches=5)
    assert [row["settings"] for row in rows_of(tmp_path)] == ["init_lr 0.05", "init_lr 0.1, limit_batches 5, tag high"]


def test_killed_run_and_foreign_folders(tmp_path, capsys):
    """A half-written line is skipped, a repeated epoch counts once, a log without args.json is named."""
    folder = write_run(tmp_path, "a", [10.0, 20.0])
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 2, "test/top1": 21.0, "best/top1": 21.0, "best/epoch": 2}) + "\n")
        file.write('{"epoch": 3, "test/to')
    write_run(tmp_path, "b", [30.0])
    (tmp_path / "b" / "args.json").unlink()
    (tmp_path / "unrelated").mkdir()
    odd = ({"epochs": [3]}, {"epochs": math.inf}, {"method": ["kd"]}, {"method": 5}, {"arch": "two\nlines"}, {"few_ratio": "a"})
    for i, settings in enumerate(odd):
        write_run(tmp_path, f"odd{i}", [30.0], **settings)
    write_run(tmp_path, "c", [], manual_seed=1)
    (row,) = rows_of(tmp_path)
    assert (row["epochs"], row["last top-1"], row["seeds"]) == ("0-2/240", "21.00", "(0) (1)")
    errors = capsys.readouterr().err.splitlines()
    named = ["b", *(f"odd{i}" for i in range(len(odd)))]
    assert [line.split()[1] for line in errors] == [str(tmp_path / name) for name in named]


def test_numbers_that_cannot_be_averaged_are_missing(tmp_path):
    folder = write_run(tmp_path, "a", [50.0])
    for line in ('"test/top1": 1e999, "images_per_second": NaN', f'"test/top1": {10**400}'):
        (folder / "log.jsonl").write_text(f'{{"epoch": 1, {line}}}\n')
        (row,) = rows_of(tmp_path)
        assert row["last top-1"] == "-"


def test_home_folders_are_expanded(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "runs", "a", [50.0])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_main(monkeypatch, "--checkpoint-dir=~/runs") == 0
    assert "50.00" in capsys.readouterr().out


def test_command_line_writes_markdown_and_csv(tmp_path, monkeypatch, capsys):
    """The table goes to stdout and the files, with a caption that says how "best" was selected."""
    write_run(tmp_path / "runs", "a", [50.0], val_split=0.1)
    assert run_main(monkeypatch, "--checkpoint-dir", tmp_path / "runs") == 0
    out = capsys.readouterr().out
    assert "50.00 (val)" in out and "held-out" in out and "selected on the test set" not in out
    folder = write_run(tmp_path / "runs", "b", [60.0])
    markdown, table = tmp_path / "t.md", tmp_path / "t.csv"
    assert run_main(monkeypatch, folder, "--markdown", markdown, "--csv", table) == 0
    assert "selected on the test set" in capsys.readouterr().out and "selected on the test set" in markdown.read_text()
    lines = markdown.read_text().splitlines()
    assert len({line.count("|") for line in lines[:3]}) == 1 and "60.00" in lines[2] and lines[3] == ""
    with table.open(newline="", encoding="utf-8") as file:
        header, row = csv.reader(file)
    assert header == report.COLUMNS and row[header.index("published")] == "78.67±0.20"
    assert "another kind of teacher" not in out
    write_run(tmp_path / "other", "c", [60.0], method="kd", tcheckpoint=JOINT)
    assert run_main(monkeypatch, tmp_path / "other") == 0 and "another kind of teacher" in capsys.readouterr().out


def test_plot(tmp_path, monkeypatch, capsys):
    """The curves are drawn with matplotlib; without it one line says so."""
    write_run(tmp_path, "a", [50.0, 60.0])
    write_run(tmp_path, "b", [55.0, 57.0], manual_seed=1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert run_main(patch, tmp_path, "--plot", tmp_path / "p.png") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "p.png").exists()
    pytest.importorskip("matplotlib")
    assert run_main(monkeypatch, tmp_path, "--plot", tmp_path / "p.png") == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys):
    """No runs, or a file that cannot be written: exit status 2 and one line."""
    assert run_main(monkeypatch, tmp_path) == 2
    assert run_main(monkeypatch, "--checkpoint-dir", tmp_path / "absent") == 2
    write_run(tmp_path, "a", [50.0])
    assert run_main(monkeypatch, tmp_path, "--csv", tmp_path / "absent" / "t.csv") == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
