"""The benchmarks run to their end at small sizes, and report all that they promise."""

import json
import runpy
import sys

import gpu
import pytest
import step
from test_own_images import write_images

from scripts import QUICK, ROOT, own_signal_handlers, save_teacher

TINY = ("--pairs", "resnet8:resnet8", "--rounds", "1", "--amp", "off", "--batch-size", "2", "--steps", "1")
STUDENT = ("--arch", "resnet8_aux", "--tarch", "resnet8_aux", "--tcheckpoint", "{0}/t.pth", *QUICK, "--epochs", 2)
# Script -> its words, and what it prints.
OTHERS = {
    "input_pipeline.py": (("--data", "{0}", "--images", 4, "--rounds", 2), "ratio"),
    "equal_results.py": (("--seeds", 3, *STUDENT), "| default | "),
}


def benchmark(script, *words):
    """Run a script of benchmarks/ as its command does, in this process."""
    with own_signal_handlers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        try:
            runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code


@pytest.mark.slow
def test_steps(tmp_path, capsys):
    """Every measurement is in the JSON file."""
    paths = ["reference", "default", "stored", "memory", "inference", "filling"]
    benchmark("step.py", *TINY, "--paths", *paths, "--json", tmp_path / "step.json")
    assert "| resnet8 -> resnet8 | stored, float32 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "step.json").read_text())
    (pair,) = found["pairs"]
    assert list(pair["paths"]) == paths
    table = dict(zip(paths, step.rows(pair, found["rates"]), strict=True))
    assert all(len(row) == len(step.HEAD) and 0 < float(row[8].strip("%")) < 200 for row in table.values())
    assert all(table["stored"][4:8]) and not any(table["reference"][4:8])


@pytest.mark.slow
def test_everything_for_a_gpu(tmp_path):
    """On the CPU: the tests are skipped, two processes share gloo, and the run is added to an earlier one."""
    earlier = {"hardware": "other", "date": "2026-01-01", "tests": "none", "rates": {}, "pairs": [], "groups": []}
    (tmp_path / "gpu.json").write_text(json.dumps({"runs": [earlier]}))
    benchmark("gpu.py", *TINY, "--output", tmp_path / "gpu", "--paths", "default", "stored")
    first, second = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert first == earlier and "skipped" in second["tests"]
    assert second["pairs"][0]["paths"].keys() == {"default", "stored"}
    assert [row.split(" | ")[2] for row in second["groups"]] == ["2, 1", "4, 2"]
    assert (tmp_path / "gpu.md").read_text() == gpu.report([first, second])


@pytest.mark.slow
@pytest.mark.parametrize("script", OTHERS)
def test_the_others_run(script, tmp_path, capsys):
    write_images(tmp_path / "train" / "cat", [(300, 240), (240, 240)], suffix="JPEG")
    save_teacher(tmp_path / "t.pth")
    words, printed = OTHERS[script]
    benchmark(script, *(str(word).format(tmp_path) for word in words))
    assert printed in capsys.readouterr().out
