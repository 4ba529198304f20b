"""What pickles that nobody vouches for may ask for, and what they get: numbers, arrays and containers, never code.

numpy's own unpickling trusts the file: a wrong flag of a dtype crashes it. Here every array is made anew from its bytes.
"""

import argparse
import io
import pathlib
import pickle
import re
import struct

import numpy as np


class Type:
    """Stands for numpy's dtype of numbers: a code such as u1, and the byte order in its state."""

    def __init__(self, code, *_):
        """Take a code of whole numbers, floating-point numbers or truth values; ValueError for others."""
        if not re.fullmatch(r"[iu][1248]|f[248]|b1", code):
            raise ValueError(f"values of type {code} instead of numbers")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        """Take the byte order; sizes and flags follow from the code."""
        self.order = state[1]

    def read(self, data):
        """Return the numbers (N,) that `data` holds: bytes, or what became of them as Python 2's text."""
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, np.dtype(self.code).newbyteorder(self.order))


class Array(np.ndarray):
    """An array that is empty until it is given the state of a pickled one; ValueError where that is contradictory."""

    def __new__(cls, *_):
        """Return an empty array, whatever is asked for."""
        return super().__new__(cls, 0, np.uint8)

    def __setstate__(self, state):
        """Take shape, type, order of the axes and bytes."""
        shape, kind, by_columns, data = state[-4:]
        checked = kind.read(data).reshape(shape, order="F" if by_columns else "C")
        super().__setstate__((1, checked.shape, checked.dtype, bool(by_columns), checked.tobytes("A")))


def scalar(kind, data):
    """Return the one number of type `kind` that `data` holds."""
    (number,) = kind.read(data)
    return number


def from_buffer(data, kind, shape, order):
    """Return an array of `shape` of the numbers that `data` holds."""
    return kind.read(data).reshape(shape, order=order)


NUMPY = {"numpy.ndarray": Array, "numpy.dtype": Type}
for _core in ("numpy.core", "numpy._core"):  # of numpy 1 and of numpy 2
    NUMPY[f"{_core}.multiarray._reconstruct"] = Array
    NUMPY[f"{_core}.multiarray.scalar"] = scalar
    NUMPY[f"{_core}.numeric._frombuffer"] = from_buffer

# What published checkpoints hold beside tensors: an accuracy, the parsed arguments, which may hold paths, and dicts with a
# default. A path is read as one that opens nothing, such a dict as a plain one.
CHECKPOINT = {**NUMPY, "argparse.Namespace": argparse.Namespace, "collections.defaultdict": lambda *_: {}}
CHECKPOINT |= {f"builtins.{kind.__name__}": kind for kind in (dict, list, int, float)}
for _path in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
    for _module in ("pathlib", "pathlib._local"):  # as Python 3.13 calls it
        CHECKPOINT[f"{_module}.{_path.__name__}"] = _path
        CHECKPOINT[f"{_module}.{_path.__name__.removeprefix('Pure')}"] = _path


class ArrayUnpickler(pickle._Unpickler):
    """Reads numbers, texts, bytes, lists, dicts and arrays of numbers; whatever else a pickle asks for is refused.

    It is Python's own and not the faster one in C, which takes memory as large as the numbers in a damaged file say.
    """

    # What bytes are pickled as for Python 2, which has none; the second where there are none of them.
    ALLOWED = {**NUMPY, "_codecs.encode": lambda text, _: text.encode("latin1"), "__builtin__.bytes": lambda: b""}

    def __init__(self, content):
        """Take the `content` of a file: what Python 2 wrote as a string becomes a text of as many characters."""
        super().__init__(io.BytesIO(content), encoding="latin1")

    def find_class(self, module, name):
        """Return what stands for `module.name`; UnpicklingError unless it is a part of numpy's arrays."""
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[f"{module}.{name}"]

    def load_bytearray8(self):
        """Read the bytes of an array; as many as there are, where the file announces more."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}
