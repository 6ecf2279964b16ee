"""fused_policy_loss against its definition: log_softmax and autograd in float64."""

import itertools

import pytest
import torch

import kl_kernels
from kl_kernels.lab.validate.errors import half_ulp
from kl_kernels.rl.losses import AGGREGATIONS, aggregate

BACKENDS = ("reference", "cpu", "triton")
B, T, V = 3, 10, 45
TEMPERATURE, REF_TEMPERATURE, SOFTCAP = 0.7, 1.2, 9.0


class Batch:
    """A batch in which every clip decides somewhere; what is masked is NaN."""

    def __init__(self, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.logits = (3 * torch.randn(B, T, V, generator=g)).to(dtype)
        self.ref_logits = (self.logits + torch.randn(B, T, V, generator=g)).to(dtype)
        self.token_ids = torch.randint(V, (B, T), generator=g)
        self.mask = torch.rand(B, T, generator=g) < 0.7
        self.mask[2] = False  # an empty response
        self.advantages = torch.randn(B, T, generator=g)
        self.weights = torch.rand(B, T, generator=g) + 0.5
        logprob, _, _ = self.statistics(self.logits.double())
        self.old_logprobs = (logprob + 0.8 * torch.randn(B, T, generator=g)).float()
        for tensor in (self.logits, self.ref_logits, self.advantages, self.weights):
            tensor[~self.mask] = torch.nan
        self.old_logprobs[~self.mask] = torch.nan

    def statistics(self, x):
        """Log-probability, exact KL and entropy, float64."""
        y = self.ref_logits.double()
        log_p = torch.log_softmax(SOFTCAP * torch.tanh(x / SOFTCAP) / TEMPERATURE, -1)
        log_q = torch.log_softmax(y / REF_TEMPERATURE, -1)
        self.ref_logprob = log_q.gather(-1, self.token_ids[..., None]).squeeze(-1)
        p = log_p.exp()
        logprob = log_p.gather(-1, self.token_ids[..., None]).squeeze(-1)
        return logprob, (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)

    def true(self, *, kl_loss_coef, kl_estimator, entropy_coef, aggregation, denominator, **clips):
        """Loss, metrics and gradient by autograd, as the losses' documentation composes them."""
        x = torch.where(self.mask[..., None], self.logits, 0.0).double().requires_grad_()
        self.ref_logits = torch.where(self.mask[..., None], self.ref_logits, 0.0)
        logprob, kl, entropy = self.statistics(x)
        if kl_estimator != "exact":
            kl = kl_kernels.kl_penalty(
                logprob, self.ref_logprob, kl_estimator, log_ratio_clamp=clips["log_ratio_clamp"]
            )
        loss, metrics = kl_kernels.ppo_policy_loss(
            logprob,
            self.old_logprobs,
            self.advantages,
            self.mask,
            weights=self.weights,
            aggregation=aggregation,
            denominator=denominator,
            **clips,
        )
        for coefficient, value in ((kl_loss_coef, kl), (-entropy_coef, entropy)):
            loss = loss + coefficient * aggregate(value, self.mask, aggregation, denominator)
        metrics["kl"] = kl_kernels.masked_mean(kl, self.mask)
        metrics["entropy"] = kl_kernels.masked_mean(entropy, self.mask)
        return loss, metrics, torch.autograd.grad(loss, x)[0]

    def fused(self, backend, logits=None, **options):
        return kl_kernels.fused_policy_loss(
            self.logits if logits is None else logits,
            self.token_ids,
            self.old_logprobs,
            self.advantages,
            self.mask,
            ref_logits=self.ref_logits,
            weights=self.weights,
            temperature=TEMPERATURE,
            ref_temperature=REF_TEMPERATURE,
            softcap=SOFTCAP,
            backend=backend,
            **options,
        )


OPTIONS = [
    {
        "aggregation": aggregation,
        "denominator": denominator,
        "kl_estimator": estimator,
        "kl_loss_coef": kl_loss_coef,
        "entropy_coef": entropy_coef,
        "clip_low": 0.1,
        "clip_high": 0.3,
        "dual_clip": dual_clip,
        "log_ratio_clamp": clamp,
    }
    for aggregation, (estimator, kl_loss_coef, entropy_coef, denominator, dual_clip, clamp) in zip(
        itertools.cycle(AGGREGATIONS),
        itertools.product(
            ("exact", "k2", "k3"), (0.0, 0.4), (0.0, 0.2), (None, 5.0), (None, 1.2), (None, 0.5)
        ),
    )
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_metrics_and_gradient_are_those_of_the_definition(backend):
    # The interpreter takes its time.
    for options in OPTIONS[:: 5 if backend == "triton" else 1]:
        expected, expected_metrics, expected_grad = Batch().true(**options)
        batch = Batch()
        logits = batch.logits.clone().requires_grad_()
        loss, metrics = batch.fused(backend, logits, **options)
        (grad,) = torch.autograd.grad(loss, logits)
        message = f"{options}"
        assert loss.dtype == torch.float32, message
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6, msg=message)
        assert metrics.keys() == expected_metrics.keys(), message
        for name, value in metrics.items():
            torch.testing.assert_close(
                value.double(),
                expected_metrics[name],
                rtol=5e-6,
                atol=2e-6,
                msg=f"{name} {message}",
            )
        error = torch.linalg.vector_norm(grad.double() - expected_grad, dim=-1)
        size = torch.linalg.vector_norm(expected_grad, dim=-1)
        assert (error <= 1e-5 * size).all(), message
        assert not grad[~batch.mask].any(), message


def test_the_batch_holds_every_case():
    """Each clip and the clamp decide for some tokens, not for all, in the test above."""
    _, metrics, _ = Batch().true(**OPTIONS[0] | {"dual_clip": 1.2})
    assert 0 < metrics["clip_fraction"] < 1
    assert 0 < metrics["clip_fraction_dual"] < 1
    batch = Batch()
    logprob, _, _ = batch.statistics(batch.logits.double())
    log_ratio = (logprob - batch.old_logprobs)[batch.mask]
    assert 0 < (log_ratio.abs() > 0.5).double().mean() < 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "loss_scale"), [(torch.bfloat16, None), (torch.float16, 1024.0), (torch.float32, 3.0)]
)
def test_gradients_are_rounded_once(backend, dtype, loss_scale):
    options = OPTIONS[-1] | {"denominator": None}
    _, _, expected = Batch(dtype).true(**options)
    batch = Batch(dtype)
    logits = batch.logits.clone().requires_grad_()
    loss, _ = batch.fused(backend, logits, loss_scale=loss_scale, **options)
    scale = loss_scale or 1.0
    (grad,) = torch.autograd.grad(loss * scale, logits)
    assert grad.dtype == dtype
    expected = expected * scale
    size = torch.linalg.vector_norm(expected, dim=-1, keepdim=True)
    assert ((grad.double() - expected).abs() <= half_ulp(expected, dtype) + 1e-5 * size).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_survive_by_the_loss_scale(backend):
    batch = Batch(torch.float16)
    options = {"aggregation": "token-mean", "denominator": 1e8}
    with pytest.raises(ValueError, match="loss_scale is None and logits are float16"):
        batch.fused(backend, batch.logits.clone().requires_grad_(), **options)
    batch.fused(backend, **options)  # without a gradient nothing underflows
    logits = batch.logits.clone().requires_grad_()
    scale = torch.tensor(2.0**16)
    loss, _ = batch.fused(backend, logits, loss_scale=scale, **options)
    (grad,) = torch.autograd.grad(loss * scale, logits)
    rows = (grad != 0).any(-1)
    expected = Batch().logits.float().requires_grad_()
    full, _ = Batch().fused(backend, expected, aggregation="token-mean", denominator=1.0)
    assert torch.equal(rows, (torch.autograd.grad(full, expected)[0] != 0).any(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_old_logprobs_every_ratio_is_one(backend):
    batch = Batch()
    stats = kl_kernels.token_stats(
        batch.logits,
        batch.token_ids,
        mask=batch.mask,
        temperature=TEMPERATURE,
        softcap=SOFTCAP,
        backend=backend,
    )
    results = []
    for old in (None, stats.logprob):
        batch.old_logprobs = old
        logits = batch.logits.clone().requires_grad_()
        loss, metrics = batch.fused(backend, logits)
        results.append((loss, metrics["ratio_max"], *torch.autograd.grad(loss, logits)))
    assert results[0][1] == 1.0
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_logprobs_take_the_place_of_reference_logits(backend):
    for estimator in ("k2", "k3"):
        options = {"kl_loss_coef": 0.3, "kl_estimator": estimator, "temperature": 0.8}
        results = []
        for from_logits in (True, False):
            batch = Batch()
            ref_logprobs = kl_kernels.token_stats(
                batch.ref_logits,
                batch.token_ids,
                mask=batch.mask,
                temperature=0.8,
                backend=backend,
            ).logprob
            reference = (
                {"ref_logits": batch.ref_logits} if from_logits else {"ref_logprobs": ref_logprobs}
            )
            logits = batch.logits.clone().requires_grad_()
            loss, metrics = kl_kernels.fused_policy_loss(
                logits,
                batch.token_ids,
                batch.old_logprobs,
                batch.advantages,
                batch.mask,
                backend=backend,
                **reference,
                **options,
            )
            results.append((loss, metrics["kl"], *torch.autograd.grad(loss, logits)))
        for got, expected in zip(*results):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_to_the_whole(backend):
    batch = Batch()
    n_tokens = batch.mask.sum()
    whole, _ = batch.fused(backend, kl_loss_coef=0.2)
    parts = []
    for i in range(B):
        part = Batch()
        for name, value in vars(batch).items():
            setattr(part, name, value[i : i + 1])
        parts.append(part.fused(backend, kl_loss_coef=0.2, denominator=n_tokens)[0])
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_upstream_gradient_scales(backend):
    def grad(upstream):
        batch = Batch()
        logits = batch.logits.clone().requires_grad_()
        loss, _ = batch.fused(backend, logits, kl_loss_coef=0.2)
        return torch.autograd.grad(loss, logits, torch.tensor(upstream))[0]

    assert torch.equal(grad(4.0), 4.0 * grad(1.0))
    torch.testing.assert_close(grad(-0.3), -0.3 * grad(1.0))
    assert grad(float("nan"))[Batch().mask].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_is_refused(backend):
    batch = Batch()
    loss, _ = batch.fused(backend, batch.logits.clone().requires_grad_())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_carry_no_gradient_and_no_mode_computes_none(backend):
    batch = Batch()
    logits = batch.logits.clone().requires_grad_()
    loss, metrics = batch.fused(backend, logits)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())
    with torch.no_grad():
        again, _ = batch.fused(backend, logits)
    assert not again.requires_grad
    assert torch.equal(again, loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_row_spoils_its_own_gradient_alone(backend):
    batch = Batch()
    batch.logits[0, batch.mask[0].nonzero()[0], 3] = torch.nan
    logits = batch.logits.clone().requires_grad_()
    loss, _ = batch.fused(backend, logits, entropy_coef=0.1)
    assert loss.isnan()
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isnan().all(-1).sum() == 1
    assert grad.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_kl_nobody_asks_for_changes_nothing(backend):
    batch = Batch()
    row = batch.mask[0].nonzero()[0]
    batch.ref_logits[0, row, 5] = -torch.inf
    logits = batch.logits.clone().requires_grad_()
    loss, metrics = batch.fused(backend, logits)
    (grad,) = torch.autograd.grad(loss, logits)
    assert metrics["kl"] == torch.inf
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_small_and_empty_batches(backend, shape):
    logits = torch.zeros(*shape, 1, requires_grad=True)
    zeros = torch.zeros(shape)
    loss, metrics = kl_kernels.fused_policy_loss(
        logits, zeros.long(), zeros, zeros + 2.0, torch.ones(shape), backend=backend
    )
    loss.backward()
    assert loss.item() == (-2.0 if zeros.numel() else 0.0)
    assert metrics["ratio_max"].item() == (1.0 if zeros.numel() else 0.0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_float64_is_kept():
    for options in OPTIONS[::7]:
        expected, _, expected_grad = Batch(torch.float64).true(**options)
        batch = Batch(torch.float64)
        logits = batch.logits.clone().requires_grad_()
        loss, metrics = batch.fused("reference", logits, **options)
        assert {value.dtype for value in (loss, *metrics.values())} == {torch.float64}
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-13)


BAD = [
    ({"importance_sampling_level": "sequence"}, r"'sequence'.*GSPO.*accepted: 'token'"),
    ({"importance_sampling_level": "word"}, r"importance_sampling_level is 'word'; accepted"),
    ({"kl_estimator": "k1", "kl_loss_coef": 0.1}, r"kl_estimator is 'k1'; accepted: 'exact', 'k2'"),
    ({"kl_loss_coef": -0.1}, r"kl_loss_coef is -0.1; .* 0 or above"),
    ({"kl_loss_coef": 0.1, "ref_logits": None}, r"kl_loss_coef is 0.1 without a reference"),
    ({"ref_logprobs": torch.zeros(B, T)}, r"ref_logits and ref_logprobs are both given"),
    ({"ref_logits": None, "ref_logprobs": torch.zeros(B, T)}, r"kl_estimator is 'exact' and ref_l"),
    ({"entropy_coef": float("inf")}, r"entropy_coef is inf"),
    ({"clip_low": -0.1}, r"clip_low is -0.1"),
    ({"dual_clip": 1.0}, r"dual_clip is 1.0; it must be above 1"),
    ({"log_ratio_clamp": 0.0}, r"log_ratio_clamp is 0.0"),
    ({"loss_scale": 0.0}, r"loss_scale is 0.0"),
    ({"loss_scale": torch.ones(2)}, r"loss_scale has shape \(2,\); it must be 0-dim"),
    ({"aggregation": "mean"}, r"aggregation is 'mean'; accepted: 'token-mean'"),
    ({"denominator": 0}, r"denominator is 0"),
    ({"weights": torch.ones(B)}, r"weights has shape \(3,\)"),
    ({"old_logprobs": torch.ones(B)}, r"old_logprobs has shape \(3,\)"),
    ({"advantages": torch.ones(B)}, r"advantages has shape \(3,\)"),
    ({"mask": torch.ones(B)}, r"mask has shape \(3,\)"),
    ({"logits": torch.zeros(B, V)}, r"logits has shape \(3, 45\); it must be \[B, T, V\]"),
    ({"ref_temperature": 0.0}, r"ref_temperature is 0.0"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[next(iter(c)) for c, _ in BAD])
def test_a_bad_argument_is_named(change, message):
    batch = Batch()
    arguments = {
        "logits": batch.logits,
        "token_ids": batch.token_ids,
        "old_logprobs": batch.old_logprobs,
        "advantages": batch.advantages,
        "mask": batch.mask,
        "ref_logits": batch.ref_logits,
    }
    with pytest.raises(ValueError, match=message):
        kl_kernels.fused_policy_loss(**arguments | change)
