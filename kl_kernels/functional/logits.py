"""The fused functions of logits: check the arguments, call the operator, name the results.

Logits are [..., V] and everything per token is [...], where V is the vocabulary. Outputs are
float32 whatever the logits' dtype (float64 for float64 logits). Rows where the mask is False are
not read: their outputs and gradients are exactly 0, even if the row holds NaN.

Views are taken as they are (`logits[:, :-1]`, a slice of the vocabulary, any row stride) as long as
neighbouring logits are neighbours in memory and at most two dimensions precede V; otherwise the
logits are copied first, with a warning that says how much.

Sharded vocabularies (tensor parallelism): with `group`, each of its ranks passes [..., V_local]
logits of its own part of the vocabulary and, apart from `vocab_start`, the same of everything else;
token ids count over the whole vocabulary. Columns that only pad a shard must hold `-inf`. All ranks
get the same outputs, bit for bit, through one collective (`shards.py` has its cost). Backward
sends nothing: every rank must compute the same loss from the outputs, and gets its own logits'
gradient of that loss, once, not the sum over ranks (as with Megatron's vocabulary-parallel
cross-entropy). If losses differ, each rank's logits get the gradient of its own loss; where the
loss is a sum over ranks, all-reduce the gradients of the outputs first. The ranks' shards must tile
0 to V - 1, and each token must be on one rank: otherwise a ValueError on all of them, or NaN
(everywhere, or in that row) on a GPU, where looking would synchronise, and under torch.compile. A
rank that fails before the collective leaves the others to the timeout of their process group.

Numbers (temperature, kl_coef) may be Python's, numpy's or 0-dim tensors, of which a Python float is
read: on a GPU that waits for it.

DTensors need neither group nor vocab_start: see `dtensors.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kl_kernels import checks
from kl_kernels.algebra.epilogues import rewards_of
from kl_kernels.functional.arguments import (
    as_tokens,
    check_batch_of_rows,
    prepare_mask,
    prepare_models,
    prepare_policy,
    prepare_token_ids,
    shaped,
)
from kl_kernels.functional.dtensors import takes_dtensors
from kl_kernels.functional.kept import RefSupport, check_ref_support, over_kept
from kl_kernels.functional.support import Support
from kl_kernels.partitioned.shards import operator_over
from kl_kernels.rl.rewards import (
    ScorePosition,
    check_reward_estimator,
    clip_scores,
    placed_scores,
    score_indices,
)
from kl_kernels.rl.sequences import sequences_of
from kl_kernels.schemas import (
    ESTIMATORS,
    BackendName,
    Estimator,
    Execution,
    KLRewardsArgs,
    TokenKLArgs,
    TokenStatsArgs,
    output_dtype,
)

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class TokenStats(NamedTuple):
    """Per-token results of `token_stats`.

    Attributes:
        logprob: [...] log-probability of each token, in nats; differentiable.
        entropy: [...] entropy of the distribution each token was sampled from, in nats;
            differentiable.

    Examples:
        >>> import torch, kl_kernels
        >>> logprob, entropy = kl_kernels.token_stats(torch.zeros(1, 8), torch.tensor([3]))
        >>> [round(x.item(), 4) for x in (logprob, entropy)]  # -ln 8 and ln 8
        [-2.0794, 2.0794]
    """

    logprob: Tensor
    entropy: Tensor


class TokenKL(NamedTuple):
    """Per-token results of `token_kl`, in nats.

    Attributes:
        logprob: [...] log-probability of each token under the policy; differentiable.
        ref_logprob: [...] the same under the reference; a constant.
        kl: [...] exact KL(policy || reference) over the vocabulary; differentiable.
        forward_kl: [...] exact KL(reference || policy); differentiable.
        entropy: [...] entropy of the policy; differentiable.

    Examples:
        >>> import torch, kl_kernels
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> out = kl_kernels.token_kl(logits, logits, torch.tensor([1]))
        >>> out.kl.item(), out.forward_kl.item()
        (0.0, 0.0)
    """

    logprob: Tensor
    ref_logprob: Tensor
    kl: Tensor  # KL(policy || reference), exact
    forward_kl: Tensor  # KL(reference || policy), exact
    entropy: Tensor


class KLRewards(NamedTuple):
    """Per-token results of `kl_rewards`.

    Attributes:
        rewards: [B, T] shaped rewards, in units of the scores; without gradient. As all that
            follows, of packed sequences [N] or [1, N], as their token ids.
        advantage_correction: [B, T] to be added to the advantages where the estimator is "exact", 0
            for the others; without gradient.
        kl: [B, T] exact KL(policy || reference), whatever the estimator; nats, differentiable.
        logprob: [B, T] log-probability of each token under the policy; nats, differentiable.
        ref_logprob: [B, T] the same under the reference; nats, a constant.
        entropy: [B, T] entropy of the policy; nats, differentiable.

    Examples:
        >>> import torch, kl_kernels
        >>> logits, token_ids = torch.zeros(1, 2, 4), torch.tensor([[1, 3]])
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> out = kl_kernels.kl_rewards(
        ...     logits, logits, token_ids, torch.tensor([2.0]), mask, kl_coef=0.1
        ... )
        >>> out.rewards.tolist()  # no KL, and the score at the last token
        [[-0.0, 2.0]]
    """

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
    support: Support | None = None,
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: BackendName | None = None,
) -> TokenStats:
    """Log-probability of each token and entropy of its distribution, reading each logit once.

    With z = softcap tanh(logits / softcap) / temperature (softcap None: z = logits / temperature):
    logprob = z[token] - logsumexp(z) and entropy = -sum p log p, p = softmax(z).

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64. Row t must hold the logits that
            `token_ids[..., t]` was sampled from: `model(ids).logits[:, prompt - 1 : -1]` of a
            causal LM, with `token_ids = ids[:, prompt:]`.
        token_ids: [...] int64 or int32, in [0, V) where the mask is True.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it is 0
            are not read, and give 0. None: all rows count.
        temperature: divides the logits; finite and above 0.
        softcap: Gemma's soft cap, applied before the temperature; finite and above 0. `-inf` stays
            `-inf`. None: no cap.
        support: the set that each token was sampled from, as a `Support` of one row for each of
            `token_ids.flatten()`: p is the softmax over the row's set, and the gradient 0 outside.
            A sampled token outside its set is refused on a CPU, and elsewhere has log-probability
            -inf. Not with a group. None: the whole vocabulary.
        inplace_backward: write the gradient over the logits, in backward, instead of beside them.
            Another backward that needs them raises torch's error about tensors modified in place.
        group: the process group that the vocabulary is sharded over: logits are [..., V_local], and
            token ids count over the whole vocabulary. None: logits are whole.
        vocab_start: with a group, the global token id of this rank's first logit. None: all shards
            are of one size, and in the order of the ranks.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        TokenStats(logprob, entropy), each [...], in nats, float32 (float64 for float64 logits),
        differentiable in any mix.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).requires_grad_()
        >>> out = kl_kernels.token_stats(logits, torch.tensor([0]))
        >>> round(out.logprob.exp().item(), 4), round(out.entropy.item(), 4)
        (0.5, 1.0397)
        >>> out.logprob.sum().backward()
        >>> logits.grad.round(decimals=4).tolist()  # [token] - p
        [[0.5, -0.25, -0.25]]
    """
    models = prepare_policy(logits, temperature, softcap, inplace_backward)
    args = TokenStatsArgs(
        logits=models.logits,
        token_ids=prepare_token_ids(token_ids, logits),
        mask=prepare_mask(mask, logits),
        temperature=models.temperature,
        softcap=models.softcap,
    )
    execution = Execution(inplace_backward, backend)
    if support is None:
        operator = operator_over("token_stats", logits, group, vocab_start)
        logprob, entropy, *_ = operator(*args, *execution)
    else:
        kept = over_kept(support, args, execution, group)
        logprob, entropy = kept.logprob, kept.entropy
    return TokenStats(shaped(logprob, token_ids.shape), shaped(entropy, token_ids.shape))


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
    support: Support | None = None,
    ref_support: RefSupport = "same",
    inplace_backward: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: BackendName | None = None,
) -> TokenKL:
    """Log-probabilities under both models, exact KL both ways and entropy, in one pass.

    kl = sum p (log p - log q) and forward_kl = sum q (log q - log p) over the whole vocabulary
    (Kullback and Leibler 1951), with p and q the softmax of z = softcap tanh(logits / softcap) /
    temperature of the policy and of the reference. They are never negative; q = 0 where p > 0 makes
    kl infinite, by definition, and its gradient NaN in that row. The reference is a constant.

    Args:
        logits: [..., V] of the policy; float32, bfloat16, float16 or float64. Row t must hold the
            logits that `token_ids[..., t]` was sampled from:
            `model(ids).logits[:, prompt - 1 : -1]` of a causal LM, with
            `token_ids = ids[:, prompt:]`.
        ref_logits: [..., V] of the reference, the same rows, on the same device; the dtype may
            differ. Must not require grad.
        token_ids: [...] int64 or int32, in [0, V) where the mask is True.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it is 0
            are not read, and give 0. None: all rows count.
        temperature: divides the policy's logits; finite and above 0.
        ref_temperature: divides the reference's logits. None: the policy's temperature.
        softcap: Gemma's soft cap of the policy, before the temperature; finite and above 0. None:
            no cap.
        ref_softcap: soft cap of the reference. None: no cap, whatever the policy's.
        support: the set that each token was sampled from, as a `Support` of one row for each of
            `token_ids.flatten()`: p is the softmax over the row's set, and the gradient 0 outside.
            A sampled token outside its set is refused on a CPU, and elsewhere has log-probability
            -inf. Not with a group. None: the whole vocabulary.
        ref_support: "same": the reference is over the same sets. "full": over the whole vocabulary,
            which adds -log q(set) to the KL and makes forward KL infinite where a set leaves tokens
            out.
        inplace_backward: write the gradient over the logits, in backward, instead of beside them.
            Another backward that needs them raises torch's error about tensors modified in place.
        group: the process group that the vocabulary is sharded over: logits are [..., V_local], and
            token ids count over the whole vocabulary. None: logits are whole.
        vocab_start: with a group, the global token id of this rank's first logit. None: all shards
            are of one size, and in the order of the ranks.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        TokenKL(logprob, ref_logprob, kl, forward_kl, entropy), each [...], in nats, float32
        (float64 for float64 logits); all but ref_logprob differentiable, in any mix.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
        >>> out = kl_kernels.token_kl(p.log(), q.log(), torch.tensor([1]))
        >>> round(out.kl.item(), 4), round((p * (p / q).log()).sum().item(), 4)
        (0.5108, 0.5108)
        >>> round((out.logprob - out.ref_logprob).item(), 4)  # k1, of the sampled token alone
        1.6094
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
    check_ref_support(ref_support)
    ids, kept = prepare_token_ids(token_ids, logits), prepare_mask(mask, logits)
    # (By name it would take a microsecond longer.)
    args = TokenKLArgs(models.logits, models.ref_logits, ids, kept, *models.transforms)
    execution = Execution(inplace_backward, backend)
    if support is None:
        outputs = operator_over("token_kl", logits, group, vocab_start)(*args, *execution)
    else:
        outputs = over_kept(support, args, execution, group, ref_support)
    return TokenKL(*(shaped(output, token_ids.shape) for output in outputs[:5]))


