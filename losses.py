"""Losses of self-supervised knowledge distillation: pure functions of tensors, and the objectives built from them.

HSAKD (Yang et al., IJCAI 2021), its online version HSSAKD (TNNLS 2022), DPCD, and the baselines KD (Hinton et al.,
2015) and DKD (Zhao et al., CVPR 2022). All arithmetic is float32, also under autocast.
B images, N classes, M rotations, L auxiliary heads; the joint label of class y turned by r quarter turns is M*y + r.
"""

import torch
import torch.nn.functional as F

from distributed import gather_rows
from objective import Objective, check_heads, check_pair, predictions, ramp, split_outputs, sum_terms, unwrap

# Logit of an excluded class: finite, so that 0 * (masked - masked) is 0 where -inf would give NaN.
MASKED = -1e30


def rotate(images, rotations=4):
    """All quarter turns of square images (B, C, H, H) -> (B*M, C, H, H); row M*b + r is image b turned r times."""
    if rotations not in (1, 4):
        raise ValueError(f"rotations must be 1 or 4, not {rotations}")
    if rotations == 1:
        return images
    if images.shape[-2] != images.shape[-1]:
        raise ValueError(f"rotations need square images, not {images.shape[-2]} x {images.shape[-1]}")
    return torch.stack([torch.rot90(images, r, (2, 3)) for r in range(rotations)], dim=1).flatten(0, 1)


def joint_labels(labels, rotations=4):
    """Joint labels M*y + r (B*M,) of class labels (B,), in the order of `rotate` (HSAKD)."""
    return (rotations * labels[:, None] + torch.arange(rotations, device=labels.device)).flatten()


def cross_entropy(logits, labels):
    """Cross-entropy of logits (B, N) and labels (B,) in float32, mean over rows."""
    return F.cross_entropy(logits.float(), labels)


def log_kl(log_student, log_teacher, temperature):
    """T^2 * KL(teacher || student) of log-probabilities (B, N), mean over rows."""
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def kl(student, teacher, temperature):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of logits (B, N), mean over rows (Hinton et al., 2015)."""
    return log_kl(*(F.log_softmax(z.float() / temperature, dim=1) for z in (student, teacher)), temperature)


def quantile(values, q):
    """The q-quantile, linearly interpolated, of values (N,); torch.quantile waits for the device in some versions."""
    position = q * (len(values) - 1)
    low, high = int(position), min(int(position) + 1, len(values) - 1)
    ordered = values.sort().values
    return torch.lerp(ordered[low], ordered[high], position - low)


def target_mask(logits, labels):
    """Boolean mask (B, N), true at each row's label (B,)."""
    return torch.arange(logits.shape[1], device=logits.device) == labels[:, None]


def log_two_way(logits, labels, temperature):
    """Log-probabilities (B, 2) of target and rest, from logits (B, N) at temperature T (DKD, section 3.1)."""
    log_p = F.log_softmax(logits.float() / temperature, dim=1)
    rest = log_p.masked_fill(target_mask(logits, labels), MASKED).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_p.gather(1, labels[:, None]), rest], dim=1)


def log_non_target(logits, labels, temperature):
    """Log-probabilities (B, N) among the non-target classes of logits (B, N), about MASKED at the target (DKD, 3.1)."""
    return F.log_softmax((logits.float() / temperature).masked_fill(target_mask(logits, labels), MASKED), dim=1)


def tckd(student, teacher, labels, temperature):
    """T^2 * KL of the (target, rest) distributions of logits (B, N), mean over rows (DKD, section 3.1)."""
    return log_kl(*(log_two_way(z, labels, temperature) for z in (student, teacher)), temperature)


def nckd(student, teacher, labels, temperature):
    """T^2 * KL over the non-target classes of logits (B, N), mean over rows (DKD, section 3.1)."""
    return log_kl(*(log_non_target(z, labels, temperature) for z in (student, teacher)), temperature)


def dkd(student, teacher, labels, temperature=4.0, alpha=1.0, beta=8.0):
    """alpha * TCKD + beta * NCKD of logits (B, N) (DKD, section 3.3); the weights may be scalar tensors."""
    return alpha * tckd(student, teacher, labels, temperature) + beta * nckd(student, teacher, labels, temperature)


