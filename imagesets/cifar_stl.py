"""CIFAR-10, CIFAR-100 and STL-10: torchvision downloads their published archives, and their files are read here.

Folders of the same layout with other contents, such as a subset, are read too; no file's code is executed.
"""

from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np

from pickles import ArrayUnpickler
from utils import UserError, first_line, is_first_process, warn

MAKERS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}  # torchvision's classes


def load(kind, root, train):
    """Return (images (N, 3, S, S) uint8, labels (N,) int64, class names) of a split of the archive `kind` below `root`.

    It is downloaded where its folder is not there; a folder of other contents than the published ones is read with a
    warning. Raises UserError saying what to put where, or which file is damaged.
    """
    from torchvision import datasets as tv  # a second of import that other data sets do not need

    published = getattr(tv, MAKERS[kind])
    folder = Path(root) / published.base_folder
    if not folder.is_dir():
        download(kind, published, folder)
    # STL-10's unlabelled images, most of its archive, have no part in this.
    sums = dict(entry for entry in [*published.train_list, *published.test_list] if not entry[0].startswith("unlabeled"))
    if kind == "stl10":
        names_file = published.class_names_file
    else:
        names_file = published.meta["filename"]
        sums[names_file] = published.meta["md5"]
    for name in [*sums, names_file]:
        with named(folder / name) as path:
            path.stat()
    read = read_stl10 if kind == "stl10" else read_cifar
    found = read(published, folder, train)
    if not len(found[0]):
        raise UserError(f"{folder}: no {'training' if train else 'test'} images")
    if not train:  # every command reads the test images, and reads them last
        warn_of_other_contents(folder, sums)
    return found


def download(kind, published, folder):
    """Download and unpack the archive that becomes `folder`; UserError where that fails."""
    from torchvision.datasets.utils import download_and_extract_archive

    is_new = not folder.parent.exists()
    try:
        download_and_extract_archive(published.url, str(folder.parent), filename=published.filename, md5=published.tgz_md5)
    except (OSError, RuntimeError, EOFError, ValueError, HTTPException) as error:
        if folder.is_dir():
            raise damaged(folder, first_line(error)) from None
        if is_new:
            with suppress(OSError):  # where something of it is there
                folder.parent.rmdir()
        raise UserError(f"{kind}: unpack its archive so that {folder} exists ({first_line(error)})") from None


def damaged(folder, reason):
    """Return the error of a folder that cannot be read."""
    return UserError(f"{folder} is damaged or incomplete ({reason}): move it away, to download or unpack it again")


@contextmanager
def named(path):
    """Turn whatever fails in reading the file `path` into a UserError that names it."""
    try:
        yield path
    except Exception as error:  # damaged pickles fail in a dozen ways
        raise damaged(path.parent, f"{path.name}: {getattr(error, 'strerror', None) or first_line(error)}") from None


def warn_of_other_contents(folder, sums):
    """Warn, from the first process, where the files of `folder` have other checksums than the published `sums`."""
    from torchvision.datasets.utils import check_integrity

    if is_first_process() and not all(check_integrity(folder / name, md5) for name, md5 in sums.items()):
        warn(f"warning: {folder} is not the published archive (checksums differ): read as it is")


def text(value):
    """Return bytes as text, and other values as they are."""
    return value.decode("latin1") if isinstance(value, bytes) else value


def entries(path, *keys):
    """Return the entries `keys` of the dict pickled at `path`."""
    content = path.read_bytes()
    try:
        found = ArrayUnpickler(content).load()
    except KeyError:  # of an instruction that there is not, or a value that was not kept
        raise ValueError(f"no pickle, or a damaged one (it begins with {str(content[:9])[1:]})") from None
    if isinstance(found, dict):  # read with encoding="bytes" and written again, it has bytes for texts
        found = {text(key): value for key, value in found.items()}
    lacking = [key for key in keys if not isinstance(found, dict) or key not in found]
    if lacking:
        raise ValueError(f"it has no entry {lacking[0]!r}")
    return [found[key] for key in keys]


def checked_labels(labels, count, num_classes):
    """Return `labels` as (count,) int64; ValueError unless they are `count` numbers of classes."""
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"labels of shape {labels.shape} for {count} images")
    if count and labels.dtype.kind not in "iu":
        raise ValueError("labels that are no whole numbers")
    if count and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, but {num_classes} class names")
    return labels.astype(np.int64)


def read_cifar(published, folder, train):
    """Return (images, labels, class names) of a split out of CIFAR's pickles."""
    names_key = published.meta["key"]
    labels_key = names_key.replace("_names", "s")  # label_names, labels; fine_label_names, fine_labels
    with named(folder / published.meta["filename"]) as path:
        (classes,) = entries(path, names_key)
        classes = [text(name) for name in classes] if isinstance(classes, list) else None
        if classes is None or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"its {names_key} are no list of texts")
    images, labels = [], []
    for name, _ in published.train_list if train else published.test_list:
        with named(folder / name) as path:
            pixels, numbers = entries(path, "data", labels_key)
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * 32 * 32,):
                raise ValueError("its data is no array (N, 3072) of uint8")
            images.append(np.asarray(pixels).reshape(-1, 3, 32, 32))
            labels.append(checked_labels(numbers, len(pixels), len(classes)))
    return np.concatenate(images), np.concatenate(labels), classes


def read_stl10(published, folder, train):
    """Return (images, labels, class names) of a split out of STL-10's binary files."""
    (images_file, _), (labels_file, _) = (published.train_list if train else published.test_list)[:2]
    with named(folder / published.class_names_file) as path:
        classes = path.read_text("utf-8").splitlines()
    with named(folder / images_file) as path:
        pixels = np.fromfile(path, np.uint8)
        if pixels.size % (3 * 96 * 96):
            raise ValueError(f"{pixels.size} bytes, which is no whole number of images")
        images = np.ascontiguousarray(pixels.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2))  # stored column by column
    with named(folder / labels_file) as path:
        labels = checked_labels(np.fromfile(path, np.uint8).astype(np.int64) - 1, len(images), len(classes))
    return images, labels, classes
