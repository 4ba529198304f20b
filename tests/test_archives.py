"""CIFAR-10, CIFAR-100 and STL-10: what is read, what is read with a warning, what is refused, and that nothing is executed."""

import os
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import datasets
import pickles
from utils import UserError

KEYS = {"cifar10": ("labels", "label_names"), "cifar100": ("fine_labels", "fine_label_names")}
PLACES = {"cifar100": "cifar-100-python", "cifar10": "cifar-10-batches-py", "stl10": "stl10_binary"}


class Python2Pickler(pickle._Pickler):
    """Writes texts and bytes alike, as Python 2 wrote the published archives."""

    def save_text(self, text):
        """Write a text or bytes as Python 2's string."""
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch = {**pickle._Pickler.dispatch, str: save_text, bytes: save_text}


def pickled(path, content, protocol):
    """Write `content` at `path` by a pickle protocol, or as Python 2 and the numpy of its time did where it is None."""
    with open(path, "wb") as file:
        if protocol is None:
            Python2Pickler(file, 2).dump(content)
        else:
            pickle.dump(content, file, protocol)
    if protocol is None:
        path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))


def write_cifar(root, kind, protocol=2, count=2):
    """Write CIFAR's files with `count` random images each; return {file: its dict}."""
    maker = getattr(torchvision.datasets, kind.upper())
    folder, draw, classes = root / maker.base_folder, np.random.RandomState(0), int(kind[5:])
    labels_key, names_key = KEYS[kind]
    folder.mkdir(parents=True)
    written = {}
    for name, _ in [*maker.train_list, *maker.test_list]:
        labels = draw.randint(0, classes, count).tolist()
        written[name] = {"data": draw.randint(0, 256, (count, 3072), np.uint8), labels_key: labels, "batch_label": name}
    written[maker.meta["filename"]] = {names_key: [f"class{i}" for i in range(classes)], "num_vis": 3072}
    for name, content in written.items():
        pickled(folder / name, content, protocol)
    return written


