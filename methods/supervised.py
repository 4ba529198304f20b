"""Plain training: the baseline that a distilled student is measured against."""

from methods.base import Objective, Outputs, split_outputs


class Supervised(Objective):
    """Cross-entropy of the class logits; auxiliary heads are ignored."""

    name = "supervised"

    def step(self, model, batch):
        logits = split_outputs(model(batch.images)).logits
        return {"task": self.cross_entropy(logits, batch.labels)}, [Outputs(logits)]
