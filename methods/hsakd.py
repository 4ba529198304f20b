"""HSAKD (Yang et al., IJCAI 2021): the student matches the teacher at every auxiliary head, on four rotated views."""

import options
from losses import kl
from methods.base import STANDARDIZE, Constant, Objective, Outputs, check_heads, paired, rotations_of
from models.adapted import Adapted
from models.auxiliary import AuxiliaryClassifier
from utils import print_main, unwrap


class HSAKD(Objective):
    """Cross-entropy on un-rotated rows, KL of joint logits head by head and of class logits on all views."""

    name = "hsakd"
    networks = "auxiliary"
    reads = "heads"

    temperature = Constant(3.0, "temperature", options.above_zero, "--kd_T")
    kd_weight = Constant(1.0, "weight of the KL terms")
    standardize = STANDARDIZE  # published, in KD, with T = 2 and weight 9

    def adapt(self, model):
        """Freeze the student's shallow heads that have none of the teacher's to learn from, and say so.

        DistributedDataParallel waits for the gradient of every parameter that is trained.
        """
        networks = unwrap(model), self.teacher.network if isinstance(self.teacher, Adapted) else self.teacher
        heads = [getattr(network, "auxiliary_classifier", None) for network in networks]
        if not all(isinstance(part, AuxiliaryClassifier) for part in heads):
            return
        ours, theirs = (part.num_branches for part in heads)
        if ours != theirs:
            heads[0].freeze(ours - theirs)
            print_main(f"{ours} heads, {theirs} of the teacher: the {min(ours, theirs)} deepest are paired")

    def step(self, model, batch):
        rotations = rotations_of(model)
        teacher = self.teach(batch)
        student = self.read(model, batch.images)
        check_heads(student)
        check_heads(teacher)
        pairs = paired(student.aux_logits, teacher.aux_logits)
        logits = student.logits[::rotations]
        terms = {
            "task": self.cross_entropy(logits, batch.labels),
            "aux_kl": sum(self.kl(aux, target) for aux, target in pairs),
            **self.class_terms(student.logits, teacher.logits),
        }
        return terms, [Outputs(logits, student.aux_logits)]

    def class_terms(self, student, teacher):
        """Return the term of class logits (rows, N) on all views."""
        return {"logit_kl": self.kl(student, teacher)}

    def kl(self, student, teacher):
        """Return the weighted KL of logits (rows, N) at the method's temperature."""
        return self.kd_weight * kl(student, teacher, self.temperature, self.standardize)