def write_stl10(root):
    """Write STL-10's files with 20 random images each, classes counted from 1; return {split: (images, labels)}."""
    folder, draw, written = root / "stl10_binary", np.random.RandomState(0), {}
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("".join(f"class{i}\n" for i in range(10)))
    for split in ("train", "test"):
        images, labels = draw.randint(0, 256, (20, 3, 96, 96), np.uint8), draw.randint(0, 10, 20)
        images.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
        (labels + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
        written[split] = images, labels
    return written


def write(root, kind):
    """Write a small archive's folder and return it."""
    write_stl10(root) if kind == "stl10" else write_cifar(root, kind)
    return root / PLACES[kind]


def refused(kind, root):
    """Return the one line that reading both splits ends in."""
    with pytest.raises(UserError) as error:
        for train in (True, False):
            datasets.load(kind, str(root), train)
    text = str(error.value)
    assert len(text.splitlines()) == 1 and str(root / PLACES[kind]) in text
    return text


@pytest.mark.parametrize("kind", PLACES)
def test_missing_data_is_one_line_that_says_what_to_put_where(kind, monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", no_network)
    assert f"{kind}: unpack its archive so that" in refused(kind, tmp_path)


@pytest.mark.parametrize("kind", PLACES)
def test_missing_data_is_downloaded_as_torchvision_does(kind, monkeypatch, tmp_path):
    def download(*called):
        write(tmp_path, kind)
        wanted.append(called)

    wanted, maker = [], getattr(torchvision.datasets, kind.upper())
    as_ours = lambda url, root, filename, md5: download(url, root, filename, md5)  # noqa: E731
    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", as_ours)
    for train in (True, False):
        assert len(datasets.load(kind, str(tmp_path), train)) > 0
    assert wanted == [(maker.url, str(tmp_path), maker.filename, maker.tgz_md5)]


def test_download_that_breaks_off_is_told(monkeypatch, tmp_path):
    def half(*_, **__):
        (write(tmp_path, "cifar10") / "test_batch").unlink()
        raise OSError("disk full")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", half)
    assert "is damaged or incomplete (disk full): move it away" in refused("cifar10", tmp_path)
    assert "is damaged or incomplete (test_batch: No such file or directory)" in refused("cifar10", tmp_path)


def test_download_that_fails_leaves_no_folder(monkeypatch, tmp_path):
    def none(url, root, **_):
        Path(root).mkdir()
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", none)
    assert "unpack its archive" in refused("cifar10", tmp_path / "typo") and not list(tmp_path.iterdir())


def test_bytes_for_texts_are_read(tmp_path):
    """As pickle.load(file, encoding="bytes") and pickle.dump leave them."""
    for name, content in write_cifar(tmp_path, "cifar10").items():
        found = {
            key.encode(): [text.encode() for text in value] if key == "label_names" else value for key, value in content.items()
        }
        pickled(tmp_path / "cifar-10-batches-py" / name, found, 4)
    assert datasets.load("cifar10", str(tmp_path), False).classes == [f"class{i}" for i in range(10)]


@pytest.mark.parametrize("protocol", [None, 0, 2, 4, 5])
@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_is_read_as_torchvision_reads_it(kind, protocol, monkeypatch, tmp_path):
    """Pixels, labels, class names and statistics, from files as Python 2 wrote them and as anyone writes them today."""
    written, maker = write_cifar(tmp_path, kind, protocol), getattr(torchvision.datasets, kind.upper())
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # these files' sums are others
    for train, files in ((True, maker.train_list), (False, maker.test_list)):
        found, theirs = datasets.load(kind, str(tmp_path), train), maker(tmp_path, train)
        pixels = np.concatenate([written[name]["data"] for name, _ in files]).reshape(-1, 3, 32, 32)
        assert torch.equal(found.images(), torch.from_numpy(pixels)) and found.flip
        assert np.array_equal(theirs.data.transpose(0, 3, 1, 2), pixels)
        labels = [label for name, _ in files for label in written[name][KEYS[kind][0]]]
        assert found.labels.tolist() == theirs.targets == labels
        assert found.classes == theirs.classes == [f"class{i}" for i in range(int(kind[5:]))]
    if kind == "cifar100":
        assert found.statistics == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def test_stl10_is_read_as_torchvision_reads_it(monkeypatch, tmp_path):
    written = write_stl10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *_: True)
    for split, (images, labels) in written.items():
        found, theirs = datasets.load("stl10", str(tmp_path), split == "train"), torchvision.datasets.STL10(tmp_path, split)
        assert torch.equal(found.images(), torch.from_numpy(images)) and np.array_equal(theirs.data, images)
        assert found.labels.tolist() == theirs.labels.tolist() == labels.tolist()
        assert found.classes == theirs.classes and found.size == 96


@pytest.mark.parametrize("rank", [None, "0", "1"])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", PLACES)
def test_other_contents_than_the_published_are_told_once(kind, published, rank, monkeypatch, tmp_path, capsys):
    folder = write(tmp_path, kind)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    if published:
        monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda path, md5: len(md5) == 32 and path.is_file())
    for train in (True, False):
        datasets.load(kind, str(tmp_path), train)
    told = f"warning: {folder} is not the published archive (checksums differ): read as it is\n"
    assert capsys.readouterr().err == ("" if published or rank == "1" else told)


