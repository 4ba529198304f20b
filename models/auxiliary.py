"""Auxiliary classifiers on a backbone (HSAKD, IJCAI 2021), and mutual pairs of such networks (HSSAKD, TNNLS 2022)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Backbone, global_pool

MOST_OTHER_TOKENS = 8  # class, distillation and register tokens beside those of the image


class AuxiliaryClassifier(nn.Module):
    """L branches, one per tap: `block_extractor{l}`, an optional tail followed by ReLU, global pooling, `fc{l}`."""

    def __init__(
        self,
        branches: Sequence[Sequence[nn.Module]],
        width: int,
        num_outputs: int,
        tails: Sequence[nn.Module] = (),
        tail_prefix: str = "tail",
    ):
        """Take each branch's modules, the width before `fc{l}`, and the tails, registered as `{tail_prefix}{l}`."""
        super().__init__()
        self.num_branches = len(branches)
        self.tail_prefix = tail_prefix if tails else None
        for level, modules in enumerate(branches, start=1):
            self.add_module(f"block_extractor{level}", nn.Sequential(*modules))
            if tails:
                self.add_module(f"{tail_prefix}{level}", tails[level - 1])
            self.add_module(f"fc{level}", nn.Linear(width, num_outputs))

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """Return the L auxiliary logits, each (B, num_outputs), of the L tapped feature maps."""
        outputs = []
        for level, x in enumerate(taps, start=1):
            x = getattr(self, f"block_extractor{level}")(x)
            if self.tail_prefix is not None:
                x = F.relu(getattr(self, f"{self.tail_prefix}{level}")(x), inplace=True)
            outputs.append(getattr(self, f"fc{level}")(pooled(x)))
        return outputs

    def freeze(self, count: int) -> None:
        """Train the `count` shallowest branches no more."""
        for level in range(1, count + 1):
            for part in filter(None, ("block_extractor", self.tail_prefix, "fc")):
                getattr(self, f"{part}{level}").requires_grad_(False)


@dataclass(eq=False)
class StageReader:
    """Reads the stages of a traced network: `reader(net, x) -> ([tap, ...], embedding, logits)`; holds no weights."""

    functions: dict[bool, Callable]  # per mode, training or not
    taps: dict[str, tuple]  # and their shapes
    layouts: list[str]  # of the taps

    def __call__(self, net: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the tapped tensors as they are, shallow to deep, the embedding and the logits (B, N)."""
        return self.functions[net.training](net, x)


def as_map(x: Tensor, layout: str) -> Tensor:
    """Return a tensor as a feature map (B, C, H, W).

    `layout` is "first" (B, C, H, W), "last" (B, H, W, C), "tokens" (B, N, C), a square after up to 8 dropped tokens,
    or "row", a column, as are other tokens.
    """
    if layout == "first":
        return x
    if layout == "last":
        return x.permute(0, 3, 1, 2)
    side = math.isqrt(x.shape[1])
    others = x.shape[1] - side**2
    if layout == "row" or others > MOST_OTHER_TOKENS:
        return x.transpose(1, 2).unsqueeze(3)
    return x[:, others:].transpose(1, 2).unflatten(2, (side, side))


def pooled(x: Tensor) -> Tensor:
    """Return the average over the positions of (B, C, H, W) or the tokens of (B, N, C); (B, C) is itself."""
    return global_pool(x) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x


def read_taps(net: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the tapped tensors of a backbone, shallow to deep, its embedding and its logits (B, N)."""
    if reader := vars(net).get("stage_reader"):
        return reader(net, x)
    taps, embedding = net.features(x)
    return taps, embedding, net.head(embedding)


class AuxiliaryNet(nn.Module):
    """A backbone with auxiliary classifiers: x -> (logits (B, N), [aux logits (B, N * rotations), ...])."""

    def __init__(self, backbone: nn.Module, auxiliary: AuxiliaryClassifier, num_classes: int, rotations: int):
        super().__init__()
        self.num_classes = num_classes
        self.rotations = rotations
        self.backbone = backbone
        self.auxiliary_classifier = auxiliary

    @property
    def frozen(self) -> bool:
        """True when no parameter of the backbone requires a gradient."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def freeze_backbone(self) -> None:
        """Train the auxiliary classifiers alone: no gradient for the backbone, and its BatchNorm statistics stand."""
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def train(self, mode: bool = True) -> "AuxiliaryNet":
        """Set the mode as usual, but leave a frozen backbone in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the class logits and the auxiliary logits; a frozen backbone's features carry no gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            taps, _, logits = read_taps(self.backbone, x)
        return logits, self.auxiliary_classifier(taps)


class MutualPair(nn.Module):
    """Two networks that teach each other: x -> ([logits1, logits2], [aux logits of net1, aux logits of net2])."""

    def __init__(self, net1: AuxiliaryNet, net2: AuxiliaryNet):
        super().__init__()
        self.num_classes = net1.num_classes
        self.rotations = net1.rotations
        self.net1 = net1
        self.net2 = net2

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return both networks' class logits, and both networks' lists of auxiliary logits."""
        logits1, aux_logits1 = self.net1(x)
        logits2, aux_logits2 = self.net2(x)
        return [logits1, logits2], [aux_logits1, aux_logits2]


def backbone_of(network: nn.Module) -> nn.Module:
    """Return the backbone of an `AuxiliaryNet`, any other network itself."""
    return network.backbone if isinstance(network, AuxiliaryNet) else network


def stage_features(net: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the feature maps (B, C, H, W) of a network's stages, shallow to deep, its embedding (B, D) and its logits.

    `net` is a backbone of `models`, an `AuxiliaryNet` or a network whose stages `models.read_stages` has found.
    """
    net = backbone_of(net)
    reader = vars(net).get("stage_reader")
    if reader is None and not isinstance(net, Backbone):
        advice = "models.read_stages finds them if it can be traced; --method kd and dkd need none"
        raise ValueError(f"the stages of {type(net).__name__} are not known: {advice}")
    taps, embedding, logits = read_taps(net, x)
    if reader:
        taps = [as_map(tap, layout) for tap, layout in zip(taps, reader.layouts, strict=True)]
    return taps, pooled(embedding), logits
