"""The true values, and torch eager's: the formulas with autograd, without blocks or state.

Independent of `reference` on purpose: nothing here shares code with what is being checked.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kl_kernels.lab.validate.cases import NEG_INF, Inputs

OUTPUTS = ("logprob", "ref_logprob", "kl", "forward_kl", "entropy")
DIFFERENTIABLE = ("logprob", "kl", "forward_kl", "entropy")
BETA = 0.3  # Jensen-Shannon divergence: not 1/2, so that the models' roles differ


def eager(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The five outputs in `dtype` arithmetic, differentiable, each [B, T]; masked rows are 0."""
    keep, log_p, log_q = _models(inputs, dtype)
    token_ids = torch.where(keep, inputs.token_ids, 0)[..., None]
    outputs = {
        "logprob": log_p.gather(-1, token_ids).squeeze(-1),
        "ref_logprob": log_q.gather(-1, token_ids).squeeze(-1),
        "kl": _divergence(log_p, log_q),
        "forward_kl": _divergence(log_q, log_p),
        "entropy": -(log_p.exp() * _finite(log_p)).sum(-1),
    }
    return {name: torch.where(keep, value, 0.0) for name, value in outputs.items()}


def eager_jsd(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The generalised Jensen-Shannon divergence for BETA, in `dtype` arithmetic, [B, T]."""
    keep, log_p, log_q = _models(inputs, dtype)
    of_p, of_q = math.log(1 - BETA), math.log(BETA)
    log_m = torch.logaddexp(_finite(log_p) + of_p, _finite(log_q) + of_q)
    # Where one of them is 0, the mixture is the other's share.
    log_m = torch.where(log_p == NEG_INF, log_q + of_q, log_m)
    log_m = torch.where(log_q == NEG_INF, log_p + of_p, log_m)
    jsd = BETA * _divergence(log_q, log_m) + (1 - BETA) * _divergence(log_p, log_m)
    return torch.where(keep, jsd, 0.0)


def _models(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows that count, [B, T], and both models' log-softmax, [B, T, V]."""
    keep = torch.ones_like(inputs.token_ids, dtype=torch.bool)
    if inputs.mask is not None:
        keep = inputs.mask
    x = torch.where(keep[..., None], inputs.logits, 0.0).to(dtype)
    y = torch.where(keep[..., None], inputs.ref_logits, 0.0).to(dtype)
    ref_temperature = inputs.ref_temperature or inputs.temperature
    log_p = _log_softmax(x, inputs.temperature, inputs.softcap)
    return keep, log_p, _log_softmax(y, ref_temperature, inputs.ref_softcap)


def _log_softmax(x: Tensor, temperature: float, softcap: float | None) -> Tensor:
    if softcap is not None:
        x = torch.where(x.isinf(), x, softcap * torch.tanh(x / softcap))
    return torch.log_softmax(x / temperature, -1)


def _finite(log_p: Tensor) -> Tensor:
    """Replace -inf, the log of p = 0, by 0: it is multiplied by p, and 0 * -inf is NaN."""
    return log_p.masked_fill(log_p == NEG_INF, 0.0)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = log_p.exp() * (_finite(log_p) - _finite(log_q))
    infinite = (log_q == NEG_INF) & (log_p != NEG_INF)
    return terms.masked_fill(infinite, torch.inf).sum(-1)


def gradients(
    inputs: Inputs, weights: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:  # weights: [B, T] each -> [B, T, V] each, in `dtype`
    """d/d logits of each weighted output's sum.

    Where KL is infinite its gradient is NaN by definition; where forward KL is, the formula p - q
    goes on to hold.
    """
    x = inputs.logits.to(dtype).requires_grad_()
    outputs = eager(replace(inputs, logits=x), dtype)
    found = {
        name: torch.autograd.grad((w.to(dtype) * outputs[name]).sum(), x, retain_graph=True)[0]
        for name, w in weights.items()
    }
    infinite = (outputs["kl"] == torch.inf)[..., None]
    found["kl"] = found["kl"].masked_fill(infinite, torch.nan)
    infinite = (outputs["forward_kl"] == torch.inf)[..., None]
    found["forward_kl"] = torch.where(
        infinite, _p_minus_q(inputs, weights["forward_kl"], dtype), found["forward_kl"]
    )
    return found


def jsd_gradient(inputs: Inputs, weight: Tensor, dtype: torch.dtype) -> Tensor:  # weight: [B, T]
    """Gradient of the weighted JSD's sum, [B, T, V]."""
    x = inputs.logits.to(dtype).requires_grad_()
    jsd = eager_jsd(replace(inputs, logits=x), dtype)
    return torch.autograd.grad((weight.to(dtype) * jsd).sum(), x)[0]


def _p_minus_q(inputs: Inputs, weight: Tensor, dtype: torch.dtype) -> Tensor:
    x, y = inputs.logits.to(dtype), inputs.ref_logits.to(dtype)
    p = _log_softmax(x, inputs.temperature, inputs.softcap).exp()
    q = _log_softmax(y, inputs.ref_temperature or inputs.temperature, inputs.ref_softcap).exp()
    slope = 1.0 if inputs.softcap is None else 1.0 - torch.tanh(x / inputs.softcap) ** 2
    return weight[..., None].to(dtype) * (p - q) * slope / inputs.temperature