def ced(student, teacher, labels, temperature=3.0, beta=8.0, eps=1e-8):
    """TCKD + beta * T^2 * mean(omega * KL of non-targets) of logits (B, N), mean over rows (DPCD).

    The teacher's side of the second part is detached, that of the first is not: it passes gradient to both networks.
    """
    student, teacher = student.float(), teacher.float()
    p_student, p_teacher = (log_two_way(z, labels, temperature).exp() for z in (student, teacher))
    target_part = (p_teacher * (torch.log(p_teacher + eps) - torch.log(p_student + eps))).sum(dim=1)

    with torch.no_grad():
        agreement = F.softmax(student / temperature, dim=1) * F.softmax(teacher / temperature, dim=1)
        omega = agreement.masked_fill(target_mask(student, labels), 0).sum(dim=1) + student.shape[1] * eps
    log_student = log_non_target(student, labels, temperature)
    log_teacher = log_non_target(teacher.detach(), labels, temperature)
    rest_part = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (target_part + beta * omega * rest_part).mean()


class CrossEntropyLoss(Objective):
    """Plain training: cross-entropy of the class logits; auxiliary heads are ignored."""

    def step(self, model, images, labels, epoch=0):
        logits, _ = split_outputs(model(images))
        return {"task": cross_entropy(logits, labels)}, predictions((logits, []))


class TeacherLoss(Objective):
    """HSAKD's teacher: class loss on un-rotated rows, joint loss of every head on all views."""

    def step(self, model, images, labels, epoch=0):
        network = unwrap(model)
        rotations = getattr(network, "rotations", 4)
        logits, aux_logits = split_outputs(model(rotate(images, rotations)))
        check_heads(logits, aux_logits, rotations)
        logits, joint = logits[::rotations], joint_labels(labels, rotations)

        terms = {}
        backbone = list(network.backbone.parameters()) if hasattr(network, "backbone") else []
        # The sum of the terms is what is trained, so a frozen backbone has no class term.
        if not backbone or any(parameter.requires_grad for parameter in backbone):
            terms["task"] = cross_entropy(logits, labels)
        terms["aux"] = sum_terms((cross_entropy(aux, joint) for aux in aux_logits), logits)
        return terms, predictions((logits, aux_logits))


class HSAKDLoss(Objective):
    """HSAKD's student: class loss, KL of joint logits head by head and of class logits on all views."""

    def __init__(self, teacher, temperature=3.0):
        super().__init__(teacher)
        self.temperature = temperature

    def step(self, model, images, labels, epoch=0):
        rotations = getattr(unwrap(model), "rotations", 4)
        views = rotate(images, rotations)
        teacher_logits, teacher_aux = self.teacher_outputs(views)
        logits, aux_logits = split_outputs(model(views))
        check_pair(logits, teacher_logits, aux_logits, teacher_aux)
        check_heads(logits, aux_logits, rotations)
        check_heads(teacher_logits, teacher_aux, rotations)

        pairs = zip(aux_logits, teacher_aux, strict=True)
        terms = {
            "task": cross_entropy(logits[::rotations], labels),
            "aux_kl": sum_terms((kl(aux, target, self.temperature) for aux, target in pairs), logits),
            "logit_kl": kl(logits, teacher_logits, self.temperature),
        }
        return terms, predictions((logits[::rotations], aux_logits))


class MutualLoss(Objective):
    """HSSAKD's online pair (TNNLS 2022): the teacher's loss for both networks, and KL both ways on all views."""

    def __init__(self, temperature=3.0):
        super().__init__()
        self.temperature = temperature

    def step(self, model, images, labels, epoch=0):
        rotations = getattr(unwrap(model), "rotations", 4)
        (logits1, logits2), (aux1, aux2) = model(rotate(images, rotations))
        check_pair(logits1, logits2, aux1, aux2)
        check_heads(logits1, aux1, rotations)
        check_heads(logits2, aux2, rotations)

        joint, both = joint_labels(labels, rotations), (logits1, logits2)
        terms = {
            "task": sum_terms((cross_entropy(logits[::rotations], labels) for logits in both), logits1),
            "aux": sum_terms((cross_entropy(aux, joint) for aux in (*aux1, *aux2)), logits1),
            "logit_kl": self.mutual_kl(logits1, logits2),
            "aux_kl": sum_terms((self.mutual_kl(*pair) for pair in zip(aux1, aux2, strict=True)), logits1),
        }
        return terms, predictions((logits1[::rotations], aux1), (logits2[::rotations], aux2))

    def mutual_kl(self, first, second):
        """KL both ways between logits (rows, N), each side's target detached."""
        return kl(first, second.detach(), self.temperature) + kl(second, first.detach(), self.temperature)


