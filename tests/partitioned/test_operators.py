"""Linear heads as torch operators: what torch.compile makes of them."""

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import kl_kernels
from kl_kernels.partitioned import loss_operator  # noqa: F401  (registers the last of them)
from kl_kernels.partitioned.heads import HeadOptions
from kl_kernels.partitioned.operators import IMPLEMENTATIONS

D, REF_D, V = 8, 5, 37
SMALL = 4000  # bytes, several tiles


def factors(n_tokens=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g)

    hidden, weight, bias = normal(2, n_tokens, D), normal(V, D), normal(V)
    return hidden, weight, bias, normal(2, n_tokens, REF_D), normal(V, REF_D), None


def arguments(name, which):
    """Arguments of an operator: with a reference, or in two of four without one."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (2, 3), generator=g)
    one, other = torch.randn(2, 2, 3, generator=g)
    options = HeadOptions(0.9, 1.1, 30.0, None, SMALL, "narrow", "cpu")
    heads = factors()
    outputs = torch.ops.kl_kernels.fold_heads(*heads, ids, None, *options)
    _, _, kl, _, entropy, policy_state, ref_state = outputs
    own = {
        "fold_heads": (ids, which),
        "mixture_of_heads": (which, policy_state, ref_state, 0.3),
        "heads_kl_backward": (
            *(one, other, None, one, ids, which, policy_state, ref_state, kl, entropy),
            *(True, True, True),
        ),
        "policy_loss_of_heads": (
            *(which, ids, None, one, one.abs(), None, None, 0.2, 0.2, None, 20.0, 0.1, 1, 0.01),
            *(True, True, True),
        ),
        "heads_jsd_backward": (
            *(one, which, policy_state, ref_state, kl, entropy, 0.3, True, False, True),
        ),
    }[name]
    return *heads, *own, *options


MASK = torch.tensor([[True, False, True], [True, True, False]])
WHICH = {"all": None, "mask": MASK, "listed": torch.tensor([4, 0, 2, 3])}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_operators_are_registered_completely(name, which):
    op = getattr(torch.ops.kl_kernels, name).default
    torch.library.opcheck(op, arguments(name, WHICH[which]))


def test_operators_take_a_head_without_a_reference():
    hidden, weight, _, *_ = factors()
    heads = hidden, weight, None, None, None, None
    options = HeadOptions(1.0, 1.0, None, None, SMALL, "narrow", None)
    args = *heads, torch.zeros(2, 3, dtype=torch.long), MASK, *options
    torch.library.opcheck(torch.ops.kl_kernels.fold_heads.default, args)
    outputs = torch.ops.kl_kernels.fold_heads(*args)
    assert torch.equal(outputs[0] != 0, MASK)


def stats(hidden, weight, ref_hidden, ref_weight, ids, **how):
    out = kl_kernels.linear_token_stats(hidden, weight, ids, **how)
    return out.logprob - 0.1 * out.entropy


def kl(hidden, weight, ref_hidden, ref_weight, ids, **how):
    out = kl_kernels.linear_token_kl(hidden, weight, ref_hidden, ref_weight, ids, **how)
    return out.kl + out.logprob


def forward_kl(hidden, weight, ref_hidden, ref_weight, ids, **how):
    return kl_kernels.linear_token_jsd(hidden, weight, ref_hidden, ref_weight, beta=0.0, **how)


def jsd(hidden, weight, ref_hidden, ref_weight, ids, **how):
    return kl_kernels.linear_token_jsd(hidden, weight, ref_hidden, ref_weight, **how)


def policy_loss(hidden, weight, ref_hidden, ref_weight, ids, mask=None, **how):
    loss, metrics = kl_kernels.linear_policy_loss(
        *(hidden, weight, ids, None, ids - 3.0, ids >= 0 if mask is None else mask),
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        kl_loss_coef=0.1,
        **how,
    )
    return loss + 0.0 * metrics["kl"]


def rows_of(mask, how):
    """Arguments that say which rows count."""
    index = mask.flatten().nonzero()[:, 0]
    return {
        "all": {},
        "mask": {"mask": mask},
        "row_index": {"row_index": index},
        "both": {"mask": mask, "row_index": index},
    }[how]


@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (stats, "all"),
        (kl, "mask"),
        (kl, "row_index"),
        (jsd, "mask"),
        (policy_loss, "mask"),
        (policy_loss, "both"),
    ],
)
def test_compiles_whole_and_once_for_all_lengths(function, rows):
    torch._dynamo.reset()
    counters.clear()

    def loss(leaves, *args, **how):
        hidden, weight = (leaf * 1.0 for leaf in leaves)
        return function(hidden, weight, *args, memory_budget=SMALL, **how).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_tokens in (3, 5, 11):
        hidden, weight, _, *reference, _ = factors(n_tokens, seed=n_tokens)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        ids = torch.arange(2 * n_tokens).view(2, -1)
        how = rows_of(ids % 3 > 0, rows)
        ours = torch.autograd.grad(compiled(leaves, *reference, ids, **how), leaves)
        plain = torch.autograd.grad(loss(leaves, *reference, ids, **how), leaves)
        assert all(map(torch.equal, ours, plain))
    assert counters["stats"]["unique_graphs"] == 1


def of_a_shard(group, *arguments):
    """(eager, compiled) gradients of hidden states and of this rank's half of the head."""
    hidden, weight, ref_hidden, ref_weight, ids = arguments
    here = slice(19 * dist.get_rank(group), 19 * (dist.get_rank(group) + 1))
    leaves = hidden.requires_grad_(), weight[here].clone().requires_grad_()

    def loss(leaves):
        hidden, weight = (leaf * 1.0 for leaf in leaves)
        reference = ref_hidden, ref_weight[here]
        start = 19 * dist.get_rank(group)
        return kl(hidden, weight, *reference, ids, group=group, vocab_start=start).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    return [torch.autograd.grad(f(leaves), leaves) for f in (loss, compiled)]


