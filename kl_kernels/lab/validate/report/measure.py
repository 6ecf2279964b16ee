"""Errors of every contender on the rows of a cell, against float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kl_kernels
from kl_kernels.lab.validate.cases import NEG_INF, Inputs
from kl_kernels.lab.validate.errors import half_ulp
from kl_kernels.lab.validate.report.eager import dtype_eager, upcast_eager
from kl_kernels.lab.validate.report.grid import Cell
from kl_kernels.lab.validate.report.rows import make_rows
from kl_kernels.lab.validate.truth import (
    BETA,
    DIFFERENTIABLE,
    eager,
    eager_jsd,
    gradients,
    jsd_gradient,
)

EAGER, DTYPE_EAGER = "eager", "eager in the dtype"
EAGERS = {EAGER: upcast_eager, DTYPE_EAGER: dtype_eager}
DIVERGENCES = ("kl", "forward_kl", "jsd")
NEVER_NEGATIVE = (*DIVERGENCES, "entropy", "stats entropy")
VALUES = (
    "logprob",
    "ref_logprob",
    "kl",
    "forward_kl",
    "entropy",
    "stats logprob",
    "stats entropy",
    "jsd",
)
GRADIENTS = ("d logprob", "d kl", "d forward_kl", "d entropy", "d stats", "d jsd")
QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}
ULP = 2.0**-23  # float32's spacing from 1 to 2
RELATIVE_KL_BUDGET = 2e-6  # the part of a KL's budget that grows with the KL
DIGITS = 4

Contender = Callable[[Inputs], dict[str, Tensor]]
Results = dict[str, Any]


def contenders(backends: tuple[str, ...]) -> dict[str, Contender]:
    return {**{name: partial(fused, backend=name) for name in backends}, **EAGERS}


def fused(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Outputs [B, T], and gradients [B, T, V] of each output's sum ("d ...")."""
    logits = inputs.logits.detach().requires_grad_()
    scale: dict[str, Any] = {"temperature": inputs.temperature, "backend": backend}
    kl = kl_kernels.token_kl(logits, inputs.ref_logits, inputs.token_ids, **scale)
    stats = kl_kernels.token_stats(logits, inputs.token_ids, **scale)
    jsd = kl_kernels.token_jsd(logits, inputs.ref_logits, beta=BETA, **scale)

    def grad(*outputs: Tensor) -> Tensor:
        total = torch.stack([output.sum() for output in outputs]).sum()
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    found = kl._asdict() | {"jsd": jsd}
    found |= {f"stats {name}": value for name, value in stats._asdict().items()}
    return {name: value.detach() for name, value in found.items()} | {
        "d logprob": grad(kl.logprob),
        "d kl": grad(kl.kl),
        "d forward_kl": grad(kl.forward_kl),
        "d entropy": grad(kl.entropy),
        "d stats": grad(stats.logprob, stats.entropy),
        "d jsd": grad(jsd),
    }


@dataclass(frozen=True)
class Truth:
    """Every quantity in float64, and the scale of each gradient's error."""

    found: dict[str, Tensor]  # outputs [B, T], gradients [B, T, V]
    rounding: dict[str, Tensor]  # [B, T, V], by gradient: half an ulp of the logits' dtype
    scale: dict[str, Tensor]  # [B, T], by gradient: its norm, or that of its terms if larger

    @classmethod
    def of(cls, inputs: Inputs) -> Truth:
        found, terms = true_of(inputs), gradient_terms(inputs)
        norms = {name: torch.linalg.vector_norm(found[name], dim=-1) for name in GRADIENTS}
        return cls(
            found,
            {name: half_ulp(found[name], inputs.logits.dtype) for name in GRADIENTS},
            # The gradient of a sum of two outputs has the terms of both.
            {
                name: torch.maximum(norm, 2 * terms if name == "d stats" else terms)
                for name, norm in norms.items()
            },
        )


