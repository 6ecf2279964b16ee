"""The fused functions: check the arguments, call the operator, name the results.

Logits are [..., V] and everything per token is [...], where V is the vocabulary. Outputs are
float32 whatever the logits' dtype (float64 for float64 logits). Rows where the mask is False are
not read: their outputs and gradients are exactly 0, even if the row holds NaN.

Views are taken as they are (`logits[:, :-1]`, a slice of the vocabulary, any row stride) as long
as neighbouring logits are neighbours in memory and at most two dimensions precede V; otherwise the
logits are copied first.

Sharded vocabularies (tensor parallelism): with `group`, each of its ranks passes [..., V_local]
logits of its own part of the vocabulary and, apart from `vocab_start`, the same of everything else;
token ids count over the whole vocabulary. Columns that only pad a shard have to hold `-inf`. All
ranks get the same outputs, bit for bit, through one collective (`parallel.py` has its cost).
Backward sends nothing: every rank has to compute the same loss from the outputs, and gets its own
logits' gradient of that loss, once, not the sum over ranks (as with Megatron's vocabulary-parallel
cross-entropy). If losses differ, each rank's logits get the gradient of its own loss; where the
loss is a sum over ranks, all-reduce the gradients of the outputs first. The ranks' shards have to
tile 0 to V - 1, and each token has to be on one rank: otherwise a ValueError on all of them, or NaN
(everywhere, or in that row) on a GPU, where looking would synchronise, and under torch.compile. A
rank that fails before the collective leaves the others to the timeout of their process group.

Numbers (temperature, kl_coef) may be Python's, numpy's or 0-dim tensors, of which a Python float is
read: on a GPU that waits for it.

DTensors need neither group nor vocab_start: see `dtensors.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kl_kernels import (
    autograd as _autograd,  # noqa: F401  registers torch.ops.kl_kernels and their gradients
)
from kl_kernels import checks
from kl_kernels.arguments import (
    as_mask,
    as_rows,
    as_tokens,
    check_inplace,
    check_reference,
    check_scaled_logits,
    shaped,
)
from kl_kernels.dtensors import takes_dtensors
from kl_kernels.parallel import operator
from kl_kernels.rl.rewards import check_reward_estimator, clip_scores, score_indices
from kl_kernels.schemas import ESTIMATORS, output_dtype

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class TokenStats(NamedTuple):
    """Per-token results of `token_stats`, each [...], in nats and differentiable."""

    logprob: Tensor
    entropy: Tensor


class TokenKL(NamedTuple):
    """Per-token results of `token_kl`, each [...], in nats; all but ref_logprob differentiable."""

    logprob: Tensor
    ref_logprob: Tensor
    kl: Tensor  # KL(policy || reference), exact
    forward_kl: Tensor  # KL(reference || policy), exact
    entropy: Tensor


class KLRewards(NamedTuple):
    """Results of `kl_rewards`, each [B, T]; rewards and the correction carry no gradient."""

    rewards: Tensor
    advantage_correction: Tensor
    kl: Tensor  # exact, whatever the estimator in the rewards
    logprob: Tensor
    ref_logprob: Tensor
    entropy: Tensor


@takes_dtensors
def token_stats(
    logits: Tensor,  # [..., V]
    token_ids: Tensor,  # [...]
    mask: Tensor | None = None,  # [...]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-probability of each token and entropy of its distribution, reading each logit once.

    With z = softcap tanh(logits / softcap) / temperature (softcap None: z = logits / temperature):
    logprob = z[token] - logsumexp(z) and entropy = -sum p log p, p = softmax(z).

    Args:
        logits: float32, bfloat16, float16 or float64.
        token_ids: int64 or int32, in [0, V) where the mask is True.
        mask: bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it is
            0 are skipped. None: no row is.
        temperature: divides the logits; finite and above 0.
        softcap: Gemma-style soft cap applied before the temperature; `-inf` stays `-inf`.
        inplace_backward: write the gradient over the logits, in backward, instead of beside them.
            Whoever else needs them for a backward gets torch's error.
        group: the process group that the vocabulary is sharded over. None: logits are whole.
        vocab_start: with a group, the global token id of this rank's first logit. None: all shards
            are of one size, and in the order of the ranks.
        backend: None (best available), "cuda", "triton", "cpu" or "reference".

    Returns:
        TokenStats(logprob, entropy), each [...], in nats, differentiable in any mix.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    temperature, softcap = check_scaled_logits("", logits, temperature, softcap)
    checks.check_token_ids(token_ids, logits)
    check_inplace(logits, inplace_backward)
    shape = token_ids.shape
    logprob, entropy, _ = operator("token_stats", logits, group, vocab_start)(
        as_rows(logits),
        as_tokens(token_ids).long(),
        as_mask(mask, logits),
        temperature,
        softcap,
        inplace_backward,
        backend,
    )
    return TokenStats(shaped(logprob, shape), shaped(entropy, shape))


@takes_dtensors
def token_kl(
    logits: Tensor,  # [..., V]
    ref_logits: Tensor,  # [..., V]
    token_ids: Tensor,  # [...]
    mask: Tensor | None = None,  # [...]
    *,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> TokenKL:
    """Log-probabilities under both models, exact KL both ways and entropy, in one pass.

    kl = sum p (log p - log q) and forward_kl = sum q (log q - log p) over the whole vocabulary,
    with p and q the policy's and the reference's softmax (see `token_stats` for temperature and
    softcap). They are never negative; q = 0 where p > 0 makes kl infinite, by definition, and its
    gradient NaN in that row. The reference is a constant: it must not require grad.

    Args:
        logits: policy logits; float32, bfloat16, float16 or float64.
        ref_logits: reference logits of the same shape and device; the dtype may differ.
        token_ids: int64 or int32, in [0, V) where the mask is True.
        mask: bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it is
            0 are skipped. None: no row is.
        temperature: of the policy; finite and above 0.
        ref_temperature: of the reference; None: the policy's.
        softcap: of the policy, None: none.
        ref_softcap: of the reference; None: none, whatever the policy's.
        inplace_backward: see `token_stats`.
        group: see `token_stats`.
        vocab_start: see `token_stats`.
        backend: None (best available), "cuda", "triton", "cpu" or "reference".

    Returns:
        TokenKL(logprob, ref_logprob, kl, forward_kl, entropy), each [...], in nats.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    temperature, softcap = check_scaled_logits("", logits, temperature, softcap)
    ref_temperature, ref_softcap = check_reference(
        ref_logits, logits, temperature if ref_temperature is None else ref_temperature, ref_softcap
    )
    checks.check_token_ids(token_ids, logits)
    check_inplace(logits, inplace_backward)
    shape = token_ids.shape
    logprob, ref_logprob, kl, forward_kl, entropy, _, _ = operator(
        "token_kl", logits, group, vocab_start
    )(
        as_rows(logits),
        as_rows(ref_logits),
        as_tokens(token_ids).long(),
        as_mask(mask, logits),
        temperature,
        ref_temperature,
        softcap,
        ref_softcap,
        inplace_backward,
        backend,
    )
    outputs = (logprob, ref_logprob, kl, forward_kl, entropy)
    return TokenKL(*(shaped(output, shape) for output in outputs))


