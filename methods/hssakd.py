"""HSSAKD (Yang et al., TNNLS 2022): two networks teach each other online, without a trained teacher."""

import options
from losses import cross_entropy, joint_labels, kl, rotate
from methods.base import STANDARDIZE, Constant, Objective, Outputs, paired, rotations_of


class HSSAKD(Objective):
    """`Teacher`'s loss for both networks, and KL both ways on all views, each target detached."""

    name = "hssakd"
    networks = "pair"

    temperature = Constant(3.0, "temperature", options.above_zero, "--kd_T")
    standardize = STANDARDIZE

    def step(self, model, batch):
        rotations = rotations_of(model)
        both_logits, both_aux = model(rotate(batch.images, rotations))
        networks = [Outputs(logits, aux) for logits, aux in zip(both_logits, both_aux, strict=True)]
        joint = joint_labels(batch.labels, rotations)
        upright = [Outputs(outputs.logits[::rotations], outputs.aux_logits) for outputs in networks]
        terms = {
            "task": sum(self.cross_entropy(outputs.logits, batch.labels) for outputs in upright),
            "aux": sum(cross_entropy(aux, joint) for aux in (*both_aux[0], *both_aux[1])),
            "logit_kl": self.mutual_kl(*both_logits),
            "aux_kl": sum(self.mutual_kl(*pair) for pair in paired(*both_aux)),
        }
        return terms, upright

    def mutual_kl(self, first, second):
        """Return the KL both ways between logits (rows, N), each side's target detached."""
        pairs = (first, second.detach()), (second, first.detach())
        return sum(kl(*pair, self.temperature, self.standardize) for pair in pairs)
