"""The policy loss and its gradient in one visit of the logits."""

from __future__ import annotations

from torch import Tensor

from kl_kernels import checks
from kl_kernels.functional.arguments import (
    check_batch_of_rows,
    needs_gradient,
    prepare_models,
    prepare_policy,
)
from kl_kernels.functional.dtensors import loss_takes_dtensors
from kl_kernels.functional.kept import RefSupport, check_ref_support, kept_args
from kl_kernels.functional.logits import token_stats
from kl_kernels.functional.loss_arguments import (
    ImportanceSamplingLevel,
    LossEstimator,
    check_kl,
    metrics_of,
    prepare_loss,
)
from kl_kernels.functional.support import Support
from kl_kernels.ops.autograd import PolicyLoss
from kl_kernels.partitioned.kept_loss import KeptPolicyLoss
from kl_kernels.rl.losses import Aggregation
from kl_kernels.schemas import BackendName, Execution


@loss_takes_dtensors
def fused_policy_loss(
    logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    old_logprobs: Tensor | None,  # [B, T]
    advantages: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    ref_logits: Tensor | None = None,  # [B, T, V]
    ref_logprobs: Tensor | None = None,  # [B, T]
    kl_loss_coef: float = 0.0,
    kl_estimator: LossEstimator = "exact",
    entropy_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # [B, T]
    importance_sampling_level: ImportanceSamplingLevel = "token",
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    log_ratio_clamp: float | None = 20.0,
    loss_scale: float | Tensor | None = None,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    support: Support | None = None,
    ref_support: RefSupport = "same",
    inplace_backward: bool = False,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    backend: BackendName | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's or GRPO's clipped loss with KL and entropy, and its gradient, reading each logit once.

    With logprob, KL and entropy as `token_kl` gives them, r = exp(logprob - old_logprobs), A the
    advantage, rho the importance weight and m the weight of a token in the aggregation,

        loss = sum m (rho max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
                      + kl_loss_coef KL - entropy_coef entropy)

    (Schulman et al. 2017, arXiv 1707.06347, equation 7; the KL in the loss is GRPO's, Shao et al.
    2024, arXiv 2402.03300.) It equals `ppo_policy_loss` and `aggregate` on the outputs of
    `token_kl`. Those look at the logits twice, once for the statistics and once for the gradient.
    Here the gradient of a row is computed while the row is still on chip, and `backward` only hands
    it out, multiplied by the upstream gradient where that is not 1. A token whose clip decides,
    without KL and entropy, costs no second look at all.

    A loss that is divided by k accumulation steps before `backward`, or multiplied by anything but
    1, has its [B, T, V] gradient read and written once more. Pass `loss_scale=1 / k` and divide all
    the same; or a `denominator` that counts all micro-batches, and do not divide.

    Args:
        logits: [B, T, V] of the policy; float32, bfloat16, float16 or float64. Row t must hold the
            logits that `token_ids[:, t]` was sampled from: `model(ids).logits[:, prompt - 1 : -1]`
            of a causal LM, with `token_ids = ids[:, prompt:]`. The only argument that gets a
            gradient.
        token_ids: [B, T] the sampled tokens; int64 or int32, in [0, V) where the mask is True.
        old_logprobs: [B, T] log-probability of each token under the policy that sampled it, any
            float dtype. None: under this very policy, so that r is 1.
        advantages: [B, T] as `compute_gae` makes them, or one per sequence expanded over its
            tokens; any dtype but complex, taken as constants.
        mask: [B, T] bool, or numbers that are 0 or 1 (looked at on a CPU alone): 1 at response
            tokens; other rows are not read.
        ref_logits: [B, T, V] of the reference, the same rows, on the same device; must not require
            grad. With "k2" and "k3" they are read once, for the token's log-probability.
        ref_logprobs: [B, T] the reference's log-probabilities in their place, for "k2" and "k3".
        kl_loss_coef: coefficient of the KL to the reference in the loss; finite, 0 or above. With 0
            and a reference the KL is a metric all the same.
        kl_estimator: "exact" (the KL over the vocabulary and its gradient), or "k2" or "k3" of the
            sampled token, as GRPO has it; `kl_penalty` tells which gradient those have.
        entropy_coef: coefficient of the entropy bonus; finite.
        clip_low: the ratio is clipped below at 1 - clip_low; 0 or above.
        clip_high: the ratio is clipped above at 1 + clip_high; 0 or above.
        dual_clip: the loss is at most -A dual_clip where A < 0 (Ye et al. 2020, arXiv 1912.09729);
            above 1, 3 is usual. None: no bound.
        weights: [B, T] importance weights rho, as `importance_weights` makes them for the engine
            that sampled; constants. None: 1.
        importance_sampling_level: "token". "sequence" (GSPO) is refused: its ratio needs every
            token of a sequence before the gradient of any.
        aggregation: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean" or
            "seq-mean-token-sum-norm", as verl names them: m is 1 / N, 1 / S, 1 / (S L) or 1 / (S T)
            with N tokens, S sequences that have tokens, L tokens in the token's own sequence; T is
            that of [B, T], padding included, or the length of the longest packed sequence.
        denominator: takes the place of N ("token-mean") or of S (the others) where this call sees
            a part of the batch: what `global_denominator` returns, a number or 0-dim tensor, above
            0 unless no token is under the mask. None: the count of this call.
        log_ratio_clamp: the log-ratio is clamped to [-log_ratio_clamp, log_ratio_clamp] so that r
            stays finite, also in k2 and k3; the gradient passes. Above 0. None: no clamp.
        loss_scale: the factor that the loss will be multiplied by before `backward`, as by a
            gradient scaler: a number or a 0-dim tensor, above 0. The gradient is stored multiplied
            by it. float16 logits need one: their gradients, around 1 / tokens, would underflow.
            None: 1.
        temperature: divides the policy's logits; finite and above 0.
        ref_temperature: divides the reference's logits. None: the policy's temperature.
        softcap: Gemma's soft cap of the policy, before the temperature; finite and above 0. None:
            no cap.
        ref_softcap: soft cap of the reference. None: no cap, whatever the policy's.
        support: the set that each token was sampled from, as a `Support` of one row for each of
            `token_ids.flatten()`: p is the softmax over the row's set, and the gradient 0 outside.
            A sampled token outside its set is refused on a CPU, and elsewhere has log-probability
            -inf. None: the whole vocabulary.
        ref_support: "same": the reference is over the same sets. "full": over the whole vocabulary,
            which adds -log q(set) to the KL and makes forward KL infinite where a set leaves tokens
            out.
        inplace_backward: write the gradient over the logits, in this very call. They are gone then,
            and another backward that needs them raises torch's error about tensors modified in
            place. Rows outside the mask become 0. Where no gradient is asked for
            (`torch.no_grad()`, or logits that do not require grad) none is made, and the logits
            stay as they are.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the rows from cu_seqlens[s] to before cu_seqlens[s + 1].
            Logits are then [N, V] or [1, N, V], and what is [B, T] here is [N] or [1, N]. None:
            each row of [B, T] is one.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        (loss, metrics): a 0-dim float32 loss (float64 for float64 logits) and 0-dim detached
        tensors over the unmasked tokens of this call: clip_fraction, clip_fraction_dual, approx_kl
        (k3 of KL(old || policy)), approx_kl_k1, ratio_mean, ratio_max, entropy, and kl where there
        is a reference (the exact one, or the estimate), in nats.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range;
            importance_sampling_level is "sequence": compute that loss from the outputs of
            `token_kl`.
        RuntimeError: `backward` is called a second time: the first gave the gradient away.

    Examples:
        >>> import torch, kl_kernels
        >>> logits = torch.zeros(1, 2, 4, requires_grad=True)
        >>> token_ids, mask = torch.tensor([[1, 3]]), torch.ones(1, 2, dtype=torch.bool)
        >>> advantages = torch.tensor([[1.0, -1.0]])
        >>> loss, metrics = kl_kernels.fused_policy_loss(logits, token_ids, None, advantages, mask)
        >>> loss.backward()
        >>> logits.grad[0, 0].tolist()  # -A ([token] - p) / 2
        [0.125, -0.375, 0.125, 0.125]
        >>> round(metrics["entropy"].item(), 4)
        1.3863
    """
    checks.refuse_transforms("fused_policy_loss")
    check_batch_of_rows("logits", logits, "V", cu_seqlens)
    if ref_logits is None:
        models = prepare_policy(logits, temperature, softcap, inplace_backward)
    else:
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
    check_kl(ref_logits is not None, ref_logprobs is not None, kl_loss_coef, kl_estimator)
    if ref_logits is not None and kl_estimator != "exact":
        ref_stats = token_stats(
            ref_logits,
            token_ids,
            mask=mask,
            temperature=models.ref_temperature,
            softcap=models.ref_softcap,
            support=support if ref_support == "same" else None,
            backend=backend,
        )
        ref_logprobs = ref_stats.logprob
        models = models._replace(ref_logits=None)
    if not needs_gradient(logits):
        # The function is told of requires_grad alone, not of no_grad, and would make a gradient.
        models = models._replace(logits=models.logits.detach())
    args, loss_scale = prepare_loss(
        logits,
        models,
        token_ids,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs=ref_logprobs,
        kl_loss_coef=kl_loss_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
        importance_sampling_level=importance_sampling_level,
        aggregation=aggregation,
        denominator=denominator,
        log_ratio_clamp=log_ratio_clamp,
        loss_scale=loss_scale,
        cu_seqlens=cu_seqlens,
    )
    execution = Execution(inplace_backward, backend)
    if support is None:
        loss, terms = PolicyLoss.apply(*args, *execution)
    else:
        of_rows = args._replace(logits=args.logits.detach())
        kept = kept_args(support, of_rows, ref_support)
        loss, terms = KeptPolicyLoss.apply(args.logits, kept, of_rows, execution)
    if loss_scale is not None:
        loss = loss / loss_scale
    return loss, metrics_of(terms, args)
