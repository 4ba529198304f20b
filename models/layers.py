"""What every family shares: the backbone interface, pooling, copies of stages, channel shuffle, initialisation."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Backbone(nn.Module):
    """A classification network, (B, 3, H, W) -> (B, N).

    A family adds `features(x)`, its tapped feature maps, shallow to deep, and the pooled embedding (B, D) that the head
    sees, and `build_auxiliary(num_outputs)`, a new auxiliary classifier with a branch of `num_outputs` logits per tap.
    """

    head_name = "fc"  # the published state dicts name the last linear layer differently per family

    @property
    def head(self) -> nn.Linear:
        """The last linear layer, (B, D) -> (B, N)."""
        return getattr(self, self.head_name)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class logits (B, N)."""
        return self.head(self.features(x)[1])


def global_pool(x: Tensor) -> Tensor:
    """Average over the positions, (B, C, H, W) -> (B, C), for any H and W."""
    if x.is_contiguous(memory_format=torch.channels_last):
        # As rows of channels: the gradient of the plain form below would be channels-first, and slow to go on from.
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
    return x.mean((2, 3))


def tapped(stages: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
    """Return the outputs of `stages`, each of the one before; the first takes `x`."""
    outputs = []
    for stage in stages:
        x = stage(x)
        outputs.append(x)
    return outputs


def copy_stages(make_stage: Callable[..., nn.Module], count: int) -> list[list[nn.Module]]:
    """Return the modules of branches 1..count: new stages after each tap; after the last one, the last stage again.

    `make_stage(index, repeated=False)` builds stage `index`; a repeated one takes its own output at stride 1.
    """
    branches = [[make_stage(index) for index in range(tap, count)] for tap in range(1, count)]
    return [*branches, [make_stage(count - 1, repeated=True)]]


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave `groups` equal groups of channels, (B, C, H, W) -> the same, in the memory format of `x`."""
    batch, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        # Reshaping in NHWC order: the plain form below would hand back a channels-first tensor.
        grouped = x.permute(0, 2, 3, 1).reshape(batch, height, width, groups, channels // groups)
        return grouped.transpose(3, 4).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    grouped = x.reshape(batch, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(batch, channels, height, width)


def init_weights(module: nn.Module, linear_std: float | None = None, linear_bias: bool = True) -> None:
    """Initialise a new network as the released code: convolutions N(0, 2 / (k * k * out_channels)), biases 0.

    Linear layers keep PyTorch's default weights unless `linear_std` asks for N(0, linear_std^2), and its default biases
    unless they are initialised (`linear_bias`).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            # The fan-out does not count groups, unlike nn.init.kaiming_normal_ on a depthwise weight's own shape.
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(layer, nn.Linear) and linear_std is not None:
            nn.init.normal_(layer.weight, std=linear_std)
        if getattr(layer, "bias", None) is not None and (linear_bias or not isinstance(layer, nn.Linear)):
            nn.init.zeros_(layer.bias)
