"""Checkpointing, autocast and torch.compile, as docs/how-to/performance.md promises them."""

import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kl_kernels

B, T, V, D, K = 2, 5, 41, 8, 3


@pytest.fixture
def given():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    return {
        "hidden": normal(B, T, D).requires_grad_(),
        "weight": normal(V, D).requires_grad_(),
        "ref_logits": normal(B, T, V),
        "ids": torch.randint(V, (B, T), generator=g),
        "mask": torch.arange(T) < torch.tensor([[T], [2]]),
        "scores": normal(B),
        "old": normal(B, T),
        "advantages": normal(B, T),
        "returns": normal(B, T),
        "topk_ids": torch.rand((B, T, V), generator=g).topk(K).indices,
        "topk_logprobs": normal(B, T, V).log_softmax(-1)[..., :K],
    }


def policy_loss(logits, a, **how):
    loss, _ = kl_kernels.fused_policy_loss(
        logits,
        a["ids"],
        a["old"],
        a["advantages"],
        a["mask"],
        ref_logits=a["ref_logits"],
        kl_loss_coef=0.3,
        entropy_coef=0.1,
        **how,
    )
    return loss


# Functions from logits to a loss; the second kind can write their gradient over the logits.
OF_LOGITS = {
    "selective_log_softmax": lambda x, a: kl_kernels.selective_log_softmax(
        x, a["topk_ids"], 0.8, a["mask"]
    ).sum(),
    "topk_kl": lambda x, a: kl_kernels.topk_kl(
        x, a["topk_ids"], a["topk_logprobs"], mask=a["mask"]
    ).sum(),
}
IN_PLACE = {
    "token_stats": lambda x, a, **o: kl_kernels.token_stats(
        x, a["ids"], mask=a["mask"], **o
    ).entropy.sum(),
    "token_kl": lambda x, a, **o: kl_kernels.token_kl(
        x, a["ref_logits"], a["ids"], mask=a["mask"], **o
    ).kl.sum(),
    "token_jsd": lambda x, a, **o: kl_kernels.token_jsd(
        x, a["ref_logits"], mask=a["mask"], **o
    ).sum(),
    "kl_rewards": lambda x, a, **o: kl_kernels.kl_rewards(
        x, a["ref_logits"], a["ids"], a["scores"], a["mask"], kl_coef=0.1, **o
    ).kl.sum(),
    "fused_policy_loss": policy_loss,
}
ALL = OF_LOGITS | IN_PLACE


def gradients(loss, a):
    return torch.autograd.grad(loss, (a["hidden"], a["weight"]))


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_a_head_inside_of_a_checkpoint(name, use_reentrant, inplace_backward, given):
    """The logits are gone after forward, and gradients are those without a checkpoint."""
    kept = []

    def loss_of(hidden):
        logits = hidden @ given["weight"].T
        kept.append(weakref.ref(logits))
        return IN_PLACE[name](logits, given, inplace_backward=inplace_backward)

    expected = gradients(IN_PLACE[name](given["hidden"] @ given["weight"].T, given), given)
    loss = checkpoint(loss_of, given["hidden"], use_reentrant=use_reentrant)
    assert kept[0]() is None
    loss.backward()
    assert len(kept) == 2
    for got, right in zip((given["hidden"].grad, given["weight"].grad), expected):
        assert torch.equal(got, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_under_autocast_logits_are_narrow_and_results_are_not(name, dtype, given):
    how = {"loss_scale": 8.0} if name == "fused_policy_loss" else {}
    with torch.autocast("cpu", dtype):
        logits = torch.nn.functional.linear(given["hidden"], given["weight"])
        value = ALL[name](logits, given, **how)
    assert (logits.dtype, value.dtype) == (dtype, torch.float32)
    outside = logits.detach().requires_grad_()
    right = ALL[name](outside, given, **how)
    assert torch.equal(value, right)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, torch.autograd.grad(right, outside)[0])


