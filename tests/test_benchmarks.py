"""The benchmarks run to their end at small sizes, and report all that they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import paths
import pytest
import step
import torch
import torchvision
from test_own_images import write_images

from imagesets.images import ImageSet
from scripts import QUICK, save_teacher

ROOT = Path(__file__).parents[1]
SMALL = ("--pairs", "resnet8:resnet8", "--rounds", "1", "--amp", "off")
TINY = (*SMALL, "--batch-size", "2", "--steps", "1")


def benchmark(script, *words):
    """Return what a script of benchmarks/ prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_steps(tmp_path):
    """A pair and a mutual pair; every measurement is in the JSON file."""
    printed = benchmark(
        "step.py", *TINY, "--pairs", "resnet8:resnet8", "resnet8_resnet8", "--json", tmp_path / "step.json"
    )
    assert "| resnet8 -> resnet8 | stored, float32 |" in printed
    pair, mutual = json.loads((tmp_path / "step.json").read_text())["results"]
    assert list(pair["paths"]) == ["reference", "default", "stored", "memory"]
    assert list(mutual["paths"]) == ["reference", "default"]
    for found in (*pair["paths"].values(), *mutual["paths"].values()):
        assert found["images_per_second"]["median"] > 0 and found["peak_mib"] > 0 and found["start_seconds"] > 0
        assert 0 < found["of_matmul_rate"] < 2
    assert pair["paths"]["stored"]["ratio"].keys() == {"reference", "default", "memory"}


@pytest.mark.slow
def test_everything_for_a_gpu(tmp_path):
    """On the CPU: the tests are skipped, two processes share gloo, and a second run is added to the first."""
    words = [*TINY, "--quick", "--output", tmp_path / "gpu", "--paths"]
    benchmark("gpu.py", *words, "default", "stored")
    benchmark("gpu.py", *words, "default", "--no-tests")
    first, second = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert "skipped" in first["tests"]["summary"] and "tests" not in second
    assert first["pairs"][0]["paths"].keys() == {"default", "stored"}
    assert [cell["processes"] for cell in second["groups"]] == [1, 2]
    assert (tmp_path / "gpu.md").read_text() == gpu.report([first, second])


@pytest.mark.slow
def test_filling():
    printed = benchmark("filling.py", *SMALL, "--images", 4, "--batch-sizes", 2, 4)
    assert "| teacher | batch 2 | batch 4 | filling | of the best |" in printed and "| resnet8 | " in printed


@pytest.mark.slow
def test_scaling():
    printed = benchmark("scaling.py", *SMALL, "--steps", 1, "--batch-sizes", 2, "--processes", 2)
    assert "| resnet8 -> resnet8 | 2 | 2 | " in printed


@pytest.mark.slow
def test_input_pipeline(tmp_path):
    write_images(tmp_path / "train" / "cat", [(300, 240), (240, 240)], suffix="JPEG")
    printed = benchmark("input_pipeline.py", "--data", tmp_path, "--images", 4, "--rounds", 2)
    assert printed.count("ratio") == 2


@pytest.mark.slow
def test_equal_results(tmp_path):
    words = ["--tarch", "resnet8_aux", "--arch", "resnet8_aux", "--tcheckpoint", save_teacher(tmp_path / "teacher")]
    printed = benchmark("equal_results.py", "--seeds", 3, *words, *QUICK, "--epochs", 2)
    *_, head, _, reference, default = (line.split(" | ") for line in printed.splitlines())
    assert head[1] == "seed 3"
    assert (reference[0], default[0]) == ("| reference", "| default")
    assert all(0 <= float(row[1]) <= 100 for row in (reference, default))


@pytest.mark.parametrize("flip", [False, True])
def test_the_reference_mirrors_what_this_project_mirrors(flip):
    """Digits are not mirrored: a mirrored one is another class."""
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images = ImageSet(torch.zeros(1, dtype=torch.long), ["a"], ((0.5,) * 3, (0.5,) * 3), 8, pixels, flip=flip)
    layers = paths.PublishedImages(images).transform.transforms
    assert any(isinstance(layer, torchvision.transforms.RandomHorizontalFlip) for layer in layers) == flip


def test_a_pair_that_does_not_exist_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        step.main(["--pairs", "resnet56:resnet21"])
    assert stop.value.code == 2 and "nearest: resnet" in capsys.readouterr().err