@takes_dtensors
def kl_rewards(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    scores: Tensor,  # [B]
    mask: Tensor,  # [B, T]
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    score_position: str | Tensor = "last_token",  # or [B]
    score_clip: float | None = None,
    kl_clip: float | None = None,
    biased: bool = False,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> KLRewards:
    """The shaped rewards of RLHF, -kl_coef * KL per token and the score once, in the same pass.

    The KL of each token is k1 = logprob - ref_logprob or the exact KL over the vocabulary. Exact KL
    has no sampling noise, but as a reward it does not depend on the sampled token; its policy
    gradient is right only together with `advantage_correction` = -kl_coef (k1 - exact), to be
    added to the advantages, or with the differentiable exact KL in the loss. (For k1 it is 0.)

    Args:
        logits: policy logits; see `token_kl` for these and for the temperature and softcap.
        ref_logits: reference logits.
        token_ids: the sampled tokens.
        scores: [B] one score per sequence, any dtype; a NaN stays in its sequence. Packed rows,
            [1, N] with several sequences, must be unpacked to [B, T] first.
        mask: [B, T] bool, or numbers that are 0 or 1 (looked at on a CPU alone); 1 at response
            tokens. It may have holes (tool output), which change nothing.
        kl_coef: beta, finite, 0 or above; 0 leaves the score alone.
        kl_estimator: "k1" or "exact"; "k2", "k3" and "abs" only with `biased`.
        score_position: "last_token" (last True of the mask), "after_last" (one later, as TRL does;
            the last column where there is no later one) or an index per sequence, -1 for nowhere.
            A response without tokens gets no reward anywhere.
        score_clip: scores are clamped to [-score_clip, score_clip].
        kl_clip: each token's KL is clamped to [-kl_clip, kl_clip] before kl_coef.
        biased: accept an estimator whose expected policy gradient is not that of the KL.
        temperature: of the policy.
        ref_temperature: of the reference; None: the policy's.
        softcap: of the policy.
        ref_softcap: of the reference.
        inplace_backward: see `token_stats`.
        group: see `token_stats`.
        vocab_start: see `token_stats`.
        backend: None (best available), "cuda", "triton", "cpu" or "reference".

    Returns:
        KLRewards(rewards, advantage_correction, kl, logprob, ref_logprob, entropy), each [B, T].

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    temperature, softcap = check_scaled_logits("", logits, temperature, softcap)
    ref_temperature, ref_softcap = check_reference(
        ref_logits, logits, temperature if ref_temperature is None else ref_temperature, ref_softcap
    )
    if logits.ndim != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it has to be [B, T, V]")
    checks.check_token_ids(token_ids, logits)
    check_inplace(logits, inplace_backward)
    checks.check_per_token("mask", mask, logits)
    checks.check_per_sequence("scores", scores, "mask", mask)
    mask = checks.check_mask("mask", mask)
    kl_coef = checks.check_non_negative("kl_coef", kl_coef)
    check_reward_estimator(kl_estimator, biased=biased)
    if kl_clip is not None:
        kl_clip = checks.check_positive("kl_clip", kl_clip)
    outputs = operator("kl_rewards", logits, group, vocab_start)(
        logits,
        ref_logits,
        token_ids.long(),
        mask,
        clip_scores(scores.detach().to(output_dtype(logits)), score_clip),
        score_indices(score_position, mask),
        kl_coef,
        ESTIMATORS.index(kl_estimator),
        kl_clip,
        temperature,
        ref_temperature,
        softcap,
        ref_softcap,
        inplace_backward,
        backend,
    )
    rewards, correction, logprob, ref_logprob, kl, _, entropy, _, _ = outputs
    return KLRewards(rewards, correction, kl, logprob, ref_logprob, entropy)