def test_subsets_and_labels_in_arrays(tmp_path):
    """An empty batch, labels as an array or as numpy's numbers, and few classes."""
    write_cifar(tmp_path, "cifar10")
    folder, pixels = tmp_path / PLACES["cifar10"], np.zeros((2, 3072), np.uint8)
    pickled(folder / "data_batch_1", {"data": pixels[:0], "labels": []}, 2)
    for number, labels in ((2, np.array([1, 0])), (3, np.array([1, 0], ">i4")), (4, [np.int64(1), np.uint8(0)]), (5, (1, 0))):
        pickled(folder / f"data_batch_{number}", {"data": pixels, "labels": labels}, number)
    pickled(folder / "test_batch", {"data": np.asfortranarray(pixels), "labels": [0, 1]}, 5)
    pickled(folder / "batches.meta", {"label_names": ["cat", "dog"]}, 2)
    train, test = (datasets.load("cifar10", str(tmp_path), train) for train in (True, False))
    assert train.labels.tolist() == [1, 0] * 4 and test.labels.tolist() == [0, 1] and test.classes == ["cat", "dog"]


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([PIXELS, [0, 1]], "no entry 'data'"),
        ({"data": PIXELS}, "no entry 'labels'"),
        ({"data": PIXELS, "fine_labels": [0, 1]}, "no entry 'labels'"),
        ({"data": PIXELS, "labels": [0]}, "labels of shape (1,) for 2 images"),
        ({"data": PIXELS, "labels": [[0], [1]]}, "labels of shape (2, 1) for 2 images"),
        ({"data": PIXELS, "labels": [[0], [1, 2]]}, ""),
        ({"data": PIXELS, "labels": None}, "labels of shape ()"),
        ({"data": PIXELS, "labels": [0, 10]}, "labels from 0 to 10, but 10 class names"),
        ({"data": PIXELS, "labels": [-1, 0]}, "labels from -1 to 0"),
        ({"data": PIXELS, "labels": [0, 10**30]}, "no whole numbers"),
        ({"data": PIXELS, "labels": [0, 0.5]}, "no whole numbers"),
        ({"data": PIXELS, "labels": ["0", "1"]}, "no whole numbers"),
        ({"data": PIXELS[:, :3000], "labels": [0, 1]}, "no array (N, 3072) of uint8"),
        ({"data": PIXELS.reshape(2, 3, 32, 32), "labels": [0, 1]}, "no array (N, 3072) of uint8"),
        ({"data": PIXELS.astype(np.int64), "labels": [0, 1]}, "no array (N, 3072) of uint8"),
        ({"data": PIXELS.astype(np.float32), "labels": [0, 1]}, "no array (N, 3072) of uint8"),
        ({"data": PIXELS.astype(object), "labels": [0, 1]}, "values of type O8"),
        ({"data": PIXELS.tolist(), "labels": [0, 1]}, "no array (N, 3072) of uint8"),
        ({"data": PIXELS, "labels": {0, 1}}, ""),
        ({"data": PIXELS, "labels": [0, 1], "odd": print}, "it asks for __builtin__.print"),
        ({"data": PIXELS, "labels": [0, 1], "odd": np.load}, "it asks for numpy.load"),
        ({"data": PIXELS, "labels": [0, 1], "odd": torch.zeros(1)}, "it asks for torch._utils"),
    ],
)
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_cifar_of_wrong_contents_is_one_line(content, said, name, tmp_path, capsys):
    write_cifar(tmp_path, "cifar10")
    pickled(tmp_path / PLACES["cifar10"] / name, content, 2)
    text = refused("cifar10", tmp_path)
    assert f"is damaged or incomplete ({name}: " in text and said in text and "move it away" in text
    assert not capsys.readouterr().err


