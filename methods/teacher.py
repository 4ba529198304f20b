"""HSAKD's teacher (IJCAI 2021, section 3.2): a network with auxiliary classifiers, trained by hard labels."""

from losses import cross_entropy, joint_labels, rotate
from methods.base import Objective, Outputs, check_heads, rotations_of, split_outputs
from utils import unwrap


class Teacher(Objective):
    """Cross-entropy of the class logits on un-rotated rows, joint cross-entropy of every head on all views.

    With a frozen backbone the heads alone are trained, and there is no class term.
    """

    name = "teacher"
    networks = "auxiliary"

    def best_by(self, model):
        """Return "joint", and "top1" for DPCD's teachers, whose heads see one view: the released codes' rules.

        The heads of a frozen backbone are all that is trained.
        """
        return "joint" if rotations_of(model) > 1 or getattr(unwrap(model), "frozen", False) else "top1"

    def step(self, model, batch):
        rotations = rotations_of(model)
        outputs = split_outputs(model(rotate(batch.images, rotations)))
        check_heads(outputs)
        logits, joint = outputs.logits[::rotations], joint_labels(batch.labels, rotations)
        terms = {}
        if not getattr(unwrap(model), "frozen", False):
            terms["task"] = self.cross_entropy(logits, batch.labels)
        heads = self.cross_entropy if rotations == 1 else cross_entropy
        terms["aux"] = sum(heads(aux, joint) for aux in outputs.aux_logits)
        return terms, [Outputs(logits, outputs.aux_logits)]
