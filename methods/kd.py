"""KD (Hinton et al., 2015): the teacher's softened class probabilities beside the labels."""

import options
from losses import kl
from methods.base import STANDARDIZE, Constant, Imitation


class KD(Imitation):
    """Weighted cross-entropy and KL to the teacher's class logits, on un-rotated images."""

    name = "kd"
    reads = "logits"

    temperature = Constant(4.0, "temperature", options.above_zero, "--kd_T", family={"imagenet": 1.0})
    ce_weight = Constant(0.1, "weight of the cross-entropy", family={"imagenet": 0.5})
    kd_weight = Constant(0.9, "weight of the KL term", family={"imagenet": 0.5})
    standardize = STANDARDIZE  # published with T = 2 and weights 0.1 and 9

    def imitation(self, student, teacher, batch):
        return {"logit_kl": self.kd_weight * kl(student.logits, teacher.logits, self.temperature, self.standardize)}
