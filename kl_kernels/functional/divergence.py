"""Divergences between whole distributions, in which no token is sampled.

Logits are [..., V] and results [...]; dtypes, views, masks, `inplace_backward` and sharded
vocabularies are as in `logits.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kl_kernels import checks
from kl_kernels.algebra.parts import any_token
from kl_kernels.functional.arguments import prepare_mask, prepare_models, shaped
from kl_kernels.functional.dtensors import takes_dtensors
from kl_kernels.functional.logits import token_kl
from kl_kernels.partitioned.shards import operator_over
from kl_kernels.schemas import BackendName, Execution, TokenJSDArgs

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


@takes_dtensors
def token_jsd(
    logits: Tensor,  # [..., V]
    ref_logits: Tensor,  # [..., V]
    mask: Tensor | None = None,  # [...]
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence per token, exact over the whole vocabulary.

    With p and q the softmax of z = softcap tanh(logits / softcap) / temperature of policy and
    reference (student and teacher), and their mixture m = (1 - beta) p + beta q:

        jsd = beta KL(q || m) + (1 - beta) KL(p || m)     for 0 < beta < 1

    This is equation 1 of Agarwal et al. (2023), "On-policy distillation of language models", arXiv
    2306.13649, and the convention of TRL's distillation trainers. At the ends it names the KL
    divergences that the paper compares with, as TRL does: beta = 0 is KL(q || p), beta = 1 is KL(p
    || q), those of `token_kl`. (They are no limits: as beta goes to 0, jsd / beta goes to KL(q ||
    p), and jsd itself to 0.)

    It is never negative, 0 where p = q, and for 0 < beta < 1 at most the entropy of a coin that
    falls on beta, whatever the support: q = 0 < p is finite, unlike in KL(p || q). A row that is
    all -inf in either model is NaN. The reference is a constant.

    Sharded over `group`, it takes a second collective, of two numbers per row.

    Args:
        logits: [..., V] of the policy; float32, bfloat16, float16 or float64.
        ref_logits: [..., V] of the reference, the same rows, on the same device; the dtype may
            differ. Must not require grad.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it is 0
            are not read, and give 0. None: all rows count.
        beta: weight of the reference in the mixture, 0 to 1.
        temperature: divides the policy's logits; finite and above 0.
        ref_temperature: divides the reference's logits. None: the policy's temperature.
        softcap: Gemma's soft cap of the policy, before the temperature; finite and above 0. None:
            no cap.
        ref_softcap: soft cap of the reference. None: no cap, whatever the policy's.
        inplace_backward: write the gradient over the logits, in backward, instead of beside them.
            Another backward that needs them raises torch's error about tensors modified in place.
        group: the process group that the vocabulary is sharded over: logits are [..., V_local].
            None: logits are whole.
        vocab_start: with a group, the global token id of this rank's first logit. None: all shards
            are of one size, and in the order of the ranks.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        The divergence, [...], in nats, float32 (float64 for float64 logits), differentiable in
        `logits`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])  # nothing in common
        >>> round(kl_kernels.token_jsd(p.log(), q.log(), beta=0.5).item(), 4)  # ln 2
        0.6931
    """
    models = prepare_models(
        logits,
        ref_logits,
        temperature,
        ref_temperature,
        softcap,
        ref_softcap,
        inplace_backward,
    )
    beta = checks.check_unit_interval("beta", beta)
    if beta in (0, 1):
        kl = token_kl(
            logits,
            ref_logits,
            any_token(logits),
            mask=mask,
            temperature=temperature,
            ref_temperature=ref_temperature,
            softcap=softcap,
            ref_softcap=ref_softcap,
            inplace_backward=inplace_backward,
            group=group,
            vocab_start=vocab_start,
            backend=backend,
        )
        return kl.kl if beta == 1 else kl.forward_kl
    args = TokenJSDArgs(mask=prepare_mask(mask, logits), beta=beta, **models._asdict())
    operator = operator_over("token_jsd", logits, group, vocab_start)
    jsd, *_ = operator(*args, *Execution(inplace_backward, backend))
    return shaped(jsd, logits.shape[:-1])
