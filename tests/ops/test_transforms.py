"""torch.func: gradients and loops over batches as torch.autograd gives them, or a clear refusal."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import kl_kernels

N, B, T, V = 3, 2, 4, 11


def kl_and_more(x, a):
    r = kl_kernels.token_kl(x, a["ref_logits"], a["ids"], mask=a["mask"], temperature=0.7)
    return r.kl + 0.3 * r.forward_kl - 0.1 * r.entropy + 0.2 * r.logprob


# Functions from logits to one number per token.
FUSED = {
    "token_stats": lambda x, a: sum(kl_kernels.token_stats(x, a["ids"], softcap=5.0)),
    "token_kl": kl_and_more,
    "token_kl without a KL": lambda x, a: kl_kernels.token_kl(x, a["ref_logits"], a["ids"]).logprob,
    "token_jsd": lambda x, a: kl_kernels.token_jsd(x, a["ref_logits"], beta=0.3),
    "kl_rewards": lambda x, a: (
        kl_kernels.kl_rewards(x, a["ref_logits"], a["ids"], a["scores"], a["mask"], kl_coef=0.1).kl
    ),
    "selective_log_softmax": lambda x, a: kl_kernels.selective_log_softmax(x, a["ids"]),
}
# Functions whose backward is more than one formula of one operator.
REFUSED = {
    "selective_log_softmax": lambda x, a: kl_kernels.selective_log_softmax(x, a["several"]),
    "topk_kl": lambda x, a: kl_kernels.topk_kl(x, a["several"], a["several_logprobs"]),
    "fused_policy_loss": lambda x, a: kl_kernels.fused_policy_loss(
        x, a["ids"], a["scores"][:, None].expand(B, T), torch.ones(B, T), a["mask"]
    )[0],
    "a function of linear heads": lambda x, a: (
        kl_kernels.linear_token_stats(x, torch.ones(5, V), torch.zeros_like(a["ids"])).logprob
    ),
}
BACKENDS = ["reference", "cpu"]


@pytest.fixture
def samples():
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    several = torch.rand((N, B, T, V), generator=g).topk(3).indices
    return normal(N, B, T, V), {
        "ref_logits": normal(N, B, T, V),
        "scores": normal(N, B),
        "ids": torch.randint(V, (N, B, T), generator=g),
        "mask": torch.rand((N, B, T), generator=g) < 0.8,
        "several": several,
        "several_logprobs": normal(N, B, T, V).log_softmax(-1).gather(-1, several),
    }


def sample(samples, i):
    logits, given = samples
    return logits[i], {name: value[i] for name, value in given.items()}


def backward(fused, x, a, upstream=None):
    x = x.clone().requires_grad_()
    y = fused(x, a)
    y.backward(torch.ones_like(y) if upstream is None else upstream)
    return x.grad


@pytest.mark.parametrize("name", FUSED)
def test_gradients_are_those_of_backward(name, samples):
    fused, (x, a) = FUSED[name], sample(samples, 0)
    upstream = torch.randn(B, T)
    assert torch.equal(grad(lambda x: fused(x, a).sum())(x), backward(fused, x, a))
    value, pull_back = vjp(lambda x: fused(x, a), x)
    assert torch.equal(value, fused(x, a))
    assert torch.equal(pull_back(upstream)[0], backward(fused, x, a, upstream))


@pytest.mark.parametrize("name", FUSED)
def test_gradients_per_sample(name, samples):
    fused = FUSED[name]
    together = vmap(grad(lambda x, a: fused(x, a).sum()))(*samples)
    alone = [backward(fused, *sample(samples, i)) for i in range(N)]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("name", FUSED)
def test_vmap_is_a_loop(name, samples):
    fused = FUSED[name]
    alone = [fused(*sample(samples, i)) for i in range(N)]
    assert torch.equal(vmap(fused)(*samples), torch.stack(alone))


def test_a_jacobian_has_the_gradient_of_each_token(samples):
    x, a = sample(samples, 0)
    jacobian = jacrev(lambda x: kl_and_more(x, a))(x)
    for b in range(B):
        for t in range(T):
            upstream = torch.zeros(B, T)
            upstream[b, t] = 1.0
            assert torch.equal(jacobian[b, t], backward(kl_and_more, x, a, upstream))


def test_parameters_of_a_module_have_gradients_per_sample(samples):
    """Gradients per sample of a model's parameters, with one loss for each sequence."""
    torch.manual_seed(0)
    model = torch.nn.Linear(V, V)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, hidden, ref_logits, ids):
        logits = functional_call(model, parameters, (hidden,))
        return kl_kernels.token_kl(logits, ref_logits, ids).kl.sum()

    hidden, a = samples
    per_sample = vmap(grad(loss), (None, 0, 0, 0))(parameters, hidden, a["ref_logits"], a["ids"])
    for i in range(N):
        model.zero_grad()
        kl_kernels.token_kl(model(hidden[i]), a["ref_logits"][i], a["ids"][i]).kl.sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(per_sample[name][i], p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_left_alone_where_backward_would_write_over_them(backend, samples):
    x, a = sample(samples, 0)
    before = x.clone()

    def total(x, inplace_backward):
        return kl_kernels.token_kl(
            x, a["ref_logits"], a["ids"], inplace_backward=inplace_backward, backend=backend
        ).kl.sum()

    assert torch.equal(grad(total)(x * 1, True), grad(total)(x, False))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", FUSED)
def test_second_derivatives_are_refused(name, samples):
    fused, (x, a) = FUSED[name], sample(samples, 0)
    slope = grad(lambda x: fused(x, a).sum())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad(lambda x: (slope(x) ** 2).sum())(x)


@pytest.mark.parametrize("name", FUSED)
def test_forward_mode_is_refused(name, samples):
    """A derivative of 0 would be an answer, and a wrong one."""
    fused, (x, a) = FUSED[name], sample(samples, 0)
    refusal = pytest.raises(
        NotImplementedError, match=r"^(logits|an argument) carries a tangent.*use backward"
    )
    with refusal:
        jvp(lambda x: fused(x, a), (x,), (x,))
    with refusal:
        hessian(lambda x: fused(x, a).sum())(x)
    with forward_ad.dual_level(), refusal:
        fused(forward_ad.make_dual(x, x), a)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("transform", [grad, vmap, jacrev])
def test_what_takes_no_transforms_says_so(name, transform, samples):
    fused, (x, a) = REFUSED[name], sample(samples, 0)
    taken = pytest.raises(
        NotImplementedError, match=rf"^{name}.* takes no transforms of torch.func.*token_kl"
    )
    with taken:
        transform(lambda x: fused(x, a).sum())(x if transform is not vmap else samples[0])


@pytest.mark.parametrize("name", REFUSED)
def test_forward_mode_is_refused_there_as_well(name, samples):
    fused, (x, a) = REFUSED[name], sample(samples, 0)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"jvp|tangent"):
        fused(forward_ad.make_dual(x, x), a)
