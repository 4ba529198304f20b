"""Losses of self-supervised knowledge distillation: pure functions of tensors, float32 inside, also under autocast.

The terms of HSAKD (Yang et al., IJCAI 2021), HSSAKD (TNNLS 2022), DPCD, KD (Hinton et al., 2015), DKD (Zhao et al.,
CVPR 2022), DIST (Huang et al., NeurIPS 2022), WTTM (Zheng and Yang, ICLR 2024), CRD (Tian et al., ICLR 2020) and
ReviewKD (Chen et al., CVPR 2021), and logit standardization (Sun et al., CVPR 2024).
B images, N classes, M rotations, L auxiliary heads; the joint label of class y turned by r quarter turns is M*y + r.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Logit of an excluded class: finite, so that 0 * (masked - masked) is 0 where -inf would give NaN.
MASKED = -1e30


def rotate(images: Tensor, rotations: int = 4) -> Tensor:
    """All quarter turns of square images (B, C, H, H) -> (B*M, C, H, H); row M*b + r is image b turned r times."""
    if rotations == 1:
        return images
    if images.shape[-2] != images.shape[-1]:
        raise ValueError(f"rotations need square images, not {images.shape[-2]} x {images.shape[-1]}")
    return torch.stack([torch.rot90(images, r, (2, 3)) for r in range(rotations)], dim=1).flatten(0, 1)


def joint_labels(labels: Tensor, rotations: int = 4) -> Tensor:
    """Joint labels M*y + r (B*M,) of class labels (B,), in the order of `rotate` (HSAKD)."""
    return (rotations * labels[:, None] + torch.arange(rotations, device=labels.device)).flatten()


def cross_entropy(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of logits (B, N) and labels (B,) in float32, mean over rows.

    With `class_weights` (N,) the rows' sum is still divided by B, where PyTorch divides by the sum of their weights: so
    the parts of a batch, on several processes too, add up to the loss of the whole.
    """
    if class_weights is None:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    rows = F.cross_entropy(logits.float(), labels, class_weights, reduction="none", label_smoothing=label_smoothing)
    return rows.mean()


