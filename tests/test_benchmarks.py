"""The benchmarks run to their end at small sizes, and report all that they promise."""

import json
import runpy
import sys
from pathlib import Path

import gpu
import pytest
from test_own_images import write_images

from scripts import QUICK, own_signal_handlers, save_teacher

ROOT = Path(__file__).parents[1]
SMALL = ("--pairs", "resnet8:resnet8", "--rounds", "1", "--amp", "off")
TINY = (*SMALL, "--batch-size", "2", "--steps", "1")
STUDENT = ("--arch", "resnet8_aux", "--tarch", "resnet8_aux", "--tcheckpoint", "{0}/t.pth", *QUICK, "--epochs", 2)
# Script -> its words, and what it prints.
OTHERS = {
    "filling.py": ((*SMALL, "--images", 4, "--batch-sizes", 2, 4), "| resnet8 | "),
    "scaling.py": ((*SMALL, "--steps", 1, "--batch-sizes", 2, "--processes", 2), "| resnet8 -> resnet8 | 2 | 2 | "),
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
    """A pair and a mutual pair; every measurement is in the JSON file."""
    benchmark("step.py", *TINY, "--pairs", "resnet8:resnet8", "resnet8_resnet8", "--json", tmp_path / "step.json")
    assert "| resnet8 -> resnet8 | stored, float32 |" in capsys.readouterr().out
    pair, mutual = json.loads((tmp_path / "step.json").read_text())["results"]
    assert list(pair["paths"]) == ["reference", "default", "stored", "memory"]
    assert list(mutual["paths"]) == ["reference", "default"]
    for found in (*pair["paths"].values(), *mutual["paths"].values()):
        assert found["images_per_second"]["median"] > 0 and found["peak_mib"] > 0 and found["start_seconds"] > 0
        assert 0 < found["of_matmul_rate"] < 2


@pytest.mark.slow
def test_everything_for_a_gpu(tmp_path):
    """On the CPU: the tests are skipped, two processes share gloo, and the run is added to an earlier one."""
    earlier = {"hardware": "other", "date": "2026-01-01", "pairs": [], "groups": []}
    (tmp_path / "gpu.json").write_text(json.dumps({"runs": [earlier]}))
    benchmark("gpu.py", *TINY, "--quick", "--output", tmp_path / "gpu", "--paths", "default", "stored")
    first, second = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert first == earlier and "skipped" in second["tests"]["summary"]
    assert second["pairs"][0]["paths"].keys() == {"default", "stored"}
    assert [cell["processes"] for cell in second["groups"]] == [1, 2]
    assert (tmp_path / "gpu.md").read_text() == gpu.report([first, second])


@pytest.mark.slow
@pytest.mark.parametrize("script", OTHERS)
def test_the_others_run(script, tmp_path, capsys):
    write_images(tmp_path / "train" / "cat", [(300, 240), (240, 240)], suffix="JPEG")
    save_teacher(tmp_path / "t.pth")
    words, printed = OTHERS[script]
    benchmark(script, *(str(word).format(tmp_path) for word in words))
    assert printed in capsys.readouterr().out
