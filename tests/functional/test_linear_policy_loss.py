"""`linear_policy_loss` against `fused_policy_loss` on full float64 logits."""

import itertools
import math

import pytest
import torch

import kl_kernels
from kl_kernels.partitioned import products

B, T, D, REF_D, V = 3, 7, 16, 12, 203
SMALL = 8000  # bytes: several blocks of rows

FEATURES = {
    "plain": {},
    "bias": {"bias": True},
    "this very policy": {"old": None},
    "dual clip": {"dual_clip": 3.0, "clip_low": 0.1, "clip_high": 0.3},
    "importance weights": {"weights": True, "log_ratio_clamp": None},
    "entropy": {"entropy_coef": 0.05},
    "exact KL": {"kl_loss_coef": 0.2, "reference": True, "ref_bias": True},
    "k3 of a head": {"kl_loss_coef": 0.2, "reference": True, "kl_estimator": "k3"},
    "k2 of numbers": {"kl_loss_coef": 0.2, "ref_logprobs": True, "kl_estimator": "k2"},
    "a KL that is only shown": {"reference": True},
    "transforms": {
        **{"temperature": 0.7, "softcap": 4.0, "logit_scale": 1.5, "reference": True},
        **{"ref_temperature": 1.2, "ref_softcap": 6.0, "ref_logit_scale": 0.8},
        "kl_loss_coef": 0.1,
    },
    "sequences": {"aggregation": "seq-mean-token-mean", "denominator": 5.0},
    "a part of a batch": {"aggregation": "token-mean", "denominator": 40.0, "loss_scale": 8.0},
}
OF_HEADS = ("logit_scale", "ref_logit_scale")


class Case:
    def __init__(self, dtype=torch.float32, seed=0, **features):
        g = torch.Generator().manual_seed(seed)

        def normal(*size, spread=1.0):
            return (spread * torch.randn(*size, generator=g)).to(dtype)

        self.options = dict(features)
        flag = lambda name: self.options.pop(name, False)  # noqa: E731
        self.hidden = normal(B, T, D).requires_grad_()
        self.weight = normal(V, D, spread=0.5).requires_grad_()
        self.bias = normal(V).requires_grad_() if flag("bias") else None
        self.ref_hidden = self.ref_weight = self.ref_bias = None
        reference = normal(B, T, REF_D), normal(V, REF_D, spread=0.5), normal(V)
        if flag("reference"):
            self.ref_hidden, self.ref_weight, ref_bias = reference
            self.ref_bias = ref_bias if flag("ref_bias") else None
        self.token_ids = torch.randint(V, (B, T), generator=g)
        self.mask = torch.rand(B, T, generator=g) < 0.7
        self.advantages = torch.randn(B, T, generator=g)
        self.old = None
        near = self.logprobs() + 0.3 * torch.randn(B, T, generator=g)
        if self.options.pop("old", True):
            self.old = near.clamp(max=0)
        if flag("weights"):
            self.options["weights"] = torch.rand(B, T, generator=g)
        if flag("ref_logprobs"):
            self.options["ref_logprobs"] = near.clamp(max=-0.1)

    @property
    def leaves(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def logprobs(self):
        with torch.no_grad():
            logits = self._logits(self.hidden, self.weight, self.bias, 1.0)
            return logits.log_softmax(-1).gather(-1, self.token_ids[..., None])[..., 0].float()

    def _logits(self, hidden, weight, bias, scale):
        logits = hidden.double() @ weight.double().T
        return scale * (logits if bias is None else logits + bias.double())

    @property
    def of_tokens(self):
        return self.token_ids, self.old, self.advantages, self.mask

    def ours(self, **options):
        return kl_kernels.linear_policy_loss(
            *(self.hidden, self.weight, *self.of_tokens),
            bias=self.bias,
            ref_hidden=self.ref_hidden,
            ref_weight=self.ref_weight,
            ref_bias=self.ref_bias,
            **(self.options | options),
        )

    def truth(self):
        options = dict(self.options)
        scale = options.pop("logit_scale", 1.0)
        ref_scale = options.pop("ref_logit_scale", scale)
        if self.ref_hidden is not None:
            options["ref_logits"] = self._logits(
                self.ref_hidden, self.ref_weight, self.ref_bias, ref_scale
            )
        logits = self._logits(self.hidden, self.weight, self.bias, scale)
        return kl_kernels.fused_policy_loss(logits, *self.of_tokens, backend="reference", **options)


def assert_near(found, expected, tolerance):
    """Relative to the largest entry."""
    assert found.shape == expected.shape
    largest = expected.double().abs().max().clamp_min(1e-12)
    assert ((found.double() - expected.double()).abs().max() / largest) < tolerance


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("features", "backend"),
    [
        *itertools.product(FEATURES, ["cpu", "reference"]),
        *itertools.product(["exact KL", "dual clip"], ["triton"]),  # the interpreter is slow
    ],
)
def test_loss_metrics_and_gradients_are_those_of_the_logits(features, backend):
    case = Case(**FEATURES[features])
    loss, metrics = case.ours(backend=backend, memory_budget=SMALL)
    exact, exact_metrics = case.truth()
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=2e-6)
    assert metrics.keys() == exact_metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(value.double(), exact_metrics[name], rtol=1e-5, atol=1e-5)
    upstream = 3.0  # not 1, which backward need not scale by
    gradients = torch.autograd.grad(upstream * loss, case.leaves)
    for gradient, expected in zip(gradients, torch.autograd.grad(upstream * exact, case.leaves)):
        assert_near(gradient, expected, 2e-5)


