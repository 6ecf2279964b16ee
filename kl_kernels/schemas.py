"""What a backend has to provide: one schema per operator, and the facts all backends share."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

# A backend is any namespace with these names (`dispatch.py` lists them); a compiled library
# implements the same schemas in a namespace of its own (`native.py`). `grad_logits` is where the
# gradient goes: [B, T, V] of the logits' dtype with stride 1 over V, maybe the logits themselves.
#
# Logits may be a part of a vocabulary (a shard, a tile of a linear head). `fold_part` gives its
# state, [len(STATE_FIELDS), B, T], or of a policy alone the first ALONE_FIELDS of them; backward
# kernels are told by `part`. For both, a token may be ELSEWHERE.
KERNELS = {
    "fold_part": """(
        Tensor logits, Tensor? ref_logits, Tensor token_ids, Tensor? mask,
        float temperature, float ref_temperature, float? softcap, float? ref_softcap
    ) -> Tensor state""",
    "token_stats": """(
        Tensor logits, Tensor token_ids, Tensor? mask,
        float temperature, float? softcap
    ) -> (Tensor logprob, Tensor entropy, Tensor policy_state)""",
    "token_stats_backward": """(
        Tensor? grad_logprob, Tensor? grad_entropy,
        Tensor logits, Tensor token_ids, Tensor? mask, Tensor policy_state, Tensor entropy,
        float temperature, float? softcap, bool part, Tensor(a!) grad_logits
    ) -> ()""",
    "token_kl": """(
        Tensor logits, Tensor ref_logits, Tensor token_ids, Tensor? mask,
        float temperature, float ref_temperature, float? softcap, float? ref_softcap
    ) -> (Tensor logprob, Tensor ref_logprob, Tensor kl, Tensor forward_kl, Tensor entropy,
          Tensor policy_state, Tensor ref_state)""",
    "token_kl_backward": """(
        Tensor? grad_logprob, Tensor? grad_kl, Tensor? grad_forward_kl, Tensor? grad_entropy,
        Tensor logits, Tensor ref_logits, Tensor token_ids, Tensor? mask,
        Tensor policy_state, Tensor ref_state, Tensor kl, Tensor entropy,
        float temperature, float ref_temperature, float? softcap, float? ref_softcap,
        bool part, Tensor(a!) grad_logits
    ) -> ()""",
    # The mixture is (1 - beta) policy + beta reference, 0 < beta < 1; `mixture_kl` is
    # KL(policy || mixture). `mixture_part` gives a part's share of both, [len(MIXTURE_SUMS), B, T],
    # from the states of the whole rows.
    "token_jsd": """(
        Tensor logits, Tensor ref_logits, Tensor? mask, float beta,
        float temperature, float ref_temperature, float? softcap, float? ref_softcap
    ) -> (Tensor jsd, Tensor mixture_kl, Tensor policy_state, Tensor ref_state)""",
    "mixture_part": """(
        Tensor logits, Tensor ref_logits, Tensor? mask, Tensor policy_state, Tensor ref_state,
        float beta, float temperature, float ref_temperature, float? softcap, float? ref_softcap
    ) -> Tensor sums""",
    "token_jsd_backward": """(
        Tensor grad_jsd, Tensor logits, Tensor ref_logits, Tensor? mask,
        Tensor policy_state, Tensor ref_state, Tensor mixture_kl, float beta,
        float temperature, float ref_temperature, float? softcap, float? ref_softcap,
        Tensor(a!) grad_logits
    ) -> ()""",
    # `estimator` indexes ESTIMATORS; `score_index` is where the score goes, -1 for nowhere.
    "kl_rewards": """(
        Tensor logits, Tensor ref_logits, Tensor token_ids, Tensor mask,
        Tensor scores, Tensor score_index, float kl_coef, int estimator, float? kl_clip,
        float temperature, float ref_temperature, float? softcap, float? ref_softcap
    ) -> (Tensor rewards, Tensor advantage_correction,
          Tensor logprob, Tensor ref_logprob, Tensor kl, Tensor forward_kl, Tensor entropy,
          Tensor policy_state, Tensor ref_state)""",
    # Without grad_logits there is no gradient; without old_logprobs the ratio is 1; ref_logprobs
    # are for the estimators k2 and k3, ref_logits for the exact KL.
    "policy_loss": """(
        Tensor logits, Tensor? ref_logits, Tensor token_ids, Tensor mask,
        Tensor? old_logprobs, Tensor advantages, Tensor token_weights,
        Tensor? importance_weights, Tensor? ref_logprobs,
        float clip_low, float clip_high, float? dual_clip, float? log_ratio_clamp,
        float kl_coef, int kl_estimator, float entropy_coef,
        float temperature, float ref_temperature, float? softcap, float? ref_softcap,
        Tensor(a!)? grad_logits
    ) -> Tensor terms""",
    # In place, and nothing at all where the factor, a 0-dim float32 tensor, is 1.
    "scale_gradient": "(Tensor(a!) gradient, Tensor factor) -> ()",
    "gae": """(
        Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, bool skip_masked
    ) -> (Tensor advantages, Tensor returns)""",
}

# The token of a row is not among these logits; no id that anybody means.
ELSEWHERE = -(1 << 62)

# `algebra.RowState` and the token's position from the anchors, which is +inf where it is ELSEWHERE.
# A row that is masked, or a part that is all -inf, has sums of 0.
STATE_FIELDS = ("anchor", "sx", "ex", "token_tx", "ref_anchor", "sy", "rk", "fk", "token_ty")
ALONE_FIELDS = 4

# What parts of a vocabulary add up to, once their row is finished; 0 where masked.
MIXTURE_SUMS = ("jsd", "mixture_kl")

# The per-token KL a reward can be shaped with, in the order kernels number them.
Estimator = Literal["k1", "exact", "k2", "k3", "abs"]
ESTIMATORS = get_args(Estimator)

# Accepted by `backend=`: the keys of `dispatch.BACKENDS`.
BackendName = Literal["triton", "cuda", "cpu", "reference"]

# What `policy_loss` returns of every token, [8, B, T]: the first weighted so that the sum over the
# batch is the loss, the others to be averaged; 0 where masked.
POLICY_LOSS_TERMS = (
    "loss",
    "clip_fraction",
    "clip_fraction_dual",
    "approx_kl",
    "approx_kl_k1",
    "ratio_mean",
    "kl",
    "entropy",
)


def output_dtype(logits: Tensor) -> torch.dtype:
    """Float32 for every dtype that is trained in; float64 stays, so that gradcheck can be used."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
