"""Trained networks in files for other programs: written, read back, compared with the network, and timed.

What has to do with ONNX needs the packages of requirements-extra.txt.
"""

import contextlib
import copy
import importlib.util
import json
import logging
import os
import tempfile
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from models import state_dicts
from utils import UserError, first_line, read_file, replacing, save_checkpoint

FORMATS = ("onnx", "pt2", "safetensors", "state_dict")
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-3  # of the largest logit
BATCH = 32
METADATA = "preprocessing"  # its name in .pt2 and .safetensors files

Run = Callable[[Tensor], Tensor]


def check_packages() -> None:
    """Raise UserError unless what ONNX files need is installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if not importlib.util.find_spec(name):
            raise UserError(f"--format onnx needs {name}: pip install -r requirements-extra.txt")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and warnings of exporters and quantizers."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        yield


def plain(network: nn.Module) -> nn.Module:
    """Return a copy for files: on the CPU, in evaluation mode, in the layout (B, C, H, W) that their readers have."""
    return copy.deepcopy(network).to("cpu", memory_format=torch.contiguous_format).eval().requires_grad_(False)


def write(network: nn.Module, kind: str, path: str, size: int, metadata: dict[str, Any]) -> None:
    """Write a `plain` network for images of `size` pixels a side to `path`, and `metadata` into it and to `path`.json.

    A state_dict file is the bare dict of tensors, which has no room for metadata. UserError for a network that cannot
    be exported.
    """
    example, shapes = (torch.zeros(2, 3, size, size),), ({0: torch.export.Dim("batch")},)
    names = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_shapes": shapes}
    try:
        with quiet():
            if kind == "onnx":
                program = torch.onnx.export(network, example, dynamo=True, verbose=False, **names)
                save_onnx(program.model_proto, metadata, path)
            elif kind == "pt2":
                program = torch.export.export(network, example, dynamic_shapes=shapes)
                with replacing(path) as file:
                    torch.export.save(program, file, extra_files={f"{METADATA}.json": json.dumps(metadata)})
            else:  # each tensor with memory of its own
                tensors = {name: value.clone().contiguous() for name, value in network.state_dict().items()}
                if kind == "safetensors":
                    with replacing(path) as file:
                        file.write(safetensors.torch.save(tensors, {METADATA: json.dumps(metadata)}))
                else:
                    save_checkpoint(tensors, path)
    except RuntimeError as error:
        raise UserError(f"--format {kind}: the network cannot be exported ({first_line(error)})") from None
    describe(path, metadata)


def save_onnx(model: Any, metadata: dict[str, Any], path: str) -> None:
    """Write an ONNX model with each entry of its metadata as JSON, whole or not at all."""
    import onnx

    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    with replacing(path) as file:
        file.write(model.SerializeToString())


def describe(path: str, metadata: dict[str, Any]) -> None:
    """Write `path`.json."""
    with replacing(f"{path}.json", "w") as file:
        file.write(json.dumps(metadata, indent=1) + "\n")


def quantize(path: str, quantized: str, batches: Iterator[Tensor], metadata: dict[str, Any]) -> None:
    """Write the network of the ONNX file `path` with 8-bit weights and activations (QDQ) to the file `quantized`.

    The ranges of the activations are those that batches of images (B, 3, S, S) cause.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        """Hands out the batches as onnxruntime asks for them."""

        def get_next(self):
            return next(({INPUT: batch.contiguous().numpy()} for batch in batches), None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared, found = os.path.join(folder, "prepared.onnx"), os.path.join(folder, "quantized.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, found, Batches(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
        save_onnx(onnx.load(found), metadata, quantized)
    describe(quantized, metadata)


def read_back(network: nn.Module, kind: str, path: str) -> Run:
    """Return what a written file computes on the CPU, images (B, 3, S, S) float32 -> logits (B, N).

    Weights alone are loaded into a copy of `network`.
    """
    if kind == "onnx":
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        program = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(program.run([OUTPUT], {INPUT: images.contiguous().numpy()})[0])
    if kind == "pt2":
        return torch.export.load(path).module()
    network = copy.deepcopy(network)
    state_dicts.load(network, read_file(path))
    return network


class Comparison(NamedTuple):
    """How the logits of two networks differ on the same images."""

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
    return Comparison(equal, (ours - theirs).abs().max().item(), ours.abs().max().item())


@torch.no_grad()
def seconds(run: Run, images: Tensor) -> float:
    """Return the seconds in which a network computes a batch of images (B, 3, S, S)."""
    count, taken = timeit.Timer(lambda: run(images)).autorange()
    return taken / count


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
        found, part = compare(first, run, images), images[:BATCH]
        cells = f"{found.difference:.1e} of {found.largest:.3g}", f"{found.equal} of {len(images)}"
        shown = f"{name:{width}}  {size / 1e6:6.2f}  {cells[0]:>18}  {cells[1]:>15}"
        yield f"{shown}  {1000 * seconds(run, images[:1]):11.3f}  {len(part) / seconds(run, part):.0f}"
