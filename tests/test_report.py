"""report.py on small generated run folders."""

import csv
import json

import pytest
import torch

import report
from utils import UserError

FROZEN = "checkpoint/train_teacher_cifar_arch_a_dataset_cifar100_seed0_freezed/a.pth.tar"
JOINT = "checkpoint/train_teacher_cifar_arch_a_dataset_cifar100_seed0/a.pth.tar"
ONE_VIEW = "checkpoint/train_teacher_cifar_arch_a_dataset_cifar100_seed0_one_view/a_best.pth.tar"
ARGS = {"script": "train_student_cifar", "arch": "wrn_16_2_aux", "tarch": "wrn_40_2_aux", "dataset": "cifar100"}
ARGS |= {"method": "hsakd", "manual_seed": 0, "epochs": 240, "few_ratio": None, "tag": None, "tcheckpoint": JOINT}


def log_of(top1):
    """Return the log of a run with these test accuracies, one an epoch."""
    return [
        {
            "epoch": i + 1,
            "test/top1": top1[i],
            "best/top1": max(top1[: i + 1]),
            "images_per_second": 100.0 * (i + 1),
            "seconds": 2.0 + i,
        }
        for i in range(len(top1))
    ]


def write_run(root, name, top1, **settings):
    """Write a run folder with these test accuracies; return it."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(ARGS | settings))
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log_of(top1)))
    return folder


def rows_of(*paths):
    """Return the table of the runs below or in `paths` as dicts."""
    groups = report.group(report.find_runs(paths))
    return [dict(zip(report.COLUMNS, report.make_row(*group), strict=True)) for group in groups]


def test_seeds_are_one_row_with_hand_computed_mean_and_std(tmp_path):
    """Last: 70, 72, 77 -> 73 and sqrt((9 + 1 + 16) / 2) = 3.61; best: 75, 72, 78 -> 75 and 3; seed 3 is unfinished."""
    write_run(tmp_path, "a", [75.0, 71.0, 70.0], epochs=3)
    other = {"gpu_id": "3", "tcheckpoint": JOINT.replace("seed0", "seed1")}
    write_run(tmp_path, "b", [70.0, 71.0, 72.0], epochs=3, manual_seed=1, **other)
    write_run(tmp_path, "c", [78.0, 77.0, 77.0], epochs=3, manual_seed=2)
    write_run(tmp_path, "d", [99.0], epochs=3, manual_seed=3)
    expected = ["train_student_cifar", "wrn_40_2_aux -> wrn_16_2_aux", "hsakd*", "cifar100", "", "1-3/3", "0 1 2 (3)"]
    expected += ["73.00±3.61", "75.00±3.00", "200", "9", "78.67±0.20"]
    assert [list(row.values()) for row in rows_of(tmp_path)] == [expected]


def script(name, **settings):
    """Return the settings of a run without a teacher."""
    return {"script": name, "tarch": None, "method": None, "tcheckpoint": None, **settings}


FEW = {"script": "train_student_few_shot", "tarch": "resnet56_aux", "arch": "resnet20_aux"}
STUDENT_IMAGENET = {"script": "train_student_imagenet", "tarch": "resnet34_imagenet_aux", "dataset": "imagenet"}
STUDENT_IMAGENET["arch"] = "resnet18_imagenet_aux"
PROBED = "c/train_student_cifar_tarch_vgg13_bn_aux_arch_mobilenetV2_aux_dataset_cifar100_seed0/a.pth.tar"
BASELINE = "c/train_baseline_cifar_arch_mobilenetV2_dataset_cifar100_seed0/a.pth.tar"
PUBLISHED = [
    ({"tcheckpoint": FROZEN}, "77.20±0.17"),
    ({"method": "kd", "tarch": "wrn_40_2", "tcheckpoint": "zoo/a.pth"}, "75.23±0.23"),
    ({"method": "kd", "tcheckpoint": JOINT}, "75.23±0.23 (plain teacher)"),
    ({"method": "dpcd", "tcheckpoint": ONE_VIEW}, "77.30"),
    ({"method": "dpcd", "tarch": "vgg13_bn_aux", "arch": "mobilenetV2_s2_aux", "tcheckpoint": ONE_VIEW}, "70.87"),
    ({"method": "dkd"}, ""),
    ({"dataset": "cifar10"}, ""),
    ({**FEW, "few_ratio": 0.5}, "72.18"),
    ({**FEW, "few_ratio": 0.3}, ""),
    ({**STUDENT_IMAGENET, "tcheckpoint": FROZEN}, "72.16"),
    ({**STUDENT_IMAGENET, "method": "dpcd"}, "71.89"),
    (script("train_teacher_cifar", arch="vgg13_bn_aux", freezed=True), "74.64"),
    (script("train_teacher_cifar", arch="vgg13_bn_aux", freezed=False), "78.48"),
    (script("train_teacher_cifar", arch="vgg13_bn_aux", rotations=1), ""),
    (script("train_teacher_imagenet", arch="resnet34_imagenet_aux", dataset="imagenet"), "75.48"),
    (script("train_baseline_cifar", arch="resnet20", few_ratio=0.25), ""),
    (script("train_baseline_cifar", arch="mobilenetV2"), "73.51±0.26"),
    (script("train_online_kd_cifar", arch="mbv2_mbv2"), "78.85"),
    (script("train_online_kd_imagenet", arch="resnet18_resnet18", dataset="imagenet"), "71.49"),
    (script("eval_rep", arch="mobilenetV2", dataset="stl10", s_path=PROBED), "74.66"),
    (script("eval_rep", arch="mobilenetV2", dataset="stl10", s_path=BASELINE), "67.76"),
    ({"arch": "torchvision/resnet18"}, ""),
]


@pytest.mark.parametrize(("settings", "expected"), PUBLISHED)
def test_published_number(tmp_path, settings, expected):
    """Every kind of run finds its own published number and no other."""
    write_run(tmp_path, "a", [1.0], **settings)
    (row,) = rows_of(tmp_path)
    assert row["published"] == expected


def test_students_of_other_teachers_have_no_star(tmp_path):
    """Of a frozen one, by its args.json or a copy's own arguments; of an assistant; of somebody's plain network."""
    frozen, weights = script("train_teacher_cifar", freezed=True), {"fc.weight": torch.ones(2, 2)}
    torch.save({"net": weights, "args": frozen}, tmp_path / "copy.pth")
    torch.save({"state_dict": weights}, tmp_path / "zoo.pth")
    teacher, assistant = write_run(tmp_path, "t", [1.0], **frozen), write_run(tmp_path, "a", [1.0])
    for path in (teacher / "t.pth.tar", tmp_path / "copy.pth", assistant / "a.pth.tar", tmp_path / "zoo.pth"):
        write_run(tmp_path / "students" / path.stem, "s", [1.0], tcheckpoint=str(path))
        (row,) = rows_of(tmp_path / "students" / path.stem)
        assert (row["method"], row["published"]) == ("hsakd", "77.20±0.17")


def test_other_images_of_ones_own_are_rows_of_their_own(tmp_path):
    for seed, count in enumerate((100, 200)):
        images = {"dataset": "imagefolder", "images": count, "size": 32}
        write_run(tmp_path, str(count), [1.0], dataset="imagefolder", manual_seed=seed, image_set=images)
    assert [row["settings"] for row in rows_of(tmp_path)] == ["images 100 of 32 pixels", "images 200 of 32 pixels"]


def test_settings_that_differ_are_rows_of_their_own(tmp_path):
    """The table names them, and a trial's limit always."""
    write_run(tmp_path, "a", [1.0], init_lr=0.05, limit_batches=5)
    write_run(tmp_path, "b", [1.0], init_lr=0.1, tag="high", limit_batches=5)
    settings = [row["settings"] for row in rows_of(tmp_path)]
    assert settings == ["init_lr 0.05, limit_batches 5", "init_lr 0.1, limit_batches 5, tag high"]