def log_kl(log_student: Tensor, log_teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of log-probabilities (B, N), mean over rows."""
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def standardized(logits: Tensor) -> Tensor:
    """Logits (B, N) less their mean, over their standard deviation + 1e-7, in each row (logit standardization)."""
    logits = logits.float()
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def kl(student: Tensor, teacher: Tensor, temperature: float, standardize: bool = False) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of logits (B, N), mean over rows (Hinton et al., 2015)."""
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    return log_kl(*(F.log_softmax(z.float() / temperature, dim=1) for z in (student, teacher)), temperature)


def quantile(values: Tensor, q: float) -> Tensor:
    """The q-quantile, linearly interpolated, of values (N,); torch.quantile waits for the device in some versions."""
    position = q * (len(values) - 1)
    low, high = int(position), min(int(position) + 1, len(values) - 1)
    ordered = values.sort().values
    return torch.lerp(ordered[low], ordered[high], position - low)


def target_mask(logits: Tensor, labels: Tensor) -> Tensor:
    """Boolean mask (B, N), true at each row's label (B,)."""
    return torch.arange(logits.shape[1], device=logits.device) == labels[:, None]


def log_two_way(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (B, 2) of target and rest, from logits (B, N) at temperature T (DKD, section 3.1)."""
    log_p = F.log_softmax(logits.float() / temperature, dim=1)
    rest = log_p.masked_fill(target_mask(logits, labels), MASKED).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_p.gather(1, labels[:, None]), rest], dim=1)


def log_non_target(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (B, N) among the non-target classes of logits (B, N), about MASKED at the target (DKD, 3.1)."""
    return F.log_softmax((logits.float() / temperature).masked_fill(target_mask(logits, labels), MASKED), dim=1)


def tckd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 * KL of the (target, rest) distributions of logits (B, N), mean over rows (DKD, section 3.1)."""
    return log_kl(*(log_two_way(z, labels, temperature) for z in (student, teacher)), temperature)


def nckd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 * KL over the non-target classes of logits (B, N), mean over rows (DKD, section 3.1)."""
    return log_kl(*(log_non_target(z, labels, temperature) for z in (student, teacher)), temperature)


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
) -> Tensor:
    """alpha * TCKD + beta * NCKD of logits (B, N) (DKD, section 3.3); the weights may be scalar tensors."""
    return alpha * tckd(student, teacher, labels, temperature) + beta * nckd(student, teacher, labels, temperature)


def ced(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 3.0, beta: float = 8.0) -> Tensor:
    """TCKD + beta * T^2 * mean(omega * KL of non-targets) of logits (B, N), mean over rows (DPCD).

    The teacher's side of the second part is detached, that of the first is not: it passes gradient to both networks.
    """
    student, teacher, eps = student.float(), teacher.float(), 1e-8
    p_student, p_teacher = (log_two_way(z, labels, temperature).exp() for z in (student, teacher))
    target_part = (p_teacher * (torch.log(p_teacher + eps) - torch.log(p_student + eps))).sum(dim=1)

    with torch.no_grad():
        agreement = F.softmax(student / temperature, dim=1) * F.softmax(teacher / temperature, dim=1)
        omega = agreement.masked_fill(target_mask(student, labels), 0).sum(dim=1) + student.shape[1] * eps
    log_student = log_non_target(student, labels, temperature)
    log_teacher = log_non_target(teacher.detach(), labels, temperature)
    rest_part = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (target_part + beta * omega * rest_part).mean()


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation (B,) of the rows of two tensors (B, N); 0 for a constant row."""
    first, second = (rows - rows.mean(1, keepdim=True) for rows in (first, second))
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1) + 1e-8)


def dist(student: Tensor, teacher: Tensor, temperature: float = 4.0, inter: float = 2.0, intra: float = 2.0) -> Tensor:
    """T^2 * (inter * (1 - correlation of rows) + intra * (1 - of columns)) of softmax(logits / T), (B, N) (DIST)."""
    student, teacher = (F.softmax(z.float() / temperature, dim=1) for z in (student, teacher))
    rows = 1 - correlation(student, teacher).mean()
    columns = 1 - correlation(student.T, teacher.T).mean()
    return temperature**2 * (inter * rows + intra * columns)


def wttm(student: Tensor, teacher: Tensor, power: float = 0.2) -> Tensor:
    """Mean of U * KL(q || softmax(student)) of logits (B, N), with U the sum of p^power and q = p^power / U (WTTM)."""
    raised = power * F.log_softmax(teacher.float(), dim=1)
    log_u = raised.logsumexp(dim=1, keepdim=True)
    rows = F.kl_div(F.log_softmax(student.float(), dim=1), raised - log_u, reduction="none", log_target=True).sum(dim=1)
    return (log_u.squeeze(1).exp() * rows).mean()


def nce(ratios: Tensor, counted: Tensor, num_images: int) -> Tensor:
    """Noise-contrastive loss of density ratios (B, 1 + K), the positive first, mean over rows (CRD, eq. 18).

    `counted` (B, K) says which negatives count; the noise is uniform over `num_images` images.
    """
    noise = (ratios.shape[1] - 1) / num_images
    positive, negatives = ratios[:, 0], ratios[:, 1:]
    is_positive = torch.log(positive / (positive + noise + 1e-7))
    is_noise = torch.log(noise / (negatives + noise + 1e-7)) * counted
    return -(is_positive + is_noise.sum(dim=1)).mean()


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of features (B, C, H, H): their squared error at H, 4, 2 and 1 pixels (ReviewKD, 3.3).

    Each coarser grid, of averages, counts half as much as the one before; the weights sum to 1.
    """
    grids = [student.shape[-1], *(size for size in (4, 2, 1) if size < student.shape[-1])]
    weights = [0.5**level for level in range(len(grids))]
    student, teacher = student.float(), teacher.float()
    errors = (
        weight * F.mse_loss(*(F.adaptive_avg_pool2d(features, size) for features in (student, teacher)))
        for weight, size in zip(weights, grids, strict=True)
    )
    return sum(errors) / sum(weights)
