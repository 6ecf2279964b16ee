"""Hypothesis strategies for rows of logits on which softmax and KL kernels go wrong.

All finite logits are multiples of 1/512 below 2^14, which float32 holds exactly: an offset, a
permutation or another dtype changes how they are added up and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import kl_kernels

GRID = 512
NEG_INF = -torch.inf
BACKENDS = ("reference", "cpu")
DTYPE = {"reference": torch.float64, "cpu": torch.float32, "triton": torch.float32}
TOLERANCE = {"reference": 1e-9, "cpu": 4e-6, "triton": 4e-6}
DIFFERENTIABLE = ("logprob", "kl", "forward_kl", "entropy", "jsd")
ONE_MODEL = ("logprob", "ref_logprob", "entropy")
BETA = 0.3


class Rows(NamedTuple):
    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]

    def on(self, backend: str) -> Rows:
        dtype = DTYPE[backend]
        return Rows(self.logits.to(dtype), self.ref_logits.to(dtype), self.token_ids)

    def map(self, change) -> Rows:
        """Both models' logits changed alike."""
        return Rows(change(self.logits), change(self.ref_logits), self.token_ids)


def _random(v, g, spread=3.0):
    return _on_grid(spread * torch.randn(2, v, generator=g, dtype=torch.float64))


def _on_grid(x):
    return (x * GRID).round() / GRID


def _steep(v, g):
    return _on_grid(100 * torch.rand(2, v, generator=g, dtype=torch.float64) - 50)


def _peaked(v, g):
    """Both models are sure, and not of the same token."""
    rows = _random(v, g)
    rows[0, torch.randint(v, (), generator=g)] += 60
    rows[1, torch.randint(v, (), generator=g)] += 40
    return rows


def _late_peak(v, g):
    rows = _random(v, g)
    rows[:, -1] = torch.tensor([300.0, 250.0], dtype=torch.float64)
    return rows


def _flat(v, g):
    rows = _random(v, g)
    rows[0] = 7.0
    return rows


def _equal(v, g):
    return _random(v, g)[:1].expand(2, v).clone()


def _near(v, g):
    rows = _equal(v, g)
    rows[1] += torch.randint(-4, 5, (v,), generator=g) / GRID
    return rows


def _ruled_out(*models):
    def make(v, g):
        """A third of the vocabulary is -inf, in one model or the same third in both."""
        rows = _random(v, g)
        out = torch.rand(v, generator=g) < 1 / 3
        out[torch.randint(v, (), generator=g)] = False
        for model in models:
            rows[model, out] = NEG_INF
        return rows

    return make


FINITE = {
    "random": _random,
    "steep": _steep,
    "peaked": _peaked,
    "late-peak": _late_peak,
    "flat": _flat,
    "equal": _equal,
    "near": _near,
    "both-out": _ruled_out(0, 1),
}
# Where only the policy rules out, forward KL is infinite and its gradient p - q; where only the
# reference does, KL is infinite and its gradient NaN.
ONE_SIDED = {"policy-out": _ruled_out(0), "ref-out": _ruled_out(1)}
KINDS = FINITE | ONE_SIDED


def _later_times_cut_off(x):
    whole = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2]), torch.nan)
    whole[:, :-1] = x
    return whole[:, :-1]


def _vocabulary_slice(x):
    whole = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    whole[..., 1:-2] = x
    return whole[..., 1:-2]


def _vocabulary_first(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


LAYOUTS = (_later_times_cut_off, _vocabulary_slice, _vocabulary_first)
SIZES = (1, 2, 3, 5, 16, 31, 64, 65, 257)
generators = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def hostile(draw, kinds=tuple(KINDS), sizes=SIZES, offsets=(0, 1e4, -1e4)):
    """[2, 2, V] rows, each of its own kind and offsets."""
    v, g = draw(st.sampled_from(sizes)), draw(generators)
    rows = []
    for _ in range(4):
        both = KINDS[draw(st.sampled_from(kinds))](v, g)
        shift = draw(st.tuples(*[st.sampled_from(offsets)] * 2))
        rows.append(both + torch.tensor(shift, dtype=torch.float64)[:, None])
    policy, ref = torch.stack(rows, 1).view(2, 2, 2, v)
    return Rows(policy, ref, torch.randint(v, (2, 2), generator=g))


examples = settings(max_examples=60)  # enough for a property of rows
offsets = st.sampled_from((-1e4, -3.5, 0.125, 8e3))
# So that a sum with an offset is still on the grid.
without_offsets = hostile(offsets=(0,))


class Results(NamedTuple):
    outputs: dict[str, Tensor]  # [B, T] each
    gradients: dict[str, Tensor]  # [B, T, V] each, of the output's sum or weighted sum


def outputs_of(rows, backend, *, beta=BETA, **options):
    """Those of `token_kl`, and `token_jsd`."""
    found = kl_kernels.token_kl(*rows, backend=backend, **options)._asdict()
    jsd = kl_kernels.token_jsd(rows[0], rows[1], beta=beta, backend=backend, **options)
    return {**found, "jsd": jsd}


def evaluate(rows, backend, weights=None, names=DIFFERENTIABLE, **options):
    """All outputs, and the gradient of each that has one."""
    logits = rows.logits.detach().requires_grad_()
    outputs = outputs_of(rows._replace(logits=logits), backend, **options)
    gradients = {}
    for name in names:
        weight = torch.ones_like(outputs[name]) if weights is None else weights[name]
        gradients[name] = torch.autograd.grad(outputs[name], logits, weight, retain_graph=True)[0]
    return Results({name: value.detach() for name, value in outputs.items()}, gradients)


def assert_outputs_agree(found, expected, backend):
    """Compare outputs. Divergences can be small, and must agree all the same."""
    for name, value in expected.items():
        tolerance = TOLERANCE[backend]
        size = 1.0 if name in ONE_MODEL else 0.15
        torch.testing.assert_close(
            found[name].double(),
            value.double(),
            rtol=tolerance,
            atol=tolerance * size,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_gradients_agree(found, expected, backend, size=1.0):
    for name, value in expected.items():
        assert_gradient_agrees(found[name], value, backend, size, name)


def assert_gradient_agrees(found, expected, backend, size=1.0, name=""):
    """Compare up to rounding of terms of `size`, one for all or one per row."""
    error = (found.double() - expected.double()).abs()
    bound = TOLERANCE[backend] * (torch.as_tensor(size)[..., None] + expected.double().abs())
    same = (error <= bound) | (found.isnan() & expected.isnan())
    assert same.all(), (name, found[~same], expected[~same])


def sizes_of(outputs):  # -> [B, T]
    """Return the size of the terms whose differences are a row's gradients."""
    return outputs["kl"].double().nan_to_num(1.0, 1.0).clamp_min(1.0)