def test_a_sharded_head_is_compiled_whole():
    hidden, weight, _, *reference, _ = factors()
    ranks = Ranks(2)
    try:
        found = ranks(of_a_shard, hidden, weight, *reference, torch.arange(6).view(2, 3), n=2)
    finally:
        ranks.close()
    for eager, compiled in found:
        assert all(map(torch.equal, eager, compiled))


@pytest.mark.parametrize(
    ("function", "of_policy", "of_reference"),
    [
        (stats, (1, 3), (0, 0)),
        (kl, (1, 3), (1, 1)),
        (jsd, (2, 3), (2, 1)),
        (policy_loss, (3, 0), (1, 0)),
    ],
)
def test_products_are_counted(function, of_policy, of_reference):
    """Logits forward; logits and two gradients backward; a mixture's logits once more."""
    hidden, weight, _, *reference, _ = factors()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    policy, ref = 2 * 2 * 3 * D * V, 2 * 2 * 3 * REF_D * V
    with FlopCounterMode(display=False) as forward:
        value = function(*leaves, *reference, torch.zeros(2, 3, dtype=torch.long))
    assert forward.get_total_flops() == of_policy[0] * policy + of_reference[0] * ref
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(value.sum(), leaves)
    assert backward.get_total_flops() == of_policy[1] * policy + of_reference[1] * ref
    with FlopCounterMode(display=False) as frozen:
        torch.autograd.grad(
            function(
                hidden, weight.detach(), *reference, torch.zeros(2, 3, dtype=torch.long)
            ).sum(),
            hidden,
        )
    expected = (of_policy[0] + of_policy[1] - 1) * policy + sum(of_reference) * ref
    assert frozen.get_total_flops() == expected


@pytest.mark.parametrize("function", [stats, kl, forward_kl, jsd])
def test_listed_rows_are_those_of_the_mask(function):
    hidden, weight, _, *reference, _ = factors(9)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    ids = torch.arange(18).view(2, 9)
    mask = ids % 3 > 0
    found = []
    for how in ("mask", "row_index", "both"):
        value = function(*leaves, *reference, ids, memory_budget=SMALL, **rows_of(mask, how))
        assert (value[~mask] == 0).all()
        found.append((value.detach(), *torch.autograd.grad(value.sum(), leaves)))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_loss_is_of_the_rows_that_are_listed():
    hidden, weight, _, *reference, _ = factors(9)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    ids = torch.arange(18).view(2, 9)
    found = []
    for how in ("mask", "both"):
        loss = policy_loss(*leaves, *reference, ids, **rows_of(ids % 3 > 0, how))
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(map(torch.equal, *found))
    with pytest.raises(ValueError, match=r"^row_index and mask differ"):
        policy_loss(*leaves, *reference, ids, row_index=torch.arange(3))


def test_no_row_may_count():
    hidden, weight, _, *reference, _ = factors()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    nothing = torch.zeros(0, dtype=torch.int32)
    out = kl(*leaves, *reference, torch.zeros(2, 3, dtype=torch.long), row_index=nothing)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_ids_of_rows_that_are_not_listed_may_be_anything():
    hidden, weight, *_ = factors()
    ids = torch.tensor([[1, -1, 2], [3, 4, 10**9]])
    listed = torch.tensor([0, 2, 3, 4])
    assert torch.isfinite(
        kl_kernels.linear_token_stats(hidden, weight, ids, row_index=listed)[0]
    ).all()
    with pytest.raises(ValueError, match="token_ids holds -1 at an unmasked position"):
        kl_kernels.linear_token_stats(hidden, weight, ids, row_index=torch.arange(5))


WRONG = {
    "a list": ([0, 1], TypeError, "row_index is a list; it must be a torch.Tensor"),
    "a mask": (MASK, TypeError, "row_index has dtype torch.bool; accepted: int64, int32"),
    "two-dimensional": (
        MASK.nonzero(),
        ValueError,
        r"row_index has shape \(4, 2\); .* \[n\]",
    ),
    "negative": (torch.tensor([0, -1]), ValueError, "row_index holds -1; accepted: 0 to 5"),
    "too far": (torch.tensor([0, 6]), ValueError, "row_index holds 6; accepted: 0 to 5"),
    "repeated": (torch.tensor([3, 1, 3]), ValueError, "row_index holds 3 twice"),
    "elsewhere": (torch.tensor([0], device="meta"), ValueError, "row_index is on meta"),
    "unlike the mask": (torch.tensor([0, 1]), ValueError, "row_index and mask differ"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_row_index_that_is_none_is_named(wrong):
    index, error, message = WRONG[wrong]
    hidden, weight, *_ = factors()
    mask = MASK if wrong == "unlike the mask" else None
    with pytest.raises(error, match=message):
        kl_kernels.linear_token_stats(
            hidden, weight, torch.zeros(2, 3, dtype=torch.long), mask, row_index=index
        )
