"""The flags of networks from elsewhere (torchvision, timm, a file), and the creation of every network that is named."""

import argparse
import contextlib
from typing import Any

import torch
from torch import nn

import models
from models import hub
from models.cost import branch_costs
from models.tracer import TraceError
from options.parser import Parser, positive
from utils import Checkpoint, UserError, first_line, print_main


def add_networks(parser: Parser) -> None:
    """Add what shapes the auxiliary branches that are generated for networks from elsewhere."""
    title = "torchvision/NAME, timm/NAME, FILE.py:FUNCTION, each with or without _aux"
    add = parser.add_argument_group(title).add_argument
    add("--taps", type=positive, help="auxiliary branches, at most (default: 4)")
    add("--branches", choices=["copy", "light"], help="copies of the rest of the network (default), or cheap ones")
    add("--classifier", metavar="LAYER", help="layer that makes the logits, if the network has several")


def create(
    args: argparse.Namespace,
    name: str,
    num_classes: int,
    size: int,
    rotations: int = 4,
    checkpoint: Checkpoint | None = None,
) -> nn.Module:
    """Return the network `name`, newly initialised, for images of `size` pixels; UserError if that is impossible.

    Its branches are shaped by the command line, or as those in `checkpoint` if it records that.
    """
    recorded = checkpoint.content.get("args") if checkpoint else None
    given = recorded if isinstance(recorded, dict) and "branches" in recorded else {}
    flags = {key: getattr(args, key, None) for key in ("taps", "branches", "classifier")}
    shaping = {key: value for key in flags if (value := (given or flags).get(key))}
    try:
        network = models.create(name, num_classes, rotations, size=size, **shaping)
        if models.is_external(name) and not models.is_aux(name) and not models.is_pair(name):
            with torch.no_grad():  # what the network says of images of this size, in its own words
                outputs = network.eval()(torch.zeros(1, 3, size, size))
            if checkpoint is None:  # it is to be trained, and tested with its heads
                models.check_outputs(outputs, num_classes)
            network.train()
            with contextlib.suppress(ValueError):  # methods that read no stages train it all the same
                models.read_stages(network, torch.zeros(1, 3, size, size))
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        advice = "; --method kd and dkd need no branches" if isinstance(error, TraceError) else ""
        raise UserError(f"{name}, images of {size} pixels: {first_line(error)}{advice}") from None
    if models.is_external(name) and models.is_aux(name) and checkpoint is None:  # it is to be trained
        costs = branch_costs(name, num_classes, size, rotations=rotations, **shaping).items()
        each = (f"{kind} {c['parameters'] / 1e6:.2f} M and {c['multiply_adds'] / 1e6:.0f} M" for kind, c in costs)
        print_main(f"{name}: parameters and multiply-adds, without branches and with each kind: {'; '.join(each)}")
    return network


def own_reading(name: str, info: dict[str, Any]) -> dict[str, Any]:
    """Return how images of a library's network are read: mean, std, size and margin; empty for other networks.

    `info` is what its weights record of their data set, if they do: then the mean and the std alone are the library's.
    """
    name = models.backbone_name(name)
    if not models.is_external(name) or models.is_file(name) or "dataset" in info:
        return own_statistics(name)
    return {**own_statistics(name), "size": hub.default_size(name), "margin": hub.margin(name)}


def own_statistics(name: str) -> dict[str, Any]:
    """Return the mean and the standard deviation that a library's network was made for; empty for others."""
    found = models.normalisation(models.backbone_name(name))
    return dict(zip(("mean", "std"), found, strict=True)) if found else {}


def named(arch: str | None, checkpoint: Checkpoint, net: int | None = None) -> str:
    """Return the network whose weights a file holds: `arch` of the command line, or else what the file records.

    Of a mutual pair it is the network `net`. UserError if neither says, or if the file names a file to be run.
    """
    name = arch or checkpoint.arch
    if name is None:
        raise UserError(f"{checkpoint.path} does not record its network: name it with --arch")
    if models.is_file(name) and not arch:
        raise UserError(f"{checkpoint.path} is of {name}: to run that file, name it with --arch")
    try:
        plain = models.backbone_name(name, net or checkpoint.best_net or 1)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None
    return f"{plain}_aux" if models.is_pair(name) else name
