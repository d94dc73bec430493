"""The SPUL loss (arXiv 2406.12038, §4): pure functions of logits at the position that predicts the label.

L = L_f + α·L_r + β·L_kl,  each a mean over its own subset, so the forget share of a batch does not weigh.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def forget_ce(logits: Tensor, generic_ids: Tensor) -> Tensor:
    """L_f: cross-entropy of a generic label on forget rows. logits (F, V), generic_ids (F,) → scalar."""
    return functional.cross_entropy(logits, generic_ids)


def retain_ce(logits: Tensor, label_ids: Tensor) -> Tensor:
    """L_r: cross-entropy of the true label on retain rows. logits (R, V), label_ids (R,) → scalar."""
    return functional.cross_entropy(logits, label_ids)


def retain_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(h(φ, x) ‖ h(x)) of each retain row, the prompted distribution first; L_kl is its mean. (R, V) → (R,)."""
    prompted = functional.log_softmax(logits, dim=-1)
    teacher = functional.log_softmax(teacher_logits, dim=-1)
    return (prompted.exp() * (prompted - teacher)).sum(-1)


def spul_loss(forget: Tensor, retain: Tensor, kl: Tensor, *, alpha: float, beta: float) -> Tensor:
    """L_f + α·L_r + β·L_kl."""
    return forget + alpha * retain + beta * kl
