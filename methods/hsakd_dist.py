"""HSAKD with DIST (NeurIPS 2022) in place of the KL of the class logits; the auxiliary heads keep theirs."""

import options
from losses import dist
from methods.base import Constant
from methods.hsakd import HSAKD


class HSAKDDIST(HSAKD):
    """HSAKD whose class logits correlate with the teacher's, on all rotated views."""

    name = "hsakd_dist"
    whole_batches = True

    dist_temperature = Constant(4.0, "temperature of the correlations", options.above_zero, family={"imagenet": 1.0})
    inter_weight = Constant(2.0, "weight of the correlation over an image's classes")
    intra_weight = Constant(2.0, "weight of the correlation over a class's images")

    def class_terms(self, student, teacher):
        """Return the term of class logits (rows, N)."""
        return {"logit_dist": dist(student, teacher, self.dist_temperature, self.inter_weight, self.intra_weight)}
