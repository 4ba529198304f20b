"""DIST (Huang et al., NeurIPS 2022): class probabilities match the teacher's in correlation, not in value."""

import options
from losses import dist
from methods.base import Constant, Imitation


class DIST(Imitation):
    """Cross-entropy, and one minus Pearson's correlation with the teacher, of rows and of columns of probabilities.

    Columns are those of a process's part of the batch.
    """

    name = "dist"
    reads = "logits"
    whole_batches = True

    temperature = Constant(4.0, "temperature", options.above_zero, "--kd_T", family={"imagenet": 1.0})
    inter_weight = Constant(2.0, "weight of the correlation over an image's classes")
    intra_weight = Constant(2.0, "weight of the correlation over a class's images")

    def imitation(self, student, teacher, batch):
        weights = self.inter_weight, self.intra_weight
        return {"logit_dist": dist(student.logits, teacher.logits, self.temperature, *weights)}
