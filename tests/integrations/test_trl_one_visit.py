"""The output layer whose gradients are made in forward, by its formula in float64."""

import pytest
import torch

from kl_kernels.integrations import trl_one_visit
from kl_kernels.integrations.trl_one_visit import Foreseen, expecting, one_visit, take_foreseen

N, D, V = 12, 6, 29
OPTIONS = {
    "temperature": 0.7,
    "softcap": 4.0,
    "logit_scale": 1.3,
    "backend": None,
    "memory_budget": None,
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


IDS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0))
COUNTS = torch.arange(N) % 4 != 1
FORESEEN = torch.where(COUNTS, normal(N), 0.0)


def exact(hidden, weight, bias):
    logits = OPTIONS["logit_scale"] * (hidden @ weight.T + bias)
    logits = OPTIONS["softcap"] * (logits / OPTIONS["softcap"]).tanh() / OPTIONS["temperature"]
    logp = logits.log_softmax(-1)
    return logp.gather(-1, IDS[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def leaves(dtype=torch.float32):
    made = normal(N, D).to(dtype), normal(V, D).to(dtype), normal(V).to(dtype)
    return [leaf.requires_grad_() for leaf in made]


def check(upstream, counts=COUNTS, **options):
    """Values, and gradients for the upstream ones, of the rows that count."""
    ours, right = leaves(), [t.detach().double().requires_grad_() for t in leaves()]
    given = OPTIONS | options
    found = one_visit(*ours[:2], ours[2], IDS, FORESEEN, counts, **given)
    expected = exact(*right)
    rows = torch.ones(N, dtype=torch.bool) if counts is None else counts
    for one, other in zip(found, expected):
        torch.testing.assert_close(
            one.double(), torch.where(rows, other, 0.0), rtol=1e-5, atol=1e-6
        )
    gradients = torch.autograd.grad(upstream(*found), ours)
    for one, other in zip(gradients, torch.autograd.grad(upstream(*expected), right)):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def foreseen_loss(logprob, entropy):
    return (logprob * FORESEEN.to(logprob.dtype)).sum()


@pytest.fixture
def again(monkeypatch):
    """Count the losses whose gradients are computed a second time."""
    calls = []
    real = trl_one_visit._again
    monkeypatch.setattr(trl_one_visit, "_again", lambda *args: calls.append(1) or real(*args))
    return calls


@pytest.mark.parametrize("counts", [COUNTS, None], ids=["some rows", "all"])
@pytest.mark.parametrize("memory_budget", [None, 1500])  # bytes: blocks of a few rows
def test_the_gradient_that_was_foreseen(counts, memory_budget, again):
    check(foreseen_loss, counts, memory_budget=memory_budget)
    assert not again


def test_a_multiple_of_it(again):
    check(lambda *stats: -2.5 * foreseen_loss(*stats))
    assert not again


@pytest.mark.parametrize(
    "loss",
    [
        lambda logprob, entropy: (logprob * COUNTS).sum(),
        lambda logprob, entropy: (entropy * COUNTS).sum(),
        lambda logprob, entropy: foreseen_loss(logprob, entropy) + (entropy * COUNTS).sum(),
        lambda logprob, entropy: foreseen_loss(logprob, entropy) + logprob[0] * 1e-3,
    ],
    ids=["another", "of the entropy", "of both", "off at one token"],
)
def test_another_gradient_is_computed_again(loss, again):
    check(loss)
    assert again == [1]


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("factor", [1.0, torch.linspace(1, 2, N)], ids=["foreseen", "another"])
def test_what_is_frozen_has_no_gradient(frozen, factor):
    ours = dict(zip(("hidden", "weight", "bias"), leaves()))
    ours[frozen].requires_grad_(False)
    logprob, _ = one_visit(**ours, token_ids=IDS, gradient=FORESEEN, counts=COUNTS, **OPTIONS)
    (logprob * FORESEEN * factor).sum().backward()
    assert [name for name, leaf in ours.items() if leaf.grad is None] == [frozen]


@pytest.mark.parametrize("upstream", [0.0, 1.0])
def test_advantages_that_are_all_0(upstream):
    """As where all answers to a prompt have one reward; and a loss that is 0 all the same."""
    hidden, weight, bias = leaves()
    logprob, _ = one_visit(hidden, weight, bias, IDS, FORESEEN * 0, COUNTS, **OPTIONS)
    (logprob * upstream * COUNTS).sum().backward()
    assert bool(hidden.grad.any()) == bool(upstream)


def test_no_rows():
    hidden, weight, bias = leaves()
    none = slice(0, 0)
    logprob, entropy = one_visit(
        hidden[none], weight, bias, IDS[none], FORESEEN[none], None, **OPTIONS
    )
    assert logprob.shape == entropy.shape == (0,)
    logprob.sum().backward()
    assert not weight.grad.any()


def test_tokens_that_are_sure_and_tokens_that_are_ruled_out():
    weight = torch.eye(3)
    hidden = torch.tensor([[40.0, 0.0, 0.0], [0.0, 40.0, 0.0], [3.0, 3.0, -90.0]])
    options = OPTIONS | {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}
    ids = torch.tensor([0, 0, 2])
    logprob, _ = one_visit(
        hidden.requires_grad_(), weight, None, ids, torch.ones(3), None, **options
    )
    right = hidden.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), right, rtol=1e-6, atol=1e-7)


def test_a_second_backward_is_refused():
    hidden, weight, bias = leaves()
    logprob, _ = one_visit(hidden, weight, bias, IDS, FORESEEN, COUNTS, **OPTIONS)
    foreseen_loss(logprob, None).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        foreseen_loss(logprob, None).backward()


def in_context(counts=((True,) * 3,) * 2, **given):
    """Rows as a head is given them, by their number."""
    batch = Foreseen(torch.arange(6.0).view(2, 3), torch.tensor(counts), 2)
    hidden = torch.zeros(given.get("n", 6), 1, requires_grad=given.get("needs", True))
    with expecting(batch):
        first = take_foreseen(hidden, torch.zeros(4, 1), given.get("dtype", torch.float32))
        second = take_foreseen(hidden, torch.zeros(4, 1), torch.float32)
    assert take_foreseen(hidden, torch.zeros(4, 1), torch.float32) is None
    return first, second


def test_it_is_told_once_and_inside_alone():
    first, second = in_context()
    assert first[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert first[1] is None
    assert second is None


def test_rows_of_all_positions():
    """The prompt's second token is the first that is scored, and each answer follows its prompt."""
    (gradient, counts), _ = in_context(n=2 * (2 + 3 - 1))
    assert gradient.view(2, 4).tolist() == [[0, 0, 1, 2], [0, 3, 4, 5]]
    assert counts.view(2, 4).tolist() == [[False, True, True, True]] * 2


def test_rows_that_count():
    counts = [[True, True, False], [True, False, False]]
    assert in_context(counts, n=3)[0][0].tolist() == [0, 1, 3]


@pytest.mark.parametrize("given", [{"n": 5}, {"needs": False}, {"dtype": torch.float16}], ids=str)
def test_rows_that_are_not_known(given):
    assert in_context(**given)[0] is None
