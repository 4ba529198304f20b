"""ReviewKD (Chen et al., CVPR 2021): the student's stages, fused from deep to shallow, imitate the teacher's."""

import torch
from torch import nn
from torch.nn import functional as F

import options
from losses import hcl
from methods.base import Constant, Imitation, paired, ramp, with_features

# The authors' weights by pair; 1 is the default of their code.
WEIGHTS = {"wrn": 5.0, "resnet": 0.6, "resnet110": 1.0, "resnet32x4": 5.0, "resnet32x4->ShuffleV2": 8.0}
WEIGHTS |= {"imagenet": 1.0}


class Fusion(nn.Module):
    """Attention-based fusion (section 3.3) of a stage's features with what the deeper stages left."""

    def __init__(self, inputs: int, middle: int, outputs: int, deepest: bool):
        """Take the channels of the stage, of what is passed on, and of the teacher's stage."""
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.widen = nn.Sequential(nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.attention = None if deepest else nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid())
        for layer in (self.narrow[0], self.widen[0]):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(self, features: torch.Tensor, deeper: torch.Tensor | None, size: int) -> tuple[torch.Tensor, ...]:
        """Return (what is compared with the teacher, what is passed on), both of `size` pixels a side."""
        fused = self.narrow(features)
        if self.attention is not None:
            deeper = F.interpolate(deeper, fused.shape[-2:])
            own, other = self.attention(torch.cat([fused, deeper], dim=1)).split(1, dim=1)
            fused = fused * own + deeper * other
        if fused.shape[-1] != size:
            fused = F.interpolate(fused, (size, size))
        return self.widen(fused), fused


class ReviewKD(Imitation):
    """Cross-entropy, and the hierarchical context loss of the fused stages and the pooled embedding.

    Of networks with different numbers of stages the deeper ones are compared. The features are those that HSAKD taps;
    the released code takes the teacher's before the last ReLU.
    """

    name = "reviewkd"
    reads = "features"

    feature_weight = Constant(1.0, "weight of the imitation", family=WEIGHTS)
    warmup_epochs = Constant(20, "epochs of the term's ramp", options.natural, "--loss-warmup", family={"imagenet": 1})

    def prepare(self, model, images, num_images=0):
        with torch.no_grad():
            student, teacher = (with_features(network, images) for network in (model, self.teacher))
        middle = min(512, student.embedding.shape[1])
        self.trained["fusions"] = nn.ModuleList(
            Fusion(ours.shape[1], middle, theirs.shape[1], deepest=number == 0)
            for number, (ours, theirs) in enumerate(levels(student, teacher))
        )

    def imitation(self, student, teacher, batch):
        deeper, errors = None, []
        for fusion, (ours, theirs) in zip(self.trained["fusions"], levels(student, teacher), strict=True):
            compared, deeper = fusion(ours, deeper, theirs.shape[-1])
            errors.append(hcl(compared, theirs))
        weight = self.feature_weight * ramp(batch.epoch, self.warmup_epochs)
        return {"features": weight * sum(errors)}


def levels(student, teacher):
    """Return the pairs that are compared, deep to shallow: embeddings as one pixel (B, D, 1, 1), then stages."""
    ours, theirs = ([*outputs.features, outputs.embedding[:, :, None, None]] for outputs in (student, teacher))
    return paired(ours, theirs)[::-1]
