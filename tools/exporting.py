"""Trained networks in files for other programs: written, read back, compared with the network, and timed."""

import copy
import importlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tools import onnx_files
from utils import UserError, first_line, replacing

FORMATS = ("onnx", "pt2", "safetensors", "state_dict")
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
TOLERANCE = 1e-3  # of the largest logit
BATCH = 32
SECONDS = 0.5  # that a measurement of speed lasts
METADATA = "preprocessing"  # the name of the metadata in files of both kinds

Run = Callable[[Tensor], Tensor]


def check_packages(kind: str) -> None:
    """Raise UserError unless what a format needs is installed."""
    for name in PACKAGES.get(kind, ()):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"--format {kind} needs {name}: pip install -r requirements-extra.txt") from None


def plain(network: nn.Module) -> nn.Module:
    """Return a copy for files: on the CPU, in evaluation mode, in the layout (B, C, H, W) that their readers have."""
    return copy.deepcopy(network).to("cpu", memory_format=torch.contiguous_format).eval().requires_grad_(False)


def write(network: nn.Module, kind: str, path: str | os.PathLike, size: int, metadata: dict[str, Any]) -> None:
    """Write a `plain` network for images of `size` pixels a side to `path`, and `metadata` into it and to `path`.json.

    A state_dict file is the bare dict of tensors, which has no room for metadata. UserError for a network that cannot
    be exported.
    """
    try:
        if kind == "onnx":
            onnx_files.write(network, size, metadata, path)
        elif kind == "pt2":
            write_program(network, size, metadata, path)
        else:
            write_tensors(network, kind, metadata, path)
    except RuntimeError as error:
        raise UserError(f"--format {kind}: the network cannot be exported ({first_line(error)})") from None
    describe(path, metadata)


def write_program(network: nn.Module, size: int, metadata: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a network as torch.export's program of any batch size."""
    example, shapes = (torch.zeros(2, 3, size, size),), ({0: torch.export.Dim("batch")},)
    with onnx_files.quiet():
        program = torch.export.export(network, example, dynamic_shapes=shapes)
    with replacing(path) as file:
        torch.export.save(program, file, extra_files={f"{METADATA}.json": json.dumps(metadata)})


def write_tensors(network: nn.Module, kind: str, metadata: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a network's weights, each with memory of its own, as safetensors or by torch.save."""
    tensors = {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}
    with replacing(path) as file:
        if kind == "safetensors":
            from safetensors.torch import save

            file.write(save(tensors, {METADATA: json.dumps(metadata)}))
        else:
            torch.save(tensors, file)


def describe(path: str | os.PathLike, metadata: dict[str, Any]) -> None:
    """Write `path`.json."""
    with replacing(f"{path}.json", "w") as file:
        file.write(json.dumps(metadata, indent=1) + "\n")


def remove(path: str | os.PathLike) -> None:
    """Remove a file that `write` wrote, and the one beside it."""
    os.remove(path)
    os.remove(f"{path}.json")


def read_back(network: nn.Module, kind: str, path: str | os.PathLike) -> Run:
    """Return what a written file computes, images (B, 3, S, S) -> logits (B, N).

    Weights alone are loaded into a copy of `network` that has none of its own.
    """
    if kind == "onnx":
        return onnx_files.runner(path)
    if kind == "pt2":
        return torch.export.load(path).module()
    if kind == "safetensors":
        from safetensors.torch import load_file as load
    else:
        load = torch.load
    blank = copy.deepcopy(network)
    for value in blank.state_dict().values():
        value.zero_()
    blank.load_state_dict(load(path))
    return blank


def joined(batches: Iterable[Tensor]) -> Tensor:
    """Return batches of images as one (B, 3, S, S), in the layout of `plain`."""
    return torch.cat(list(batches)).contiguous()


class Comparison(NamedTuple):
    """How the logits of two networks differ on the same images."""

    images: int
    equal: int  # images with the same decision
    difference: float  # the largest between two logits
    largest: float  # logit of the first network, without its sign

    @property
    def is_close(self) -> bool:
        """Whether the difference is rounding; false if a logit is not a number."""
        return self.difference <= TOLERANCE * self.largest


def logits_of(run: Run, images: Tensor) -> Tensor:
    """Return the logits (B, N) of images (B, 3, S, S), computed in small batches."""
    with torch.no_grad():
        return torch.cat([run(part).float() for part in images.split(BATCH)])


def compare(first: Run, second: Run, images: Tensor) -> Comparison:
    """Return how two networks differ on images (B, 3, S, S)."""
    ours, theirs = logits_of(first, images), logits_of(second, images)
    equal = (ours.argmax(1) == theirs.argmax(1)).sum().item()
    return Comparison(len(images), equal, (ours - theirs).abs().max().item(), ours.abs().max().item())


def rate(run: Run, images: Tensor) -> float:
    """Return the images per second of a network on a batch of images (B, 3, S, S), after a first pass."""
    with torch.no_grad():
        run(images)
        began, passes = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < SECONDS:
            run(images)
            passes += 1
    return passes * len(images) / spent


def top1(run: Run, batches: Iterable) -> float:
    """Return the accuracy of a network in percent on batches of (images, labels)."""
    right = [(logits_of(run, images).argmax(1) == labels).float() for images, labels in batches]
    return 100 * torch.cat(right).mean().item()


def table(runs: dict[str, Run], images: Tensor) -> Iterator[str]:
    """Yield the lines of a table of networks by the names of their files; all are compared with the first, a module."""
    first = next(iter(runs.values()))
    width = max(map(len, runs))
    yield f"{'':{width}}      MB  largest difference  equal decisions  ms an image  images/s in batches of {BATCH}"
    for name, run in runs.items():
        size = os.path.getsize(name) if run is not first else sum(t.nbytes for t in first.state_dict().values())
        found = compare(first, run, images)
        equal = f"{found.equal} of {found.images}"
        difference = f"{found.difference:.1e} of {found.largest:.3g}"
        single, batched = rate(run, images[:1]), rate(run, images[:BATCH])
        yield f"{name:{width}}  {size / 1e6:6.2f}  {difference:>18}  {equal:>15}  {1000 / single:11.3f}  {batched:.0f}"
