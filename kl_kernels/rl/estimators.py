"""Per-token KL(policy || reference) from the two log-probabilities of the sampled token.

With d = log policy - log reference, Schulman (2020), "Approximating KL divergence":

    k1 = d                    unbiased, noisy, negative half the time
    k2 = d^2 / 2              biased, but its gradient is that of the KL
    k3 = exp(-d) - 1 + d      unbiased and never negative
    abs = |d|                 an estimate of no KL; some trainers offer it

A good value does not make a good loss. Tokens are sampled, so the gradient of the expected KL has
a term for the sampling, which differentiating an estimator misses (Tang & Munos, arXiv 2506.09477).
For tokens sampled from the policy itself, or from an older one whose `old_logprobs` are given, the
expected gradient is that of KL(policy || reference) at the token where the table says KL:

    gradient           k1            k2          k3                       abs
    "pathwise"         0: refused    KL          KL(reference || policy)  neither
    "straight_through" KL            KL          KL                       KL
    "score_function"   KL            E[k2]'s     KL                       E[abs]'s
    "detach"           no gradient

"pathwise" and "straight_through" weigh a token with the importance ratio policy / old as a
constant, "score_function" with the ratio itself, whose gradient is the missing term. (E[k2]'s is
the gradient of the expectation of k2, which is not the KL; likewise E[abs]'s.) Off-policy tokens
without `old_logprobs` give another, biased, gradient in every row.

All this is per token. The KL of a sequence also depends on a token through the tokens after it,
which a loss cannot see: there the KL belongs in the reward, or in both (`kl_rewards`).

A model that filters its logits (top-k, top-p) rules tokens out: their log-probability is -inf. A
token that both sides rule out has d = 0 and a ratio of 1, and both are constants. A token that the
policy alone rules out has d = -inf, so k2, k3 and abs are +inf; one that the reference alone rules
out has d = +inf, and all four are +inf. Clamps clamp these as they do any value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from kl_kernels.algebra.epilogues import k3_of
from kl_kernels.checks import check_choice, check_like, check_mask, check_positive
from kl_kernels.rl.log_ratio import masked_log_ratio
from kl_kernels.rl.masked import select
from kl_kernels.rl.straight_through import clamp_value, with_value
from kl_kernels.schemas import output_dtype

KLPenalty = Literal[
    "k1",
    "kl",
    "k2",
    "mse",
    "k3",
    "low_var_kl",
    "abs",
    "k1+",
    "kl+",
    "k2+",
    "mse+",
    "k3+",
    "low_var_kl+",
    "abs+",
]
Gradient = Literal["pathwise", "straight_through", "score_function", "detach"]


def _k1(d: Tensor) -> Tensor:
    return d


def _k2(d: Tensor) -> Tensor:
    return d.square() / 2


SAMPLED_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": _k1,
    "kl": _k1,
    "k2": _k2,
    "mse": _k2,
    "k3": k3_of,
    "low_var_kl": k3_of,
    "abs": torch.abs,
}


def kl_penalty(
    logprobs: Tensor,  # [...]
    ref_logprobs: Tensor,  # [...]
    kl_penalty: KLPenalty = "k1",
    *,
    gradient: Gradient = "pathwise",
    old_logprobs: Tensor | None = None,  # [...]
    mask: Tensor | None = None,  # [...]
    log_ratio_clamp: float | None = None,
    kl_clamp: float | None = None,
) -> Tensor:
    """Per-token estimate of KL(policy || reference), as a value, a reward or a loss.

    The value is w f(d): f the estimator at d = logprobs - ref_logprobs, w = 1, or the importance
    ratio exp(logprobs - old_logprobs) for tokens sampled from an older policy. The gradient with
    respect to logprobs is

        "pathwise"          w f'(d)
        "straight_through"  w d             k2's, whatever the value
        "score_function"    w (f(d) + f'(d))
        "detach"            none

    In expectation over the tokens this is the gradient of KL(policy || reference) with
    "straight_through" for every estimator, with "pathwise" for k2, and with "score_function" for k1
    and k3. (k3 with "pathwise" has that of KL(reference || policy).)

    Clamps bound values and leave the gradient alive: a token far from the reference keeps its
    pull-back, where a plain clamp would make it exactly 0.

    A token that both sides rule out (log-probability -inf) has d = 0 and no gradient. One that the
    policy alone rules out has d = -inf: k2, k3 and abs are +inf and k1 is -inf, until a clamp
    bounds them. A token of weight w = 0 adds nothing, however far off it is.

    Args:
        logprobs: [...] log-probability of the sampled token under the policy, in nats; any float
            dtype.
        ref_logprobs: [...] the same under the reference. A constant: it never gets a gradient.
        kl_penalty: "k1" or "kl", "k2" or "mse", "k3" or "low_var_kl", "abs"; with a plus ("k1+",
            "kl+", "k2+", "mse+", "k3+", "low_var_kl+", "abs+") the same with
            gradient="straight_through", as in verl.
        gradient: "pathwise", "straight_through", "score_function" or "detach".
        old_logprobs: [...] log-probability under the policy that sampled the token, a constant.
            None: the policy itself sampled it.
        mask: [...] bool, or numbers that are 0 or 1; where it is 0 the result and gradient are
            exactly 0, even if the inputs are NaN. None: every position counts.
        log_ratio_clamp: d is taken as clamped to [-log_ratio_clamp, log_ratio_clamp], in value and
            in f', in nats; the importance ratio is not clamped. k3 overflows at d = -88 without it,
            and the gradient of an infinite d is infinite.
        kl_clamp: f(d) is clamped to [-kl_clamp, kl_clamp] nats, before w; f'(d) is not. With
            "score_function" the clamped f(d) is in the gradient, so there it biases.

    Returns:
        [...] in nats, float32 (float64 for float64 logprobs).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range; "+" is
            combined with another gradient; "k1" with gradient "pathwise" where logprobs requires
            grad: as a loss its expected gradient is 0, and no token's depends on the reference.

    Examples:
        >>> import torch, kl_kernels
        >>> policy, reference = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.25, 0.5, 0.0])
        >>> kl_kernels.kl_penalty(policy.log(), reference.log(), "k3")
        tensor([0.1931, 0.3069, 0.0000])
    """
    check_choice("kl_penalty", kl_penalty, get_args(KLPenalty))
    check_choice("gradient", gradient, get_args(Gradient))
    name = kl_penalty.removesuffix("+")
    if name != kl_penalty:
        if gradient not in ("pathwise", "straight_through"):
            raise ValueError(
                f"kl_penalty {kl_penalty!r} asks for the straight-through gradient, "
                f"gradient is {gradient!r}; drop the '+' or the other"
            )
        gradient = "straight_through"
    _check_tensors(logprobs, ref_logprobs, old_logprobs, mask)
    mask = None if mask is None else check_mask("mask", mask)
    if log_ratio_clamp is not None:
        log_ratio_clamp = check_positive("log_ratio_clamp", log_ratio_clamp)
    if kl_clamp is not None:
        kl_clamp = check_positive("kl_clamp", kl_clamp)
    estimator = SAMPLED_ESTIMATORS[name]
    if estimator is _k1 and gradient == "pathwise" and _needs_gradient(logprobs):
        raise ValueError(
            f"kl_penalty {kl_penalty!r} with gradient 'pathwise' is no loss: its expected gradient "
            "is 0 and does not depend on ref_logprobs. For a loss use 'k2', 'k3+' or "
            "gradient='score_function'; for a value pass gradient='detach'"
        )

    d = clamp_value(masked_log_ratio(logprobs, ref_logprobs, mask), log_ratio_clamp)
    weight = None
    if old_logprobs is not None:
        weight = masked_log_ratio(logprobs, old_logprobs, mask).exp()
        d = torch.where(weight == 0, 0.0, d)  # f and f' may be infinite there, and 0 * inf is NaN
    elif gradient == "score_function":
        weight = _one(logprobs, mask)
    kl = clamp_value(estimator(d), kl_clamp)
    if gradient == "straight_through":
        kl = with_value(_k2(d), kl)
    if weight is not None:
        kl = kl * (weight if gradient == "score_function" else weight.detach())
    return kl.detach() if gradient == "detach" else kl


def _check_tensors(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor | None,
) -> None:
    check_like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    if old_logprobs is not None:
        check_like("old_logprobs", old_logprobs, "logprobs", logprobs)
    if mask is not None:
        check_like("mask", mask, "logprobs", logprobs)


def _needs_gradient(logprobs: Tensor) -> bool:
    return torch.is_grad_enabled() and logprobs.requires_grad


def _one(logprobs: Tensor, mask: Tensor | None) -> Tensor:
    """The ratio of the policy to itself: 1, whose gradient is that of its logarithm."""
    log = select(logprobs, mask, output_dtype(logprobs))
    return with_value(log, torch.ones_like(log))
