"""Entry points of torch.hub: every published network by its name.

    torch.hub.load(DIR, "wrn_16_2", source="local", weights=FILE)

DIR is this folder, FILE weights in any layout that `utils.Checkpoint` reads.
"""

import functools

import models
import utils

dependencies = ["torch", "torchvision"]


def _load(name: str, num_classes: int | None = None, rotations: int | None = None, weights: str | None = None):
    """Return the network, with the weights of a file if one is given.

    Classes (else 100) and views (else 4) are those of the file, unless given.
    """
    if weights is None:
        return models.create(name, num_classes or 100, rotations or 4)
    checkpoint = utils.Checkpoint(weights)
    network = models.create(name, num_classes or checkpoint.num_classes, rotations or checkpoint.rotations or 4)
    checkpoint.load_into(network)
    return network


globals().update({name: functools.partial(_load, name) for name in models.names()})
