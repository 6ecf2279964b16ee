"""Errors of results, in units that one number can bound.

An error is accepted if it is within the budget, or is at most torch eager's own error in float32
arithmetic on the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kl_kernels
from kl_kernels.lab.validate.cases import Case, Inputs
from kl_kernels.lab.validate.truth import (
    BETA,
    DIFFERENTIABLE,
    OUTPUTS,
    eager,
    eager_jsd,
    gradients,
    jsd_gradient,
)

VALUE_BUDGET = 2e-6
GRADIENT_BUDGET = 1e-5


@dataclass(frozen=True)
class Error:
    """One quantity of one case: its largest error over the rows, and the error that is accepted."""

    case: Case
    quantity: str
    ours: float
    eager: float

    @property
    def budget(self) -> float:
        return GRADIENT_BUDGET if self.quantity.startswith("d ") else VALUE_BUDGET

    @property
    def accepted(self) -> bool:
        return self.ours <= max(self.budget, self.eager)

    def __str__(self) -> str:
        return (
            f"{self.case.name}: {self.quantity} is off by {self.ours:.2e}; "
            f"budget {self.budget:.0e}, eager {self.eager:.2e}"
        )


def value_error(quantity: str, got: Tensor, true: Tensor) -> float:
    """Largest |got - true| / scale; NaN and infinities must be in the same places.

    The scale is max(1, |true|) for logarithms and 0.15 + |true| for divergences, so that a budget
    of 2e-6 means 3e-7 + 2e-6 kl.
    """
    size = true.abs()
    scale = 0.15 + size if "kl" in quantity or quantity == JSD else size.clamp_min(1.0)
    return _largest((got.double() - true).abs() / scale, got, true)


def gradient_error(got: Tensor, true: Tensor, terms: Tensor) -> float:  # [B, T, V] x2, [B, T]
    """Largest excess over half a unit in the last place of the dtype, relative to the row's norm.

    The norm counts as at least 1/40 of the size of the terms that a gradient is the difference of,
    so that a budget of 1e-5 allows two float32 roundings of them where the truth vanishes (V = 1,
    p_token = 1).
    """
    norm = torch.linalg.vector_norm(true, dim=-1, keepdim=True)
    scale = torch.maximum(norm, terms[..., None] / 40)
    excess = (got.double() - true).abs() - half_ulp(true, got.dtype)
    return _largest(excess.clamp_min(0.0) / scale, got, true)


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of `dtype` around `value`, subnormals included."""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp_min(limits.tiny))
    # The top of the range of a half-ulp belongs to the next binade; frexp gives m in [0.5, 1).
    return torch.ldexp(torch.full_like(value, limits.eps / 2), exponent - 1)


def _largest(error: Tensor, got: Tensor, true: Tensor) -> float:
    if not got.numel():
        return 0.0
    special = ~true.isfinite() | ~got.isfinite()
    same = (got.isnan() & true.isnan()) | (got.double() == true)
    error = torch.where(special, torch.where(same, 0.0, torch.inf), error)
    return float(error.detach().max())


def errors(case: Case, backend: str | None, device: str = "cpu") -> list[Error]:
    """Every output of `token_kl`, `token_stats` and `token_jsd`; the gradient of each alone, of all
    mixed and of `fused_policy_loss`.

    The truth, and eager's share of it, are computed on the CPU whatever the device.
    """
    inputs = case.inputs()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(inputs.token_ids.shape, generator=generator) for name in DIFFERENTIABLE
    }
    true, plain = (_eager(inputs, weights, dtype) for dtype in (torch.float64, torch.float32))
    # The gradient of KL is p (log p - log q - KL): its terms are as large as the KL.
    upstream = torch.stack(list(weights.values())).abs().sum(0) / inputs.temperature
    terms = upstream * true["kl"].nan_to_num(1.0, 1.0).clamp_min(1.0)
    found = []
    for quantity, got in _fused(inputs, weights, backend, device).items():
        is_gradient = quantity.startswith("d ")
        expected = quantity.removeprefix("stats ")
        ours, theirs = (
            gradient_error(value, true[expected], terms)
            if is_gradient
            else value_error(quantity, value, true[expected])
            for value in (got, plain[expected].to(got.dtype))
        )
        found.append(Error(case, quantity, ours, theirs))
    return found


