"""DPCD: a dynamically weighted teacher path, and a self path from the student's shallow heads to its deeper ones."""

import torch

import options
from losses import ced, dkd, log_two_way, quantile
from methods.base import Constant, Objective, check_heads, gather_rows, ramp, split_outputs

# The clamp of beta by the teacher's family, as in the released code.
BETA_RANGE = {"wrn": (5.0, 8.0), "vgg": (5.0, 8.0), "resnet": (1.0, 4.0), "resnet32x4": (6.0, 10.0)}
BETA_RANGE |= {"ResNet50": (6.0, 10.0), "imagenet": (0.4, 1.0)}


class DPCD(Objective):
    """Cross-entropy of all heads, a dynamically weighted DKD to the teacher, and CED from shallow to deep heads.

    The running state stays on the device: no step waits for the host. It is of whole batches, equal in every process.
    """

    name = "dpcd"
    networks = "auxiliary"
    rotations = 1
    reads = "logits"
    whole_batches = True
    imagenet_batch = 128

    temperature = Constant(3.0, "teacher path's temperature", options.above_zero, "--kd_T", family={"imagenet": 1.0})
    ced_temperature = Constant(3.0, "temperature of the self path", options.above_zero)
    beta = Constant(6.0, "non-target weight before its clamp", family={"imagenet": 0.5})
    beta_range = Constant((1.0, 4.0), "clamp of beta", pair=True, family=BETA_RANGE)
    alpha_range = Constant((0.5, 2.0), "clamp of alpha", pair=True)
    warmup_epochs = Constant(20, "epochs of the term's ramp", options.natural, "--loss-warmup", family={"imagenet": 0})
    ema = Constant(0.9, "share of the old value in the moving confidence", options.below_one)
    history = Constant(2000, "confidences kept for the threshold", options.positive, family={"imagenet": 20000})
    threshold = Constant(0.6, "threshold until the history is full")
    quantile = Constant(0.65, "quantile of the history that is the threshold", options.share)
    slope = Constant(18.0, "slope of the sigmoid")
    ced_beta = Constant(8.0, "weight of the self path's non-target term", family={"imagenet": 2.0})

    def __init__(self, teacher, **constants):
        super().__init__(teacher, **constants)
        self.state = {
            "c_bar": torch.zeros(()),  # moving average of the teacher's target probability
            "history": torch.zeros(self.history),  # ring buffer of the last target probabilities
            "count": torch.zeros((), dtype=torch.int64),  # target probabilities seen so far
        }

    def step(self, model, batch):
        teacher = self.teach(batch)
        student = split_outputs(model(batch.images))
        check_heads(student)
        if any(aux.shape != student.logits.shape for aux in student.aux_logits):
            raise ValueError("dpcd needs heads of the classes alone: networks made with rotations=1")

        alpha, beta = self.weights(teacher.logits, batch.labels)
        path = dkd(student.logits, teacher.logits, batch.labels, self.temperature, alpha, beta)
        heads = [*student.aux_logits, student.logits]  # shallow to deep; the final logits learn from every head
        pairs = ((deep, shallow) for j, deep in enumerate(heads) for shallow in heads[:j])
        ceds = (ced(deep, shallow, batch.labels, self.ced_temperature, self.ced_beta) for deep, shallow in pairs)
        terms = {
            "task": self.cross_entropy(student.logits, batch.labels),
            "aux": sum(self.cross_entropy(aux, batch.labels) for aux in student.aux_logits),
            "teacher_path": ramp(batch.epoch, self.warmup_epochs) * path,
            "self_path": sum(ceds),
        }
        return terms, [student]

    @torch.no_grad()
    def weights(self, teacher_logits, labels):
        """Return the weights (alpha, beta) of TCKD and NCKD, after adding a batch's (B, N) logits to the running state.

        In distributed training every process calls it with its part of the batch.
        """
        confidence = gather_rows(log_two_way(teacher_logits, labels, 1.0)[:, 0].exp())
        if self.state["count"].device != confidence.device:
            self.to(confidence.device)
        c_bar, history, count = self.state["c_bar"], self.state["history"], self.state["count"]

        mean = confidence.mean()
        c_bar.copy_(torch.where(count == 0, mean, self.ema * c_bar + (1 - self.ema) * mean))
        count += len(confidence)
        recent = confidence[-len(history) :]  # of a larger batch only what fits, so that no slot is written twice
        slots = (count - len(recent) + torch.arange(len(recent), device=count.device)) % len(history)
        history.index_copy_(0, slots, recent)

        theta = torch.where(count >= len(history), quantile(history, self.quantile), self.threshold)
        rho = torch.sigmoid(self.slope * (theta - c_bar))
        return (1 + rho).clamp(*self.alpha_range), (self.beta * (1 - 0.5 * rho)).clamp(*self.beta_range)
