"""Whether a call ended as it may: with the truth, or with an error that names an argument."""

import re
import warnings
from typing import Any

import fuzz_arguments as hostile
import torch
from fuzz_calls import Call, call_of, truth_of
from fuzz_truth import PER_TOKEN

ACCEPTED_ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError)
# Relative to 1 + |truth|; logits of this harness are around 2, so float32 leaves 1e-5 at most.
TOLERANCE = 3e-5
# A product of heads rounds logits of up to 100, and sums their gradients over the vocabulary.
GRADIENT_TOLERANCE = 2e-4


def verdict(seed: int) -> str | None:
    """Return the mistake of call `seed`, or None."""
    call = call_of(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call.function(**call.arguments)
    except ACCEPTED_ERRORS as error:
        wrong = _wrong_error(call, error)
    except Exception as error:
        wrong = None if call.direct else f"{type(error).__name__} is not for arguments: {error}"
    else:
        wrong = _wrong_result(call, result)
        if wrong is None and call.name in PER_TOKEN and _is_comparable(call):
            wrong = _gradient_or_error(call, seed)
    return None if wrong is None else f"{wrong}\n    {call}"


def _wrong_error(call: Call, error: Exception) -> str | None:
    if call.expected == hostile.VALID:
        return f"refuses what is valid: {type(error).__name__}: {error}"
    if call.direct:
        return None  # operators are told by the public functions' checks; they must not crash
    if not any(re.search(rf"\b{name}\b", str(error)) for name in (*call.arguments, "logits")):
        return f"names no argument: {type(error).__name__}: {str(error)[:300]}"
    return None


def _wrong_result(call: Call, result: Any) -> str | None:
    if call.expected == hostile.REFUSED:
        return "accepts arguments that it must refuse"
    if call.direct or (truth := truth_of(call)) is None:
        return None
    if not _is_comparable(call):
        return None
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    with torch.no_grad():
        for i, (got, expected) in enumerate(zip(results, truth(call.arguments), strict=True)):
            if wrong := _differs(got.detach().double(), _masked(call, expected), TOLERANCE):
                return f"result {i} is wrong: {wrong}"
    return None


def _wrong_gradient(call: Call, seed: int) -> str | None:
    """Check the gradient of a call whose results are right."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in call.arguments.items()
        if name in ("logits", "hidden", "weight", "bias") and isinstance(value, torch.Tensor)
    }
    arguments = {**call.arguments, **leaves}
    result = call.function(**arguments)
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    expected = [_masked(call, of) for of in truth_of(call)(arguments)]
    if not all(bool(of.isfinite().all()) for of in expected):
        return None  # an infinite result has no gradient to compare
    pairs = [(r, e) for r, e in zip(results, expected, strict=True) if r.requires_grad]
    g = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(r.shape, generator=g, dtype=torch.float64) for r, _ in pairs]
    grads = [u.to(r.dtype) for u, (r, _) in zip(upstream, pairs)]
    got = torch.autograd.grad([r for r, _ in pairs], list(leaves.values()), grads)
    right = torch.autograd.grad([e for _, e in pairs], list(leaves.values()), upstream)
    for name, one, other in zip(leaves, got, right):
        # Both are rounded to the leaf's dtype, the truth too.
        tolerance = GRADIENT_TOLERANCE + 4 * torch.finfo(one.dtype).eps
        if wrong := _differs(one.double(), other.double(), tolerance):
            return f"gradient of {name} is wrong: {wrong}"
    return None


def _gradient_or_error(call: Call, seed: int) -> str | None:
    try:
        return _wrong_gradient(call, seed)
    except Exception as error:
        return f"backward fails: {type(error).__name__}: {error}"


def _is_comparable(call: Call) -> bool:
    """Whether arguments are moderate: the functions' own tests cover infinities and NaN."""
    values = list(call.arguments.values())
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return (
        all(t.device.type != "meta" for t in tensors)
        and all(_is_moderate(t) for t in tensors if t.is_floating_point())
        and all(_is_usual(v) for v in values if isinstance(v, (int, float)))
    )


def _is_moderate(tensor: torch.Tensor) -> bool:
    return bool((tensor.double().abs() < 1e3).all())


def _is_usual(number: float) -> bool:
    return number == 0 or 1e-6 <= abs(number) <= 1e6


def _masked(call: Call, expected: torch.Tensor) -> torch.Tensor:
    if call.name in PER_TOKEN and (mask := call.arguments.get(PER_TOKEN[call.name])) is not None:
        mask = mask.bool() if mask.ndim == expected.ndim else mask.bool()[..., None]
        expected = torch.where(mask, expected, 0.0)
    return expected


def _differs(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str | None:
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    error = (got - expected).abs() / (1 + expected.abs())
    # The truth is NaN of log-probabilities that are no distribution's.
    if not bool(((error < tolerance) | expected.isnan() | (got == expected)).all()):
        return f"{got.flatten()[:8].tolist()}, not {expected.flatten()[:8].tolist()}"
    return None
