"""CRD (Tian et al., ICLR 2020): contrasts an image's embeddings in both networks with those of other images."""

import torch
from torch import nn
from torch.nn import functional as F

import options
from losses import nce
from methods.base import Constant, Imitation, gather_rows, with_features

SIDES = ("student", "teacher")


class CRD(Imitation):
    """Cross-entropy, and the contrastive loss of both embeddings against memory banks of the training images.

    Negatives are drawn with replacement from all images; those known to be of the anchor's class do not count. The
    banks take in whole batches, equal in every process.
    """

    name = "crd"
    reads = "features"
    needs_index = True
    whole_batches = True

    negatives = Constant(16384, "negatives of an image", options.positive)
    dimensions = Constant(128, "dimensions of the embeddings", options.positive)
    temperature = Constant(0.07, "temperature", options.above_zero, "--kd_T")
    memory_momentum = Constant(0.5, "momentum of the memory banks", options.below_one)
    feature_weight = Constant(0.8, "weight of the contrastive loss")

    def prepare(self, model, images, num_images=0):
        if not num_images:
            raise ValueError("crd needs training batches that say `num_images`, or a DataLoader")
        generator, bound = torch.Generator().manual_seed(0), (3 / self.dimensions) ** 0.5  # equal in every process
        for side, network in zip(SIDES, (model, self.teacher), strict=True):
            with torch.no_grad():
                width = with_features(network, images).embedding.shape[1]
            self.trained[side] = nn.Linear(width, self.dimensions)
            memory = torch.empty(num_images, self.dimensions)
            self.state[side] = memory.uniform_(-bound, bound, generator=generator)
            self.state[f"{side}_scale"] = torch.zeros(())  # normalises the ratios; the first batch sets it
        self.state["labels"] = torch.full((num_images,), -1)  # of the images seen so far

    @torch.compiler.disable  # the compiled backward pass would read the memory banks after they change
    def imitation(self, student, teacher, batch):
        embeddings, index = (student.embedding.float(), teacher.embedding.float()), batch.index.to(batch.labels.device)
        with torch.autocast(index.device.type, enabled=False):  # the exponential needs float32
            return {"features": self.feature_weight * self.contrast(embeddings, index, batch.labels)}

    def contrast(self, embeddings, index, labels):
        """Return the loss of two embeddings (B, D) of the images `index` (B,), and update the banks."""
        pairs = zip(SIDES, embeddings, strict=True)
        found = {side: F.normalize(self.trained[side](embedding)) for side, embedding in pairs}
        count = len(self.state["labels"])
        others = torch.randint(count, (len(index), self.negatives), device=index.device)
        counted = self.state["labels"][others] != labels[:, None]
        drawn = torch.cat([index[:, None], others], dim=1)
        loss = sum(
            nce(self.ratios(found[anchor], memory, drawn), counted, count)
            for anchor, memory in (SIDES, SIDES[::-1])  # each network's embedding against the other's memory
        )
        with torch.no_grad():
            everyone = gather_rows(index)
            self.state["labels"][everyone] = gather_rows(labels)
            for side, values in found.items():
                old, new = self.state[side][everyone], gather_rows(values.detach())
                self.state[side][everyone] = F.normalize(torch.lerp(new, old, self.memory_momentum))
        return loss

    def ratios(self, anchors, side, drawn):
        """Return exp(anchor * memory / T) / Z (B, 1 + K) of anchors (B, D) and the images `drawn` (B, 1 + K)."""
        # All scores, of which some are taken: far less memory than a copy of the embeddings of every pair.
        scores = anchors @ self.state[side].clone().T  # a copy, since the memory changes before the backward pass
        exponentials = torch.exp(scores.gather(1, drawn) / self.temperature)
        scale = self.state[f"{side}_scale"]
        with torch.no_grad():
            first = gather_rows(exponentials.mean().view(1)).mean() * len(self.state["labels"])
            scale.copy_(torch.where(scale == 0, first, scale))
        return exponentials / scale.clone()