def true_of(inputs: Inputs) -> dict[str, Tensor]:
    """Compute in float64 the quantities that `fused` computes."""
    ones = torch.ones(inputs.token_ids.shape, dtype=torch.float64, device=inputs.logits.device)
    weights = dict.fromkeys(DIFFERENTIABLE, ones)
    found = {name: value.detach() for name, value in eager(inputs, torch.float64).items()}
    found |= {f"stats {name}": found[name] for name in ("logprob", "entropy")}
    found["jsd"] = eager_jsd(inputs, torch.float64)
    found |= {f"d {k}": g for k, g in gradients(inputs, weights, torch.float64).items()}
    found["d stats"] = found["d logprob"] + found["d entropy"]
    return found | {"d jsd": jsd_gradient(inputs, ones, torch.float64)}


def gradient_terms(inputs: Inputs) -> Tensor:  # -> [B, T]
    """The norm over the vocabulary of p max(1, |log p|, |log q|) / temperature.

    Gradients of log-probabilities, entropies and divergences are p times a difference of such
    logarithms; where they vanish, that is what rounding is relative to.
    """
    x, y = inputs.logits.double(), inputs.ref_logits.double()
    log_p, log_q = ((t / inputs.temperature).log_softmax(-1) for t in (x, y))
    larger = torch.maximum(log_p.abs(), log_q.abs()).clamp_min(1.0)
    weighted = (log_p.exp() * larger).masked_fill(log_p == NEG_INF, 0.0)
    return torch.linalg.vector_norm(weighted, dim=-1) / inputs.temperature


def measure(cell: Cell, runs: Mapping[str, Contender], device: str = "cpu") -> Results:
    """Measure a cell: its true values, and every contender's errors."""
    inputs = make_rows(cell, device)
    truth = Truth.of(inputs)
    if cell.dtype == "float32":
        runs = {name: run for name, run in runs.items() if name != DTYPE_EAGER}
    logits = torch.stack([inputs.logits, inputs.ref_logits]).float()
    largest = logits.masked_fill(logits == NEG_INF, 0.0).abs().max() / cell.temperature
    return {
        "name": cell.name,
        "cell": asdict(cell),
        "largest_logit": _number(largest),
        "true_kl": _distribution(truth.found["kl"]),
        "errors": {name: errors_of(run(inputs), truth) for name, run in runs.items()},
    }


def errors_of(got: dict[str, Tensor], truth: Truth) -> dict[str, Results]:
    """Return every quantity's error in ulps of max(1, value), or of a gradient's scale."""
    return {
        **{name: _value_errors(name, got[name], truth.found[name]) for name in VALUES},
        **{name: _gradient_errors(name, got[name], truth) for name in GRADIENTS},
    }


def _value_errors(name: str, got: Tensor, true: Tensor) -> Results:
    got = got.double()
    error = (got - true).abs()
    found = _distribution(error / (ULP * true.abs().clamp_min(1.0)))
    found["not_finite"] = int((~got.isfinite()).sum())
    found["negative"] = int((got < 0).sum()) if name in NEVER_NEGATIVE else 0
    if name in DIVERGENCES:
        found["largest"] = _number(got.abs().max())
        found["beyond"] = _number((error - RELATIVE_KL_BUDGET * true).max())
        if (true > 0).all():
            found["relative"] = _distribution(error / true)
    return found


def _gradient_errors(name: str, got: Tensor, truth: Truth) -> Results:
    """Norms over a row, beyond the one rounding to the logits' dtype."""
    error = got.double().sub_(truth.found[name]).abs_().sub_(truth.rounding[name]).clamp_min_(0.0)
    excess = torch.linalg.vector_norm(error, dim=-1)
    found = _distribution(excess / (ULP * truth.scale[name]))
    return found | {"not_finite": int((~got.isfinite()).sum()), "negative": 0}


def _distribution(errors: Tensor) -> Results:
    """Summarise the rows' errors; NaN counts as infinite."""
    rows = errors.detach().double().flatten().nan_to_num(torch.inf, torch.inf)
    found = {"max": rows.max(), "mean": rows.mean()}
    # (A quantile between two infinities would be NaN.)
    found |= {name: rows.quantile(at, interpolation="nearest") for name, at in QUANTILES.items()}
    return {name: _number(value) for name, value in found.items()}


def _number(value: Tensor) -> float | None:
    """Round to a few digits; None for NaN and infinities, which JSON lacks."""
    return float(f"{float(value):.{DIGITS}g}") if value.isfinite() else None
