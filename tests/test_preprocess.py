"""data/preprocess_tinyimagenet.py on a small generated folder in TinyImageNet's layout."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "preprocess_tinyimagenet.py"
CLASSES = ["n03", "n01", "n02"]
EXPECTED = {f"{CLASSES[i % 3]}/val_{i}.JPEG": bytes([i]) * (i + 1) for i in range(6)}


@pytest.fixture
def script():
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("preprocess_tinyimagenet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three classes and two validation images of each, beside a copy of the script."""
    shutil.copy(SCRIPT, tmp_path)
    images = tmp_path / "tiny-imagenet-200" / "val" / "images"
    images.mkdir(parents=True)
    lines = []
    for i in range(6):
        (images / f"val_{i}.JPEG").write_bytes(bytes([i]) * (i + 1))
        lines.append(f"val_{i}.JPEG\t{CLASSES[i % 3]}\t0\t1\t2\t3\n")
    (images.parent / "val_annotations.txt").write_text("".join(lines))
    return tmp_path / "tiny-imagenet-200"


def tree(path):
    """Return {relative path: content} of all files below a folder."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def command(cwd, *words):
    """Run the published command in the script's folder."""
    return subprocess.run([sys.executable, SCRIPT.name, *words], cwd=cwd, capture_output=True, text=True)


def test_command_sorts_once_and_keeps_the_original(folder):
    """A second run changes nothing; the images are links, not copies."""
    before = tree(folder)
    for _ in range(2):
        done = command(folder.parent)
        assert done.returncode == 0 and done.stdout.count("\n") == 1 and not done.stderr
        assert tree(folder) == before | {f"val_sorted/{name}": content for name, content in EXPECTED.items()}
    assert (folder / "val_sorted/n03/val_0.JPEG").samefile(folder / "val/images/val_0.JPEG")


def test_an_interrupted_run_leaves_no_half_state(folder, script, monkeypatch):
    """No val_sorted appears; the next run, on a file system without links, completes it and cleans up."""
    before = tree(folder)
    monkeypatch.setattr(script.os, "link", mock.Mock(side_effect=[None, None, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        script.prepare(folder)
    assert not (folder / "val_sorted").exists()
    monkeypatch.setattr(script.os, "link", mock.Mock(side_effect=OSError("no links")))
    script.prepare(folder)
    assert tree(folder) == before | {f"val_sorted/{name}": content for name, content in EXPECTED.items()}


@pytest.mark.parametrize("missing", ["val/val_annotations.txt", "val/images/val_4.JPEG", "."])
def test_an_unusable_folder_is_one_line(folder, missing):
    """Not TinyImageNet, an annotated image missing, no folder at all."""
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = command(folder.parent, "tiny-imagenet-200")
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert not (folder / "val_sorted").exists()
