"""CIFAR-10, CIFAR-100 and STL-10: torchvision downloads and reads them; other CIFAR folders are read here."""

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision import datasets

from utils import UserError, first_line, warn


class STL10(datasets.STL10):
    """torchvision's reader without the 2.7 GB of unlabelled images, which are neither checked nor needed."""

    train_list = datasets.STL10.train_list[:2]


READERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": STL10}


def load(name: str, root: str, train: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return (images (N, 3, S, S) uint8, labels (N,) int64, class names) of a split of `name`.

    The archive is downloaded if its folder below `root` is missing. A CIFAR folder with other checksums than the
    published ones is read with a warning. Raises UserError if the download fails or a file is damaged.
    """
    reader = READERS[name]
    folder = Path(root) / reader.base_folder
    is_new = not folder.is_dir()
    split = {"split": "train" if train else "test"} if name == "stl10" else {"train": train}
    try:
        found = reader(root, **split, download=is_new)
    except (OSError, RuntimeError) as error:
        if is_new:
            message = f"{name}: cannot download {reader.url} ({first_line(error)}); unpack it so that {folder} exists"
            raise UserError(message) from None
        if name == "stl10":
            raise UserError(f"{folder} is damaged or incomplete: move it away and unpack {reader.url} again") from None
        if train:
            warn(f"warning: {folder} is not the published archive (its checksums differ)")
        return read_other_cifar(folder, reader, train)
    if name == "stl10":
        return torch.from_numpy(found.data).contiguous(), torch.from_numpy(found.labels).long(), found.classes
    return torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets), found.classes


class ArrayUnpickler(pickle.Unpickler):
    """Reads plain Python values and numpy arrays; refuses everything else that a pickle may ask for."""

    ALLOWED = r"numpy\.(ndarray|dtype)|numpy\._?core\.(multiarray\._reconstruct|numeric\._frombuffer)|_codecs\.encode"

    def find_class(self, module: str, name: str) -> Any:
        """Return `module.name` if it belongs to an array; raise UnpicklingError otherwise."""
        if not re.fullmatch(self.ALLOWED, f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_other_cifar(folder: Path, reader: type, train: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Return what `load` returns, from CIFAR's pickles, whose keys and names may be texts or bytes."""
    names_key = reader.meta["key"]
    files = [reader.meta["filename"], *(file for file, _ in (reader.train_list if train else reader.test_list))]
    images, labels = [], []
    for path in (folder / file for file in files):
        try:
            content = ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
            content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
            if names_key in content:
                classes = [name.decode() if isinstance(name, bytes) else name for name in content[names_key]]
                continue
            images.append(np.asarray(content["data"], np.uint8).reshape(-1, 3, 32, 32))
            labels += content[names_key.replace("_names", "s")]  # fine_label_names: fine_labels
            if len(labels) != sum(map(len, images)) or not set(labels) <= set(range(len(classes))):
                raise ValueError("its labels do not fit its images or the class names")
        except Exception as error:  # damaged pickles raise a dozen kinds
            raise UserError(
                f"{path} is damaged ({first_line(error)}): move {folder} away and unpack it again"
            ) from None
    return torch.from_numpy(np.concatenate(images)), torch.tensor(labels, dtype=torch.int64), classes