def test_blocks_of_all_sizes_agree():
    case = Case(**FEATURES["exact KL"])
    found = []
    for budget in (3000, SMALL, 1 << 20):
        loss, _ = case.ours(memory_budget=budget)
        found.append((loss.detach(), *torch.autograd.grad(loss, case.leaves)))
    for others in found[1:]:
        for value, first in zip(others, found[0]):
            assert_near(value, first, 1e-5)


def test_masked_rows_are_not_read_and_get_nothing():
    case = Case(bias=True)
    expected = case.ours()[0]
    expected_grads = torch.autograd.grad(expected, case.leaves)
    for tensor in (case.hidden.data, case.advantages, case.old):
        tensor[~case.mask] = math.nan
    case.token_ids[~case.mask] = 10**6
    case.old[~case.mask] = 0.0  # log-probabilities are checked wherever they are
    loss, _ = case.ours()
    gradients = torch.autograd.grad(loss, case.leaves)
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_grads))
    assert (gradients[0][~case.mask] == 0).all()


def test_without_tokens_the_loss_and_all_gradients_are_0():
    case = Case(bias=True, kl_loss_coef=0.1, reference=True)
    case.mask = torch.zeros_like(case.mask)
    loss, metrics = case.ours()
    gradients = torch.autograd.grad(loss, case.leaves)
    assert loss == 0
    assert all((g == 0).all() for g in gradients)
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_a_frozen_factor_gets_no_gradient(needed):
    case = Case(bias=True)
    expected = torch.autograd.grad(case.ours()[0], case.leaves)
    for leaf, needs in zip(case.leaves, needed):
        leaf.requires_grad_(bool(needs))
    case.ours(memory_budget=SMALL)[0].backward()
    for leaf, needs, gradient in zip(case.leaves, needed, expected):
        assert (leaf.grad is not None) == bool(needs)
        if needs:
            assert_near(leaf.grad, gradient, 1e-5)


def test_without_a_graph_there_is_no_gradient():
    case = Case()
    expected, _ = case.ours()
    with torch.no_grad():
        loss, _ = case.ours()
    assert not loss.requires_grad
    assert torch.equal(loss, expected.detach())


def test_a_second_backward_is_refused():
    loss, _ = Case().ours()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused():
    case = Case()
    loss, _ = case.ours()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)


def test_steps_train_as_with_logits():
    """Three steps of an optimiser, with accumulation over two micro-batches of each."""
    ours, theirs = Case(bias=True), Case(bias=True)
    optimisers = [torch.optim.Adam(case.leaves, 0.05) for case in (ours, theirs)]
    for _ in range(3):
        for case, optimiser in zip((ours, theirs), optimisers):
            optimiser.zero_grad()
            for _ in range(2):
                loss = (case.ours(memory_budget=SMALL) if case is ours else case.truth())[0]
                (loss / 2).backward()
            optimiser.step()
    for a, b in zip(ours.leaves, theirs.leaves):
        assert_near(a.detach(), b.detach(), 1e-3)


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(
        products, "multiplies_narrow", lambda device, dtype: dtype in products.NARROW
    )


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", ["plain", "bias", "exact KL", "transforms"])
def test_narrow_products_lose_little_more_than_rounding(features, dtype):
    case = Case(dtype, **FEATURES[features])
    loss, _ = case.ours(memory_budget=3 * SMALL)
    gradients = torch.autograd.grad(loss, case.leaves)
    for name in ("hidden", "weight", "bias"):
        if (leaf := getattr(case, name)) is not None:
            setattr(case, name, leaf.detach().double().requires_grad_())
    exact, _ = case.truth()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, torch.autograd.grad(exact, case.leaves)):
        assert error(gradient, expected) <= 1.3 * error(expected.to(dtype), expected)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"hidden": torch.zeros(7, D)}, ValueError, r"hidden has shape \(7, 16\); it must be \[B"),
        ({"ref_weight": torch.zeros(V, 3)}, ValueError, "ref_weight is given and ref_hidden is N"),
        ({"ref_hidden": torch.zeros(B, T, 3)}, ValueError, "ref_hidden is given and ref_weight is"),
        ({"ref_bias": torch.zeros(V)}, ValueError, "ref_bias is given and ref_hidden is None"),
        ({"kl_loss_coef": 0.1}, ValueError, "kl_loss_coef is 0.1 without a reference; pass ref_h"),
        ({"kl_estimator": "k9"}, ValueError, "kl_estimator is 'k9'; accepted"),
        ({"advantages": torch.zeros(2)}, ValueError, r"advantages has shape \(2,\)"),
        ({"token_ids": torch.full((B, T), V)}, ValueError, "token_ids holds 203 at an unmasked"),
        ({"memory_budget": 500}, ValueError, r"memory_budget is 500; accepted: from about 812 b"),
        ({"importance_sampling_level": "sequence"}, ValueError, "importance_sampling_level is"),
        ({"gradient_precision": "tf32"}, ValueError, "gradient_precision is 'tf32'; accepted"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'; accepted"),
    ],
)
def test_errors_name_argument_value_and_what_is_accepted(changed, kind, message):
    case = Case()
    given = {
        "hidden": case.hidden,
        "weight": case.weight,
        **dict(zip(("token_ids", "old_logprobs", "advantages", "mask"), case.of_tokens)),
    }
    given["mask"] = torch.ones_like(case.mask)
    with pytest.raises(kind, match=message):
        kl_kernels.linear_policy_loss(**(given | changed))