MIX = "d all"
STATS_MIX = "d logprob + entropy"
LOSS, LOSS_ALONE = "d policy loss", "d policy loss without reference"
KL_LOSS_COEF, ENTROPY_COEF = 0.5, 0.25
JSD = "jsd"


def _eager(inputs: Inputs, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    found = eager(inputs, dtype)
    grads = gradients(inputs, weights, dtype)
    found |= {f"d {name}": grad for name, grad in grads.items()}
    found[MIX] = torch.stack(list(grads.values())).sum(0)
    found[STATS_MIX] = grads["logprob"] + grads["entropy"]
    # The ratio on policy is 1, so a token's loss is -advantage logprob + coefficients kl, entropy;
    # of a token that is ruled out the ratio is 1 whatever the other logits are, so a constant.
    ruled_out = found["logprob"][..., None] == -torch.inf
    of_ratio = grads["logprob"].masked_fill(ruled_out, 0.0)
    per_unit = {name: grads[name] / weights[name][..., None] for name in ("kl", "entropy")}
    found[LOSS_ALONE] = -of_ratio - ENTROPY_COEF * per_unit["entropy"]
    found[LOSS] = found[LOSS_ALONE] + KL_LOSS_COEF * per_unit["kl"]
    found[JSD] = eager_jsd(inputs, dtype)
    found[f"d {JSD}"] = jsd_gradient(inputs, weights["logprob"], dtype)
    return found


def _fused(
    inputs: Inputs, weights: dict[str, Tensor], backend: str | None, device: str
) -> dict[str, Tensor]:
    weights = {name: w.to(device) for name, w in weights.items()}
    logits = inputs.logits.to(device, copy=True).requires_grad_()
    arguments: dict[str, Any] = vars(inputs.on(device)) | {"logits": logits, "backend": backend}
    result = kl_kernels.token_kl(**arguments)._asdict()
    of_whole_rows = {name: value for name, value in arguments.items() if name != "token_ids"}
    jsd = kl_kernels.token_jsd(**of_whole_rows, beta=BETA)

    def loss_grad(**of_reference: Any) -> Tensor:
        mask, ids = arguments["mask"], arguments["token_ids"]
        loss, _ = kl_kernels.fused_policy_loss(
            **arguments | of_reference | {"mask": torch.ones_like(ids) if mask is None else mask},
            old_logprobs=None,
            advantages=weights["logprob"],
            entropy_coef=ENTROPY_COEF,
            aggregation="seq-mean-token-sum",
            denominator=1.0,
            loss_scale=1.0,
        )
        return torch.autograd.grad(loss, logits)[0]

    found = {LOSS: loss_grad(kl_loss_coef=KL_LOSS_COEF)}
    for name in ("ref_logits", "ref_temperature", "ref_softcap"):
        del arguments[name]
    found[LOSS_ALONE] = loss_grad()
    stats = kl_kernels.token_stats(**arguments)._asdict()

    def grad(outputs: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
        total = torch.stack([(weights[n] * outputs[n]).sum() for n in names]).sum()
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    found |= {JSD: jsd, f"d {JSD}": torch.autograd.grad(jsd, logits, weights["logprob"])[0]}
    found |= {name: result[name] for name in OUTPUTS}
    found |= {f"stats {name}": value for name, value in stats.items()}
    found |= {f"d {name}": grad(result, (name,)) for name in DIFFERENTIABLE}
    found[MIX] = grad(result, DIFFERENTIABLE)
    found[STATS_MIX] = grad(stats, ("logprob", "entropy"))
    return {name: value.cpu() for name, value in found.items()}