class KDLoss(Objective):
    """Weighted class loss and KL to the teacher's class logits (Hinton et al., 2015), on un-rotated images."""

    def __init__(self, teacher, temperature=4.0, ce_weight=0.1, kd_weight=0.9):
        super().__init__(teacher)
        self.temperature, self.ce_weight, self.kd_weight = temperature, ce_weight, kd_weight

    def step(self, model, images, labels, epoch=0):
        logits, _, teacher_logits = self.outputs(model, images)
        terms = {
            "task": self.ce_weight * cross_entropy(logits, labels),
            "logit_kl": self.kd_weight * kl(logits, teacher_logits, self.temperature),
        }
        return terms, predictions((logits, []))


class DKDLoss(Objective):
    """Class loss and decoupled KL to the teacher's class logits (DKD, CVPR 2022), on un-rotated images."""

    def __init__(self, teacher, temperature=4.0, alpha=1.0, beta=8.0, warmup_epochs=20):
        super().__init__(teacher)
        self.temperature, self.alpha, self.beta, self.warmup_epochs = temperature, alpha, beta, warmup_epochs

    def step(self, model, images, labels, epoch=0):
        logits, _, teacher_logits = self.outputs(model, images)
        # DKD's published code counts epochs from 1, this project from 0: hence the + 1.
        weight = ramp(epoch + 1, self.warmup_epochs)
        path = dkd(logits, teacher_logits, labels, self.temperature, self.alpha, self.beta)
        terms = {"task": cross_entropy(logits, labels), "teacher_path": weight * path}
        return terms, predictions((logits, []))


class DPCDLoss(Objective):
    """DPCD: class loss of all heads, a dynamically weighted DKD to the teacher, and CED from shallow to deep heads.

    The running state stays on the device: no step waits for the host. It is of whole batches, the same in every process.
    """

    def __init__(
        self,
        teacher,
        beta=6.0,
        beta_range=(5.0, 8.0),
        warmup_epochs=20,
        *,
        temperature=3.0,
        ced_beta=8.0,
        alpha_range=(0.5, 2.0),
        ema=0.9,
        history=2000,
        threshold=0.60,
        quantile=0.65,
        slope=18.0,
    ):
        super().__init__(teacher)
        self.beta, self.beta_range, self.warmup_epochs = beta, beta_range, warmup_epochs
        self.temperature, self.alpha_range, self.ced_beta = temperature, alpha_range, ced_beta
        self.ema, self.threshold, self.quantile, self.slope = ema, threshold, quantile, slope
        self.state = {
            "c_bar": torch.zeros(()),  # moving average of the teacher's target probability
            "history": torch.zeros(history),  # ring buffer of the last target probabilities
            "count": torch.zeros((), dtype=torch.int64),  # target probabilities seen so far
        }

    def step(self, model, images, labels, epoch=0):
        logits, aux_logits, teacher_logits = self.outputs(model, images)
        if aux_logits:  # without any, its path from the teacher alone is defined
            check_heads(logits, aux_logits, rotations=1)

        alpha, beta = self.weights(teacher_logits, labels)
        path = dkd(logits, teacher_logits, labels, self.temperature, alpha, beta)
        heads = [*aux_logits, logits]  # shallow to deep; the final logits learn from every head
        pairs = ((deep, shallow) for j, deep in enumerate(heads) for shallow in heads[:j])
        ceds = (ced(deep, shallow, labels, self.temperature, self.ced_beta) for deep, shallow in pairs)
        terms = {
            "task": cross_entropy(logits, labels),
            "aux": sum_terms((cross_entropy(aux, labels) for aux in aux_logits), logits),
            "teacher_path": ramp(epoch, self.warmup_epochs) * path,
            "self_path": sum_terms(ceds, logits),
        }
        return terms, predictions((logits, aux_logits))

    @torch.no_grad()
    def weights(self, teacher_logits, labels):
        """Weights (alpha, beta) of TCKD and NCKD, after adding a batch's teacher logits (B, N) to the running state.

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