@takes_dtensors
def kl_rewards(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    scores: Tensor,  # [B]
    mask: Tensor,  # [B, T]
    *,
    kl_coef: float,
    kl_estimator: Estimator = "k1",
    score_position: ScorePosition | Tensor = "last_token",  # or [B]
    score_clip: float | None = None,
    kl_clip: float | None = None,
    biased: bool = False,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    support: Support | None = None,
    ref_support: RefSupport = "same",
    inplace_backward: bool = False,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: BackendName | None = None,
) -> KLRewards:
    """Shaped rewards of RLHF: -kl_coef * KL per token, and the score once, in one pass.

    The KL of each token is k1 = logprob - ref_logprob or the exact KL over the vocabulary (Ziegler
    et al. 2019, arXiv 1909.08593, equation 2, token by token). Exact KL has no sampling noise, but
    as a reward it does not depend on the sampled token; its policy gradient is right only together
    with `advantage_correction` = -kl_coef (k1 - exact), to be added to the advantages, or with the
    differentiable exact KL in the loss. (For k1 the correction is 0.)

    Args:
        logits: [B, T, V] of the policy; float32, bfloat16, float16 or float64. Row t must hold the
            logits that `token_ids[:, t]` was sampled from: `model(ids).logits[:, prompt - 1 : -1]`
            of a causal LM, with `token_ids = ids[:, prompt:]`.
        ref_logits: [B, T, V] of the reference, the same rows, on the same device; the dtype may
            differ. Must not require grad.
        token_ids: [B, T] the sampled tokens; int64 or int32, in [0, V) where the mask is True.
        scores: [B] one score per sequence, any dtype but complex; a NaN stays in its sequence. With
            cu_seqlens [S].
        mask: [B, T] bool, or numbers that are 0 or 1 (looked at on a CPU alone): 1 at response
            tokens. It may have holes (tool output), which change nothing. Other rows are not read,
            and give 0.
        kl_coef: beta, finite, 0 or above; 0 leaves the score alone.
        kl_estimator: "k1" or "exact"; "k2", "k3" and "abs" only with `biased`.
        score_position: [B] a position in each sequence, -1 for nowhere; or "last_token" (last 1 of
            the mask) or "after_last" (one later, as in TRL; the last column, or the last position
            of a packed sequence, where there is no later one). A response without tokens gets no
            reward anywhere.
        score_clip: scores are clamped to [-score_clip, score_clip]; above 0. None: no clamp.
        kl_clip: each token's KL is clamped to [-kl_clip, kl_clip] nats before kl_coef; above 0.
            None: no clamp.
        biased: accept an estimator whose expected policy gradient is not that of the KL.
        temperature: divides the policy's logits; finite and above 0.
        ref_temperature: divides the reference's logits. None: the policy's temperature.
        softcap: Gemma's soft cap of the policy, before the temperature; finite and above 0. None:
            no cap.
        ref_softcap: soft cap of the reference. None: no cap, whatever the policy's.
        support: the set that each token was sampled from, as a `Support` of one row for each of
            `token_ids.flatten()`: p is the softmax over the row's set, and the gradient 0 outside.
            A sampled token outside its set is refused on a CPU, and elsewhere has log-probability
            -inf. Not with a group. None: the whole vocabulary.
        ref_support: "same": the reference is over the same sets. "full": over the whole vocabulary,
            which adds -log q(set) to the KL and makes forward KL infinite where a set leaves tokens
            out.
        inplace_backward: write the gradient over the logits, in backward, instead of beside them.
            Another backward that needs them raises torch's error about tensors modified in place.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the rows from cu_seqlens[s] to before cu_seqlens[s + 1].
            Logits are then [N, V] or [1, N, V], and what is [B, T] here is [N] or [1, N]. None:
            each row of [B, T] is one.
        group: the process group that the vocabulary is sharded over: logits are [B, T, V_local],
            and token ids count over the whole vocabulary. None: logits are whole.
        vocab_start: with a group, the global token id of this rank's first logit. None: all shards
            are of one size, and in the order of the ranks.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        KLRewards(rewards, advantage_correction, kl, logprob, ref_logprob, entropy), each [B, T],
        or as packed token ids; float32 (float64 for float64 logits). Rewards and correction carry
        no gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> logits = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> ref_logits = torch.zeros(1, 2, 2)
        >>> token_ids, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
        >>> scores = torch.tensor([3.0])
        >>> out = kl_kernels.kl_rewards(logits, ref_logits, token_ids, scores, mask, kl_coef=0.1)
        >>> out.rewards  # -0.1 (ln 0.731 - ln 0.5), then the score
        tensor([[-0.0380,  3.0000]])
    """
    check_batch_of_rows("logits", logits, "V", cu_seqlens)
    models = prepare_models(
        logits,
        ref_logits,
        temperature,
        ref_temperature,
        softcap,
        ref_softcap,
        inplace_backward,
    )
    ids = prepare_token_ids(token_ids, logits)
    checks.check_per_token("mask", mask, logits)
    sequences = sequences_of("mask", mask, cu_seqlens)
    sequences.check_scores("scores", scores)
    mask = checks.check_mask("mask", mask)
    check_ref_support(ref_support)
    kl_coef = checks.check_non_negative("kl_coef", kl_coef)
    check_reward_estimator(kl_estimator, biased=biased)
    if kl_clip is not None:
        kl_clip = checks.check_positive("kl_clip", kl_clip)
    scores = clip_scores(scores.detach().to(output_dtype(logits)), score_clip)
    score_index = score_indices(score_position, mask, sequences)
    packed_scores = None
    if cu_seqlens is not None:  # the operator has one score for each row: none
        packed_scores = placed_scores(scores, score_index, sequences)
        scores, score_index = scores.new_zeros(1), score_index.new_full((1,), -1)
    args = KLRewardsArgs(
        token_ids=ids,
        mask=as_tokens(mask),
        scores=scores,
        score_index=score_index,
        kl_coef=kl_coef,
        estimator=ESTIMATORS.index(kl_estimator),
        kl_clip=kl_clip,
        **models._asdict(),
    )
    execution = Execution(inplace_backward, backend)
    if support is None:
        operator = operator_over("kl_rewards", logits, group, vocab_start)
        rewards, correction, *outputs = operator(*args, *execution)
    else:
        outputs = list(over_kept(support, args, execution, group, ref_support)[:5])
        rewards, correction = rewards_of(outputs, args)
    logprob, ref_logprob, kl, _, entropy, *_ = outputs
    found = rewards, correction, kl, logprob, ref_logprob, entropy
    result = KLRewards(*(shaped(output, token_ids.shape) for output in found))
    if packed_scores is None:
        return result
    return result._replace(rewards=result.rewards + packed_scores)
