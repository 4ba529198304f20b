"""A wrapper of a trained network, for another normalisation or another order of classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.auxiliary import stage_features

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel


class Adapted(nn.Module):
    """`network` behind a change of its input's normalisation and of its outputs' order; the outputs keep their form.

    Images come normalised by the statistics `given`, the network sees them normalised by its `own`. Output i is the
    network's class `order[i]`.
    """

    def __init__(self, network: nn.Module, given: Statistics, own: Statistics, order: Sequence[int] | None = None):
        super().__init__()
        self.network = network
        for name in ("arch", "num_classes", "rotations", "source"):
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))
        (mean, std), (own_mean, own_std) = (torch.tensor(values).view(2, 1, 3, 1, 1) for values in (given, own))
        # Buffers that are saved, so that they count in the digest of the weights.
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)
        self.register_buffer("order", None if order is None else torch.tensor(order))

    def normalised(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) normalised by the network's own statistics."""
        return images * self.scale + self.shift

    def reordered(self, logits: Tensor) -> Tensor:
        """Return logits (B, N), or joint logits (B, N * M), with the classes in order."""
        if self.order is None:
            return logits
        return logits.unflatten(1, (len(self.order), -1))[:, self.order].flatten(1)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Return the network's outputs for images (B, 3, H, W): class logits, and those of its heads if it has any."""
        outputs = self.network(self.normalised(images))
        if torch.is_tensor(outputs):
            return self.reordered(outputs)
        logits, aux_logits = outputs
        return self.reordered(logits), [self.reordered(aux) for aux in aux_logits]

    def stages(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the network's stages, embedding and logits; see `stage_features`."""
        features, embedding, logits = stage_features(self.network, self.normalised(images))
        return features, embedding, self.reordered(logits)