def test_a_page_in_place_of_a_pickle(tmp_path):
    write_cifar(tmp_path, "cifar10")
    (tmp_path / PLACES["cifar10"] / "test_batch").write_text("<!DOCTYPE html><title>404</title>")
    assert "(test_batch: no pickle, or a damaged one (it begins with '<!DOCTYPE'))" in refused("cifar10", tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_no_code_of_a_pickle_is_executed(protocol, tmp_path):
    write_cifar(tmp_path, "cifar100")
    pickled(tmp_path / PLACES["cifar100"] / "train", {"data": Payload(tmp_path / "executed"), "fine_labels": []}, protocol)
    assert "it asks for " in refused("cifar100", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_flags_of_a_type_are_not_taken_from_the_file():
    """They would tell numpy that the numbers are addresses of objects."""
    content = pickle.dumps(np.arange(3, dtype=np.uint8), 2)
    assert content.count(b"K\x00t") == 1
    found = pickles.ArrayUnpickler(content.replace(b"K\x00t", b"K?t")).load()
    assert found.tolist() == [0, 1, 2] and found.dtype.flags == 0


@pytest.mark.parametrize(
    "content",
    [
        pickle.BYTEARRAY8 + struct.pack("<Q", 2**62) + b"12",
        pickle.BINUNICODE8 + struct.pack("<Q", 2**62) + b"12",
        pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 1),
        pickle.FRAME + struct.pack("<Q", 2**62) + b"NN",
    ],
)
def test_memory_is_not_taken_for_what_is_not_there(content):
    with pytest.raises((EOFError, pickle.UnpicklingError, OverflowError)):
        pickles.ArrayUnpickler(pickle.PROTO + b"\x05" + content).load()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"fine_label_names": ["a"]}, "no entry 'label_names'"),
        ({"label_names": "abcdefghij"}, "no list of texts"),
        ({"label_names": list(range(10))}, "no list of texts"),
    ],
)
def test_class_names_that_are_none(content, said, tmp_path):
    write_cifar(tmp_path, "cifar10")
    pickled(tmp_path / PLACES["cifar10"] / "batches.meta", content, 2)
    text = refused("cifar10", tmp_path)
    assert "(batches.meta: " in text and said in text


def test_class_names_fewer_than_classes(tmp_path):
    write_cifar(tmp_path, "cifar10", count=50)
    pickled(tmp_path / PLACES["cifar10"] / "batches.meta", {"label_names": ["a", "b"]}, 2)
    assert "(data_batch_1: labels from 0 to 9, but 2 class names)" in refused("cifar10", tmp_path)


def test_folder_without_images(tmp_path):
    write_cifar(tmp_path, "cifar100", count=0)
    assert "no training images" in refused("cifar100", tmp_path)


@pytest.mark.parametrize("kind", PLACES)
def test_every_file_missing_or_cut_off_is_named(kind, tmp_path):
    folder = write(tmp_path, kind)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.unlink()
        assert f"({path.name}: No such file or directory)" in refused(kind, tmp_path)
        path.mkdir()
        assert f"({path.name}: Is a directory)" in refused(kind, tmp_path)
        path.rmdir()
        for length in (len(whole) - 1, len(whole) // 3) if path.name != "class_names.txt" else ():
            path.write_bytes(whole[:length])
            assert f"({path.name}: " in refused(kind, tmp_path)
        path.write_bytes(whole)
    datasets.load(kind, str(tmp_path), True)


@pytest.mark.parametrize("protocol", [None, 2, 5])
def test_flipped_bytes_are_read_or_told(protocol, tmp_path):
    write_cifar(tmp_path, "cifar100", protocol, count=1)
    path, draw = tmp_path / PLACES["cifar100"] / "test", random.Random(0)
    whole, told = path.read_bytes(), 0
    places = [place for place in range(len(whole)) if not 400 < place < len(whole) - 400]  # most of the rest are pixels
    for _ in range(200):
        content = bytearray(whole)
        content[draw.choice(places)] = draw.randrange(256)
        path.write_bytes(content)
        try:
            datasets.load("cifar100", str(tmp_path), False)
        except UserError as error:
            told += 1
            assert len(str(error).splitlines()) == 1 and "(test: " in str(error)
    assert told


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("train_X.bin", lambda content: content + b"1", "no whole number of images"),
        ("train_X.bin", lambda content: content[: 3 * 96 * 96], "train_y.bin: labels of shape (20,) for 1 images"),
        ("test_y.bin", lambda content: content[:-1] + b"\0", "to 9, but 10 class names"),
        ("test_y.bin", lambda content: content[:-1] + b"\x0b", "to 10, but 10 class names"),
        ("class_names.txt", lambda _: b"\xff\n" * 10, "class_names.txt: 'utf-8' codec can't decode"),
        ("class_names.txt", lambda _: b"", "but 0 class names"),
    ],
)
def test_stl10_of_wrong_contents_is_one_line(name, change, said, tmp_path):
    path = write(tmp_path, "stl10") / name
    path.write_bytes(change(path.read_bytes()))
    text = refused("stl10", tmp_path)
    assert "is damaged or incomplete (" in text and said in text
