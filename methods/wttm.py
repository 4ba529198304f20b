"""WTTM (Zheng and Yang, ICLR 2024): KL to the teacher's probabilities raised to a power, smooth ones weighing more."""

import options
from losses import wttm
from methods.base import Constant, Imitation


class WTTM(Imitation):
    """Cross-entropy, and KL to the power-transformed teacher, weighted by its power sum; the student keeps T = 1."""

    name = "wttm"
    reads = "logits"

    power = Constant(0.2, "exponent of the teacher's probabilities", options.above_zero)
    kd_weight = Constant(4.0, "weight of the KL term")  # published beside CRD

    def imitation(self, student, teacher, batch):
        return {"logit_kl": self.kd_weight * wttm(student.logits, teacher.logits, self.power)}