def test_a_scaled_loss_has_the_gradient_times_the_scale(given):
    """Parts of 1e-8 would round to 0 in float16; the scaler divides by the scale again."""
    logits = (given["hidden"] @ given["weight"].T).detach()
    right = logits.half().float().requires_grad_()
    (policy_loss(right, given) * 1e-6).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    narrow = logits.half().requires_grad_()
    loss = policy_loss(narrow, given, loss_scale=scaler.get_scale() * 1e-6) * 1e-6
    scaler.scale(loss).backward()
    got = narrow.grad.float() / scaler.get_scale()
    torch.testing.assert_close(got, right.grad, rtol=2e-3, atol=1e-12)
    assert got.abs().max() > 0


def test_a_head_takes_factors_that_were_cast_as_autocast_would(given):
    hidden, weight = given["hidden"], given["weight"]
    stats = kl_kernels.linear_token_stats(
        hidden.bfloat16(), weight.bfloat16(), given["ids"], mask=given["mask"]
    )
    logits = hidden.bfloat16().double() @ weight.bfloat16().double().T
    right = logits.log_softmax(-1).gather(-1, given["ids"][..., None])[..., 0]
    torch.testing.assert_close(
        stats.logprob.double(), right.where(given["mask"], 0.0), rtol=1e-5, atol=1e-5
    )
    for gradient, of in zip(gradients(stats.logprob.sum(), given), (hidden, weight)):
        assert gradient.dtype == of.dtype


def clipped(logprobs, a):
    return kl_kernels.ppo_policy_loss(logprobs, a["old"], a["advantages"], a["mask"])[0]


# Functions from numbers per token to a loss.
OF_TOKENS = {
    "kl_penalty": lambda x, a: kl_kernels.kl_penalty(x, a["old"], "k3").sum(),
    "ppo_policy_loss": clipped,
    "ppo_value_loss": lambda x, a: kl_kernels.ppo_value_loss(x, a["old"], a["returns"], a["mask"])[
        0
    ],
    "compute_rewards": lambda x, a: (
        x * kl_kernels.compute_rewards(a["scores"], a["old"], a["mask"], 0.1)
    ).sum(),
    "compute_gae": lambda x, a: (
        x * kl_kernels.compute_gae(a["old"], a["returns"], a["mask"])[0]
    ).sum(),
    "compute_rewards of tokens' scores": lambda x, a: (
        x * kl_kernels.compute_rewards(a["returns"], a["old"], a["mask"], 0.1)
    ).sum(),
    "compute_gae of cut-off answers": lambda x, a: (
        x * kl_kernels.compute_gae(a["old"], a["old"], a["mask"], last_values=a["scores"])[0]
    ).sum(),
    "importance_weights": lambda x, a: (
        x * kl_kernels.importance_weights(a["old"], a["returns"], a["mask"])[0]
    ).sum(),
}


@pytest.mark.parametrize("name", [*ALL, *OF_TOKENS])
def test_it_is_part_of_one_graph(name, given):
    function = (ALL | OF_TOKENS)[name]
    x = given["ref_logits"] * 0.7 if name in ALL else given["returns"] * 0.7

    def loss(x, a):
        return 2.0 * function(torch.tanh(x), a)

    torch._dynamo.reset()
    one_graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for run in (loss, one_graph):
        leaf = x.clone().requires_grad_()
        value = run(leaf, given)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)


HEADS = {
    "linear_token_stats": lambda h, a: kl_kernels.linear_token_stats(h, a["weight"], a["ids"])[0],
    "linear_token_kl": lambda h, a: (
        kl_kernels.linear_token_kl(
            h, a["weight"], h.detach(), a["weight"].detach() * 2, a["ids"]
        ).kl
    ),
    "linear_token_jsd": lambda h, a: kl_kernels.linear_token_jsd(
        h, a["weight"], h.detach(), a["weight"].detach() * 2
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_graph_goes_through_a_head(name, given):
    def loss(hidden):
        return HEADS[name](torch.tanh(hidden), given).sum() * 2.0

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = [gradients(run(given["hidden"]), given) for run in (loss, compiled)]
    for eager, got in zip(*results):
        torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)