def test_a_file_of_results_is_read_like_folders(tmp_path):
    """A line is a run; rows take runs of both."""
    line = {"args": ARGS | {"manual_seed": 1}, "log": log_of([60.0])}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    write_run(tmp_path / "runs", "a", [50.0])
    (row,) = rows_of(tmp_path / "runs", tmp_path / "results.jsonl")
    assert (row["seeds"], row["last top-1"]) == ("(0) (1)", "55.00±7.07")


def test_killed_runs_and_foreign_folders(tmp_path, capsys):
    """A half-written line is skipped, a repeated epoch counts once, a broken or foreign args.json is named."""
    folder = write_run(tmp_path, "a", [10.0, 20.0])
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 2, "test/top1": 21.0, "best/top1": 21.0}) + '\n{"epoch": 3, "test/to')
    (write_run(tmp_path, "b", [30.0]) / "args.json").write_text('{"script": "tr')
    (write_run(tmp_path, "c", [30.0]) / "args.json").write_text('{"learning_rate": 1}')
    (row,) = rows_of(tmp_path)
    assert (row["epochs"], row["last top-1"]) == ("2/240", "21.00")
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "/b/" in errors[0] and "/c/" in errors[1]


def test_markdown_csv_and_plot(tmp_path, capsys):
    """The table goes to stdout and the files, with a caption that says how the best epoch was selected."""
    write_run(tmp_path / "runs", "a", [50.0, 40.0], val_split=0.1)
    report.main(report.parse_args(["--checkpoint-dir", str(tmp_path / "runs")]))
    out = capsys.readouterr().out
    assert "50.00 (val)" in out and "held-out" in out
    write_run(tmp_path / "runs", "b", [60.0])
    files = {name: tmp_path / name for name in ("markdown", "csv", "plot.png")}
    flags = [f"--{name.removesuffix('.png')}={path}" for name, path in files.items()]
    report.main(report.parse_args([str(tmp_path / "runs"), *flags]))
    lines = files["markdown"].read_text().splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1 and "60.00" in lines[2] and lines[4] == ""
    assert "selected on the test set" in lines[5] and lines[5] in capsys.readouterr().out
    with files["csv"].open(newline="", encoding="utf-8") as file:
        header, first, _ = csv.reader(file)
    assert header == report.COLUMNS and first[header.index("published")] == "78.67±0.20"
    assert files["plot.png"].read_bytes().startswith(b"\x89PNG")


def test_paths_without_runs(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError):
            report.main(report.parse_args([str(path)]))
