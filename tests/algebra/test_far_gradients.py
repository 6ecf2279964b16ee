"""Values and gradients on the CPU, of logits far from 0 and of tiny temperatures, beside float64.

Distances are of logits over the temperature. float32 logits are 1 apart at 1.6e7, float32 anchors
128 apart at 1.5e9: what is measured from those needs float64.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kl_kernels
from kl_kernels.lab.validate import errors
from kl_kernels.lab.validate.errors import gradient_error, value_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISTANCES = (1e4, 3e6, 1.1e7, 1e8, 1.2e9)
TEMPERATURES = (1.0, 1e-3, 1e-6)
BEYOND = (3e9, 1e12, 1e30)  # where float32 anchors say nothing
BETA = 0.3
# Far logits take few values: what one exponential is off by, the sum of a thousand equal ones is.
VALUE_BUDGET, GRADIENT_BUDGET = 1.5 * errors.VALUE_BUDGET, 1.5 * errors.GRADIENT_BUDGET
LOWEST = torch.finfo(torch.float32).min


def rows(kind, distance, v, g, n=6):
    """Both models' logits [n, v] at a temperature of 1, float64."""

    def noise():
        return torch.randn(n, v, generator=g, dtype=torch.float64)

    def scattered():
        return distance * (1 + 0.02 * noise()).clamp_max(1.04)

    if kind == "scattered":
        return scattered(), scattered()
    if kind == "close":
        return distance + 3 * noise(), distance + 3 * noise()
    if kind == "equal":
        x = distance + 3 * noise()
        return x, x.clone()
    if kind == "opposite":
        return distance + 3 * noise(), 3 * noise() - distance
    if kind == "policy far":
        return scattered(), 3 * noise()
    if kind == "reference far":
        return 3 * noise(), -scattered()
    if kind == "two tokens":  # all others are far below
        x, y = (torch.full((n, v), -distance, dtype=torch.float64) for _ in range(2))
        x[:, 0], y[:, 0] = 0, 0
        x[:, -1], y[:, -1] = 0.5 * noise()[:, 0], 0.5 * noise()[:, 0]
        return x, y
    assert kind == "apart"  # each model's likely tokens are far below for the other
    x, y = 3 * noise(), 3 * noise()
    x[:, : v // 2] -= distance
    y[:, v // 2 :] -= distance
    return x, y


KINDS = (
    "scattered",
    "close",
    "equal",
    "opposite",
    "policy far",
    "reference far",
    "two tokens",
    "apart",
)


def truth(x, y, ids, temperature):
    """Outputs [n] and the gradient [n, V] of each one's sum, times the temperature; float64."""
    z = (x.double() / temperature).requires_grad_()
    log_p, log_q = z.log_softmax(-1), (y.double() / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p + math.log(1 - BETA), log_q + math.log(BETA))
    outputs = {
        "logprob": log_p.gather(-1, ids[:, None])[:, 0],
        "kl": (p * (log_p - log_q)).sum(-1),
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "entropy": -(p * log_p).sum(-1),
        "jsd": (BETA * q * (log_q - log_m) + (1 - BETA) * p * (log_p - log_m)).sum(-1),
    }
    gradients = {
        name: torch.autograd.grad(value.sum(), z, retain_graph=True)[0]
        for name, value in outputs.items()
    }
    return {name: value.detach() for name, value in outputs.items()}, gradients


def found(x, y, ids, temperature):
    """Yield (name, of, value, grad) of the cpu backend, by every function that takes logits."""
    options = {"temperature": temperature, "backend": "cpu"}
    leaf = x.clone().requires_grad_()

    def with_gradient(name, of, value, sign=1):
        # By the temperature, lest a gradient overflows its dtype.
        weight = torch.full_like(value, sign * temperature)
        (grad,) = torch.autograd.grad(value, leaf, weight, retain_graph=True)
        return name, of, value.detach(), grad

    both = kl_kernels.token_kl(leaf, y, ids, **options)
    alone = kl_kernels.token_stats(leaf, ids, **options)
    one = torch.ones(1, len(ids))
    shaped = kl_kernels.kl_rewards(
        leaf[None], y[None], ids[None], torch.zeros(1), one, kl_coef=0.5, **options
    )
    for name in ("logprob", "kl", "forward_kl", "entropy"):
        yield with_gradient(f"token_kl {name}", name, getattr(both, name))
    for name in ("logprob", "entropy"):
        yield with_gradient(f"token_stats {name}", name, getattr(alone, name))
    for beta, name in ((0.0, "forward_kl"), (BETA, "jsd"), (1.0, "kl")):
        jsd = kl_kernels.token_jsd(leaf, y, beta=beta, **options)
        yield with_gradient(f"token_jsd {beta}", name, jsd)
    yield with_gradient("kl_rewards", "kl", shaped.kl[0])
    for name, of_reference in (("kl", {"ref_logits": y[None]}), ("entropy", {})):
        coefs = {"kl_loss_coef": temperature} if of_reference else {"entropy_coef": temperature}
        loss, metrics = kl_kernels.fused_policy_loss(
            leaf[None],
            ids[None],
            None,
            0 * one,
            one,
            **of_reference,
            **coefs,
            aggregation="seq-mean-token-sum",
            loss_scale=1.0,
            **options,
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        yield f"fused_policy_loss {name}", name, None, grad if of_reference else -grad


def assert_true(x, y, ids, temperature):
    values, gradients = truth(x, y, ids, temperature)
    for name, of, value, grad in found(x, y, ids, temperature):
        if value is not None:
            quantity = "kl" if of == "jsd" else of  # the scale of a divergence
            assert value_error(quantity, value, values[of]) <= VALUE_BUDGET, name
        # The gradient of a KL has terms as large as that.
        terms = values["kl"] if of == "kl" else torch.zeros(len(ids))
        true = gradients[of]
        overflows = true.abs() > torch.finfo(grad.dtype).max
        true = torch.where(overflows, torch.inf * true.sign(), true)
        error = gradient_error(grad, true, terms.double().clamp_min(1))
        assert error <= GRADIENT_BUDGET, name


def rows_in(dtype, kind, distance, temperature, v, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = ((t * temperature).to(dtype) for t in rows(kind, distance, v, g))
    return x, y, torch.randint(v, (len(x),), generator=g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_far_logits_have_true_values_and_gradients(kind, dtype, temperature):
    for distance in DISTANCES:
        if 1.05 * distance * temperature > torch.finfo(dtype).max:
            continue
        for v in (33, 2049):
            x, y, ids = rows_in(dtype, kind, distance, temperature, v, seed=v)
            assert_true(x, y, ids, temperature)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    exponent=st.floats(0, 9),
    temperature=st.sampled_from((1.0, 0.3, 1e-2, 1e-4, 1e-6)),
    v=st.sampled_from((1, 2, 16, 31, 65)),
    seed=st.integers(0, 2**31),
)
def test_any_distance_within_reach_has_true_values_and_gradients(
    kind, dtype, exponent, temperature, v, seed
):
    distance = min(10**exponent, torch.finfo(dtype).max / temperature / 1.05)
    x, y, ids = rows_in(dtype, kind, distance, temperature, v, seed)
    assert_true(x, y, ids, temperature)


@pytest.mark.parametrize("temperature", [1e-3, 1e-4, 1e-5, 1e-6])
def test_a_tiny_temperature_has_true_gradients(temperature):
    """Ordinary logits of a policy near its reference, decoded almost greedily."""
    torch.manual_seed(0)
    x = 20 * torch.randn(500, 10)
    y = x + 0.3 * torch.randn(500, 10)
    assert_true(x, y, torch.randint(10, (500,)), temperature)


def test_softcapped_logits_at_a_tiny_temperature_have_true_gradients():
    """0 and +-30 are what a softcap of 30 makes of 0 and of large logits, without rounding."""
    capped_x, capped_y = torch.full((2, 2, 33), -30.0)
    capped_x[:, :4], capped_y[:, 2:8] = 0, 0
    ids = torch.tensor([0, 3])
    values, gradients = truth(capped_x, capped_y, ids, 1e-6)
    leaf = (1e6 * capped_x).requires_grad_()
    options = {"temperature": 1e-6, "softcap": 30.0, "ref_softcap": 30.0, "backend": "cpu"}
    both = kl_kernels.token_kl(leaf, 1e6 * capped_y, ids, **options)._asdict()
    both["jsd"] = kl_kernels.token_jsd(leaf, 1e6 * capped_y, beta=BETA, **options)
    for name, expected in values.items():
        quantity = "kl" if name == "jsd" else name
        assert value_error(quantity, both[name].detach(), expected) <= VALUE_BUDGET, name
        weight = torch.full((2,), 1e-6)
        (grad,) = torch.autograd.grad(both[name], leaf, weight, retain_graph=True)
        true = torch.where(capped_x == 0, gradients[name], 0.0)  # a capped logit has no slope
        terms = values["kl"] if name == "kl" else torch.ones(2, dtype=torch.float64)
        assert gradient_error(grad, true, terms) <= GRADIENT_BUDGET, name


def test_a_small_kl_of_far_logits_keeps_its_digits():
    """Both prefer one token, by some 20 nats of which the models differ by one."""
    x, y = torch.full((2, 1, 33), 2.0**23)
    x[:, 1:] -= 20
    y[:, 1:] -= 21
    ids = torch.zeros(1, dtype=torch.long)
    values, gradients = truth(x, y, ids, 1.0)
    leaf = x.clone().requires_grad_()
    found = kl_kernels.token_kl(leaf, y, ids, backend="cpu")
    torch.testing.assert_close(found.kl.double(), values["kl"], rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(found.kl.sum(), leaf)
    torch.testing.assert_close(grad.double(), gradients["kl"], rtol=1e-5, atol=1e-20)


@pytest.mark.parametrize("distance", BEYOND)
@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_reach_of_float32_anchors_a_policys_gradients_are_true(distance, sign):
    g = torch.Generator().manual_seed(0)
    unit = math.ulp(distance) * 2**29
    x = (sign * (distance - unit * torch.randint(3, (6, 33), generator=g).double())).float()
    ids = torch.randint(33, (6,), generator=g)
    values, gradients = truth(x, x, ids, 1.0)
    leaf = x.clone().requires_grad_()
    stats = kl_kernels.token_stats(leaf, ids, backend="cpu")
    for name, value in stats._asdict().items():
        assert value_error(name, value.detach(), values[name]) <= VALUE_BUDGET
        (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
        assert gradient_error(grad, gradients[name], torch.ones(6)) <= GRADIENT_BUDGET


def test_a_row_of_nothing_but_lowest_numbers_is_flat():
    x = torch.full((1, 8), LOWEST, requires_grad=True)
    ids = torch.zeros(1, dtype=torch.long)
    kl = kl_kernels.token_kl(x, x.detach(), ids, backend="cpu")
    (grad,) = torch.autograd.grad((kl.logprob + kl.kl + kl.forward_kl + kl.entropy).sum(), x)
    expected = -torch.full((1, 8), 1 / 8)
    expected[0, 0] += 1
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


def assert_true_of_float32_states(backend, kind, distance):
    """Check a backend that measures from float32 anchors, and rounds with half their spacing."""
    x, y, ids = rows_in(torch.float32, kind, distance, 1.0, 33, seed=3)
    x, y, ids = x[:2], y[:2], ids[:2]
    values, gradients = truth(x, y, ids, 1.0)
    leaf = x.clone().requires_grad_()
    both = kl_kernels.token_kl(leaf, y, ids, backend=backend)._asdict()
    both["jsd"] = kl_kernels.token_jsd(leaf, y, beta=BETA, backend=backend)
    for name, expected in values.items():
        quantity = "kl" if name == "jsd" else name
        assert value_error(quantity, both[name].detach(), expected) <= VALUE_BUDGET, name
        (grad,) = torch.autograd.grad(both[name].sum(), leaf, retain_graph=True)
        terms = values["kl"] if name == "kl" else torch.zeros(2, dtype=torch.float64)
        terms = terms.clamp_min(max(1.0, half_a_unit(distance)))
        assert gradient_error(grad, gradients[name], terms) <= GRADIENT_BUDGET, name


def half_a_unit(distance):
    """As far from a float32 anchor may the largest logit lie, in log2 units."""
    return 2.0 ** math.ceil(math.log2(distance * math.log2(math.e)) - 24)


@pytest.mark.parametrize("distance", [3e6, 1.2e9])
@pytest.mark.parametrize("kind", ["scattered", "close", "opposite", "two tokens"])
def test_triton_kernels_have_true_gradients_of_far_logits(kind, distance):
    assert_true_of_float32_states("triton", kind, distance)


@pytest.mark.parametrize("distance", [3e6, 1.1e7, 1e8, 1.2e9])
@pytest.mark.parametrize("kind", ["scattered", "close", "equal", "policy far", "two tokens"])
def test_a_head_in_tiles_has_true_gradients_of_far_logits(kind, distance):
    """Its states are floats: sums measured from half a unit of the anchor are rounded with that."""
    x, y, ids = rows_in(torch.float32, kind, distance, 1.0, 33, seed=1)
    values, gradients = truth(x, y, ids, 1.0)
    weight = torch.eye(33)
    hidden = x.clone().requires_grad_()
    for tile in (4096, 1 << 30):
        out = kl_kernels.linear_token_kl(
            hidden, weight, y, weight, ids, backend="cpu", memory_budget=tile
        )
        jsd = kl_kernels.linear_token_jsd(
            hidden, weight, y, weight, beta=BETA, backend="cpu", memory_budget=tile
        )
        for name, value in (*out._asdict().items(), ("jsd", jsd)):
            if name == "ref_logprob":
                continue
            (grad,) = torch.autograd.grad(value.sum(), hidden, retain_graph=True)
            terms = values["kl"] if name == "kl" else torch.zeros(len(ids)).double()
            terms = terms.clamp_min(max(1.0, half_a_unit(distance)))
            assert gradient_error(grad, gradients[name], terms) <= GRADIENT_BUDGET, name
