"""What published weights fix (tests/data/contract): layouts, forward and step values, and filled networks."""

import functools
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

import models

CONTRACT = Path(__file__).parent / "data" / "contract"


@functools.cache
def layouts() -> dict[str, dict[str, list[int]]]:
    """Return {architecture: {state_dict key: shape}} at 4 rotations."""
    with gzip.open(CONTRACT / "state_dicts.json.gz", "rt") as file:
        return json.load(file)


@functools.cache
def forward_values() -> dict[str, np.ndarray]:
    """Return {"rotations{M}/{architecture}/{eval|train}/{output}": every seventh column}."""
    with np.load(CONTRACT / "forward.npz") as file:
        return dict(file)


@functools.cache
def step_values() -> dict:
    """Return the loss terms and gradient norms of one training step."""
    return json.loads((CONTRACT / "steps.json").read_text())


def classes(name: str) -> int:
    """Return the number of classes that the contract gives an architecture."""
    return 1000 if models.is_imagenet(name) else 100


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the contract's values of one parameter or buffer, drawn from its state_dict key alone."""
    rng = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        values = rng.uniform(0.5, 1.5, shape)
    elif leaf in ("running_mean", "bias"):
        values = rng.normal(0, 0.1, shape)
    elif len(shape) == 1:
        values = rng.uniform(0.25, 0.75, shape)
    else:
        values = rng.normal(0, np.sqrt(1 / np.prod(shape[1:])), shape)
    return values.astype(np.float32)


def filled_network(name: str, rotations: int = 4, num_classes: int | None = None) -> nn.Module:
    """Return the network with the contract's values in every parameter and buffer, in train mode."""
    with torch.device("meta"):
        network = models.create(name, num_classes or classes(name), rotations)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network = network.to_empty(device="cpu")
    network.load_state_dict({key: torch.as_tensor(fill(key, shape)) for key, shape in shapes.items()})
    return network
