"""ONNX files: written, run by onnxruntime, and quantized to 8 bits; by the packages of requirements-extra.txt."""

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from utils import replacing

INPUT, OUTPUT = "images", "logits"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what exporters and quantizers say of their own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write(network: nn.Module, size: int, metadata: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a network (B, 3, size, size) -> (B, N) of any batch size B, with each entry of `metadata` as JSON."""
    with quiet():
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    save(program.model_proto, metadata, path)


def save(model: Any, metadata: dict[str, Any], path: str | os.PathLike) -> None:
    """Write an ONNX model with its metadata, whole or not at all."""
    import onnx

    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    with replacing(path) as file:
        file.write(model.SerializeToString())


def runner(path: str | os.PathLike) -> Callable[[Tensor], Tensor]:
    """Return a file's network, (B, 3, S, S) float32 -> logits (B, N), on the CPU with as many threads as torch."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(path), settings, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.contiguous().numpy()})[0])


def quantize(
    path: str | os.PathLike, quantized: str | os.PathLike, images: Iterable[Tensor], metadata: dict[str, Any]
) -> None:
    """Write the network of the file `path` with 8-bit weights and activations (QDQ) to the file `quantized`.

    The ranges of the activations are those that batches of `images` (B, 3, S, S) cause.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        """Hands out the batches as onnxruntime asks for them."""

        left = iter(images)

        def get_next(self):
            batch = next(self.left, None)
            return None if batch is None else {INPUT: batch.contiguous().numpy()}

    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared, found = os.path.join(folder, "prepared.onnx"), os.path.join(folder, "quantized.onnx")
        quant_pre_process(os.fspath(path), prepared, skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, found, Batches(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
        save(onnx.load(found), metadata, quantized)
