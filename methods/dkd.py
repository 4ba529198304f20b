"""DKD (Zhao et al., CVPR 2022): KL to the teacher, decoupled into target and non-target classes."""

import options
from losses import dkd, standardized
from methods.base import STANDARDIZE, Constant, Imitation, ramp

# The authors' settings for CIFAR-100, and for ImageNet.
BETA = {"wrn": 6.0, "wrn->Shuffle": 8.0, "vgg": 6.0, "resnet": 2.0, "resnet8x4": 8.0, "resnet32x4": 8.0}
BETA |= {"imagenet": 0.5, "resnet50_imagenet": 2.0}


class DKD(Imitation):
    """Cross-entropy and alpha * TCKD + beta * NCKD to the teacher's class logits, on un-rotated images."""

    name = "dkd"
    reads = "logits"

    temperature = Constant(4.0, "temperature", options.above_zero, "--kd_T", family={"imagenet": 1.0})
    alpha = Constant(1.0, "weight of the target term")
    beta = Constant(8.0, "weight of the non-target term", family=BETA)
    warmup_epochs = Constant(20, "epochs of the term's ramp", options.natural, "--loss-warmup", family={"imagenet": 1})
    standardize = STANDARDIZE

    def imitation(self, student, teacher, batch):
        logits = student.logits, teacher.logits
        if self.standardize:
            logits = map(standardized, logits)
        # The published code counts epochs from 1, this project from 0: hence the + 1.
        weight = ramp(batch.epoch + 1, self.warmup_epochs)
        return {"teacher_path": weight * dkd(*logits, batch.labels, self.temperature, self.alpha, self.beta)}
