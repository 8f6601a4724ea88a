"""The auxiliary loss in readable form: pointwise-clipped forward KL on one rank, differentiated by autograd.

`ops/clipped_kl.py` computes the same over sharded vocabularies without the temporaries. Its tests compare the two.
T tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor


def clipped_forward_kl(student_logits_TV: Tensor, teacher_logits_TV: Tensor, *, clip: float) -> Tensor:
    """Return `l_t = sum_v min(p_T(v) * (log p_T(v) - log p_S(v)), clip)` of each token, [T], in nats.

    It is the KL from the teacher to the student, to be minimized, and not divided by anything (method, eqs. 3 and 6).
    The clip applies to each summand before the sum. Negative summands are not clipped, so the loss can be negative. The
    teacher gets no gradient.

    Example: p_T = (0.5, 0.5), p_S = (0.9, 0.1), clip 0.05: summands (-0.294, 0.805), loss -0.294 + 0.05 = -0.244.
    """
    student_logp_TV = student_logits_TV.log_softmax(dim=-1)
    teacher_logp_TV = teacher_logits_TV.detach().log_softmax(dim=-1)
    teacher_p_TV = teacher_logp_TV.exp()
    # The limit of p log p at 0 is 0. Where a logit is -inf, the computed value would be 0 * inf.
    has_mass_TV = teacher_p_TV > 0
    log_ratio_TV = (teacher_logp_TV - student_logp_TV).where(has_mass_TV, 0.0)
    return (teacher_p_TV * log_ratio_TV).clamp(max=clip).sum(dim=-1)
