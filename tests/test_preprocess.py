"""data/preprocess_tinyimagenet.py on a small generated folder in TinyImageNet's layout."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "preprocess_tinyimagenet.py"
CLASSES = ["n03", "n01", "n02"]


@pytest.fixture
def script():
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("preprocess_tinyimagenet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three classes and two validation images of each."""
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(CLASSES))
    lines = []
    for i in range(6):
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(bytes([i]) * (i + 1))
        lines.append(f"val_{i}.JPEG\t{CLASSES[i % 3]}\t0\t1\t2\t3\n")
    for name in CLASSES:
        (root / "train" / name / "images").mkdir(parents=True)
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def tree(path):
    """Return {relative path: content} of all files below a folder."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


EXPECTED = {f"{CLASSES[i % 3]}/val_{i}.JPEG": bytes([i]) * (i + 1) for i in range(6)}


def run_script(cwd, *argv):
    """Run the command and return the finished process."""
    return subprocess.run([sys.executable, SCRIPT, *argv], cwd=cwd, capture_output=True, text=True)


def test_command_sorts_and_keeps_the_original(folder):
    """Run twice: same result, val/ untouched, no copy of the images' data, nothing else left."""
    before = tree(folder)
    for word in ("3 classes", "already"):
        process = run_script(folder.parent)
        assert process.returncode == 0 and word in process.stdout and not process.stderr
        assert tree(folder) == before | {f"val_sorted/{name}": content for name, content in EXPECTED.items()}
    assert (folder / "val_sorted/n03/val_0.JPEG").samefile(folder / "val/images/val_0.JPEG")


def test_image_folder_sees_the_classes(folder, script):
    """torchvision's ImageFolder finds the classes of wnids.txt in order and each image once."""
    datasets = pytest.importorskip("torchvision.datasets")
    script.prepare(folder)
    found = datasets.ImageFolder(folder / "val_sorted")
    assert found.classes == sorted(CLASSES) and len(found.samples) == 6
    assert found.class_to_idx == datasets.ImageFolder(folder / "train", allow_empty=True).class_to_idx


def test_copies_where_links_are_impossible(folder, script, monkeypatch):
    """A file system without hard links gets copies."""
    monkeypatch.setattr(script.os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    script.prepare(folder)
    assert tree(folder / "val_sorted") == EXPECTED
    assert not (folder / "val_sorted/n03/val_0.JPEG").samefile(folder / "val/images/val_0.JPEG")


@pytest.mark.parametrize("killed", [False, True])
def test_interrupted_run_leaves_no_half_state(folder, script, monkeypatch, killed):
    """After an interrupt or a kill there is no val_sorted, and the next run completes it and cleans up."""
    before, link, done = tree(folder), os.link, []

    def interrupted(source, target):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(link(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(script.os, "link", interrupted)
        if killed:  # a killed process does not clean up
            patch.setattr(script.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            script.prepare(folder)
    assert not (folder / "val_sorted").exists() and (folder / script.PARTIAL).exists() == killed
    script.prepare(folder)
    assert tree(folder) == before | {f"val_sorted/{name}": content for name, content in EXPECTED.items()}


def test_interrupt_is_one_line_and_the_next_run_completes(folder, script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["preprocess_tinyimagenet.py", str(folder)])
    with monkeypatch.context() as patch:
        patch.setattr(script.os, "link", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit) as stop:
            script.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 130 and not out and err == "preprocess_tinyimagenet.py: interrupted: run it again\n"
    script.main()
    assert tree(folder / "val_sorted") == EXPECTED


def change(folder, name, text):
    """Append text or bytes to a file, or remove the file or folder if the text is None."""
    path = folder / name
    if text is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.write_bytes(path.read_bytes() + (text if isinstance(text, bytes) else text.encode()))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("wnids.txt", None, "not TinyImageNet"),
        ("val/images", None, "unpack"),
        ("val/val_annotations.txt", None, "unpack"),
        ("val/images/val_4.JPEG", None, "1 of 6 annotated images are missing, the first is val_4.JPEG"),
        ("train/n02", None, "no folder in train/, the first is n02"),
        ("wnids.txt", "\nn04", "no folder in train/, the first is n04"),
        ("val/val_annotations.txt", "val_0.JPEG\tn01\n", "line 7"),
        ("val/val_annotations.txt", "../val_9.JPEG\tn01\n", "line 7"),
        ("val/val_annotations.txt", "val_9.JPEG\tn09\t0\n", "line 7"),
        ("val/val_annotations.txt", "val_9.JPEG", "line 7"),
        ("val/val_annotations.txt", b"\xff\xfe", "val_annotations.txt: not UTF-8 text"),
        ("wnids.txt", b"\xe9", "wnids.txt: not UTF-8 text"),
    ],
)
def test_wrong_folder_is_one_line(folder, name, text, message):
    """Anything missing or odd ends in one line on stderr, exit status 2, and no val_sorted."""
    change(folder, name, text)
    process = run_script(folder.parent, str(folder))
    assert process.returncode == 2 and not process.stdout and len(process.stderr.splitlines()) == 1
    assert message in process.stderr and not (folder / "val_sorted").exists()


def test_class_without_images(folder, script):
    """A class of wnids.txt without a validation image is an error."""
    change(folder, "wnids.txt", "\nn04")
    (folder / "train" / "n04").mkdir()
    with pytest.raises(ValueError, match="1 of 4 classes have no image, the first is n04"):
        script.prepare(folder)


def test_changed_val_sorted_is_not_overwritten(folder, script):
    """A val_sorted that does not match is reported and left alone."""
    script.prepare(folder)
    (folder / "val_sorted/n03/val_0.JPEG").unlink()
    with pytest.raises(ValueError, match="move it away"):
        script.prepare(folder)
    assert len(tree(folder / "val_sorted")) == 5


def test_already_sorted_val(folder, script):
    """A val/ that another tool sorted into class folders needs nothing."""
    for name in CLASSES:
        (folder / "val" / name).mkdir()
    shutil.rmtree(folder / "val" / "images")
    assert "nothing to do" in script.prepare(folder)


@pytest.mark.parametrize("words", [["absent"], ["one", "too many"], ["--unknown"]])
def test_wrong_command_is_one_line(tmp_path, words):
    """A folder that is not there, and words that mean nothing."""
    process = run_script(tmp_path, *words)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
