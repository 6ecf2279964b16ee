"""`linear_policy_loss` of a vocabulary that is sharded over ranks, against whole float64 logits."""

import math

import pytest
import torch
import torch.distributed as dist
from test_linear_policy_loss import FEATURES, SMALL, Case, V, assert_near, error
from torch.distributed.tensor.debug import CommDebugMode

import kl_kernels
from kl_kernels.partitioned import products
from kl_kernels.partitioned import shards as parallel

UNEVEN, HALVES = (0, 1, 30, 64, V), (0, 110, V)
SHARED = "token_ids", "old_logprobs", "advantages", "mask"


def on_shard(group, case, cuts):
    """The arguments of this rank, and the leaves among them."""
    here = slice(*cuts[dist.get_rank(group) :][:2])

    def own(x):
        return None if x is None else x.detach()[here].clone().requires_grad_(x.requires_grad)

    given = dict(zip(SHARED, case.of_tokens)) | {
        "hidden": case.hidden.detach().clone().requires_grad_(case.hidden.requires_grad),
        "weight": own(case.weight),
        "bias": own(case.bias),
        "ref_hidden": case.ref_hidden,
        "ref_weight": own(case.ref_weight),
        "ref_bias": own(case.ref_bias),
        "group": group,
        "vocab_start": here.start,
    }
    leaves = [given[name] for name in ("hidden", "weight", "bias") if given[name] is not None]
    return given | case.options, leaves


def loss_and_gradients(group, case, cuts, options, upstream=1.0):
    given, leaves = on_shard(group, case, cuts)
    loss, metrics = kl_kernels.linear_policy_loss(**given | options)
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    return loss.detach(), metrics, torch.autograd.grad(upstream * loss, needed)


def together(found):
    """Loss, metrics and whole gradients; what all ranks have must be the same bits on each."""
    loss, metrics, (hidden, *_) = found[0]
    for other, other_metrics, (other_hidden, *_) in found[1:]:
        torch.testing.assert_close(
            (other, other_metrics, other_hidden),
            (loss, metrics, hidden),
            rtol=0,
            atol=0,
            equal_nan=True,
        )
    columns = zip(*(gradients[1:] for _, _, gradients in found))
    return loss, metrics, [hidden, *map(torch.cat, columns)]


def assert_true(case, found, tolerance=2e-5, upstream=1.0):
    loss, metrics, gradients = together(found)
    exact, exact_metrics = case.truth()
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=2e-6)
    assert metrics.keys() == exact_metrics.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(value.double(), exact_metrics[name], rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(upstream * exact, case.leaves), strict=True
    ):
        assert_near(gradient, expected, tolerance)


@pytest.mark.parametrize("features", FEATURES)
def test_loss_metrics_and_gradients_are_those_of_whole_logits(ranks, features):
    case = Case(**FEATURES[features])
    options = {"memory_budget": SMALL}  # several blocks of rows
    found = ranks(loss_and_gradients, case, UNEVEN, options, 3.0, n=4)
    assert_true(case, found, upstream=3.0)


@pytest.mark.parametrize("features", ["exact KL", "transforms"])
def test_the_reference_backend_gives_the_same(ranks, features):
    case = Case(**FEATURES[features])
    assert_true(case, ranks(loss_and_gradients, case, HALVES, {"backend": "reference"}, n=2))


def equal_shards(group, case):
    given, leaves = on_shard(group, case, (0, 101, 202))
    del given["vocab_start"]
    loss, metrics = kl_kernels.linear_policy_loss(**given)
    return loss.detach(), metrics, torch.autograd.grad(loss, leaves)


def without_last_column(case):
    case.weight = case.weight.detach()[:-1].requires_grad_()
    case.token_ids %= len(case.weight)
    return case


def test_equal_shards_know_their_places(ranks):
    case = without_last_column(Case())
    assert_true(case, ranks(equal_shards, case, n=2))


def test_a_group_of_one_rank_is_no_group(ranks):
    case = Case(**FEATURES["exact KL"])
    assert_true(case, ranks(loss_and_gradients, case, (0, V), {}, n=1))


def trained(group, steps, cuts):
    """Weights after steps of an optimiser, with two micro-batches of other tokens in each."""
    case = Case(bias=True, entropy_coef=0.01)
    given, leaves = on_shard(group, case, cuts) if group is not None else ({}, case.leaves)
    optimiser = torch.optim.Adam(leaves, 0.05)
    for step in range(steps):
        optimiser.zero_grad()
        for i in range(2):
            case.mask = Case(seed=2 * step + i).mask
            if group is None:
                loss = case.truth()[0]
            else:
                given["mask"] = case.mask
                loss = kl_kernels.linear_policy_loss(**given, memory_budget=SMALL)[0]
            (loss / 2).backward()
        optimiser.step()
    return [leaf.detach() for leaf in leaves]


def test_steps_train_as_with_logits(ranks):
    expected = trained(None, 3, None)
    hidden, *columns = zip(*ranks(trained, 3, UNEVEN, n=4))
    assert all(torch.equal(other, hidden[0]) for other in hidden)
    for found, true in zip((hidden[0], *map(torch.cat, columns)), expected, strict=True):
        assert_near(found, true, 1e-3)


def narrow(group, case, cuts, options):
    multiplies = products.multiplies_narrow
    products.multiplies_narrow = lambda device, dtype: dtype in products.NARROW
    try:
        return loss_and_gradients(group, case, cuts, options)
    finally:
        products.multiplies_narrow = multiplies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", ["bias", "exact KL", "transforms"])
def test_narrow_products_lose_little_more_than_rounding(ranks, features, dtype):
    case = Case(dtype, **FEATURES[features])
    found = ranks(narrow, case, UNEVEN, {"memory_budget": 3 * SMALL}, n=4)
    loss, _, gradients = together(found)
    for name in ("hidden", "weight", "bias"):
        if (leaf := getattr(case, name)) is not None:
            setattr(case, name, leaf.detach().double().requires_grad_())
    exact, _ = case.truth()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, torch.autograd.grad(exact, case.leaves), strict=True):
        assert error(gradient, expected) <= 1.3 * error(expected.to(dtype), expected)


def test_the_rounding_error_of_a_tokens_own_entry_is_put_back_once(ranks):
    """Gradients are products of bfloat16 factors, and stored in float32, where that is seen.

    The own entries, 0.9 of the most that a bfloat16 is off, are by far the largest.
    """
    case = Case(old=None, bias=True)
    case.weight = (case.weight.detach() / 8).bfloat16().requires_grad_()
    case.bias.data /= 8
    case.mask[:], case.advantages[:] = True, 1.0
    case.options["denominator"] = 1 / (1 + 0.9 / 256)
    *_, (hidden, _, bias) = together(ranks(narrow, case, UNEVEN, {}, n=4))
    *_, (near, _, _) = together(ranks(loss_and_gradients, case, UNEVEN, {}, n=4))
    exact_hidden, _, exact_bias = torch.autograd.grad(case.truth()[0], case.leaves)
    assert error(near, exact_hidden) < 1e-5
    for found, exact in ((hidden, exact_hidden), (bias, exact_bias)):
        assert error(found, exact.double()) < 5e-4


def peaked(case):
    """Every third token is nearly certain, and every third nearly impossible."""
    own = case.weight.detach()[case.token_ids]
    size = 40 / own.square().sum(-1, keepdim=True)
    sign = torch.tensor([1.0, 0.0, -1.0]).repeat(7).view(3, 7, 1)
    case.hidden = (case.hidden.detach() + sign * size * own).requires_grad_()
    case.old = (case.logprobs() + 0.1).clamp(max=0)
    return case


def test_peaked_rows_are_true(ranks):
    case = peaked(Case(**FEATURES["exact KL"] | {"log_ratio_clamp": None}))
    assert_true(case, ranks(loss_and_gradients, case, UNEVEN, {}, n=4))


def test_padding_alone_on_a_rank_changes_nothing(ranks):
    case = Case(bias=True, entropy_coef=0.1)
    case.token_ids %= UNEVEN[3]
    case.bias.data[UNEVEN[3] :] = -math.inf
    found = ranks(loss_and_gradients, case, UNEVEN, {}, n=4)
    assert not any(gradient.any() for gradient in found[3][2][1:])
    for name in ("weight", "bias"):
        setattr(case, name, getattr(case, name).detach()[: UNEVEN[3]].requires_grad_())
    assert_true(case, [(*values, gradients) for *values, gradients in found[:3]])


def test_masked_rows_are_not_read_and_get_nothing(ranks):
    case = Case(bias=True)
    expected = together(ranks(loss_and_gradients, case, HALVES, {}, n=2))
    for tensor in (case.hidden.data, case.advantages, case.old):
        tensor[~case.mask] = math.nan
    case.old[~case.mask] = 0.0  # log-probabilities are checked wherever they are
    case.token_ids[~case.mask] = 10**6
    found = together(ranks(loss_and_gradients, case, HALVES, {}, n=2))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found[2][0][~case.mask].any()


def test_without_tokens_the_loss_and_all_gradients_are_0(ranks):
    case = Case(**FEATURES["exact KL"], bias=True)
    case.mask[:] = False
    loss, metrics, gradients = together(ranks(loss_and_gradients, case, UNEVEN, {}, n=4))
    assert loss == 0
    assert not any(value.any() for value in (*metrics.values(), *gradients))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_factor_gets_no_gradient(ranks, frozen):
    case = Case()
    getattr(case, frozen).requires_grad_(False)
    found = ranks(loss_and_gradients, case, HALVES, {}, n=2)
    (expected,) = torch.autograd.grad(
        case.truth()[0], [leaf for leaf in case.leaves if leaf.requires_grad]
    )
    gradients = [gradient for *_, (gradient,) in found]
    of_all = torch.cat(gradients) if frozen == "hidden" else gradients[1]
    assert_near(of_all, expected, 2e-5)


def traffic(group, case, grad):
    """All-reduces of forward, collectives of backward, and the bytes that each all-gather sends."""
    sent, reduced, gather, reduce = [], [], parallel.all_gather, dist.all_reduce

    def gathers(output, state, **options):
        sent.append(state.numel() * state.element_size())
        return gather(output, state, **options)

    def reduces(tensor, **options):
        reduced.append(tensor.shape)
        return reduce(tensor, **options)

    parallel.all_gather, dist.all_reduce = gathers, reduces
    try:
        given, leaves = on_shard(group, case, UNEVEN)
        with torch.set_grad_enabled(grad):
            loss, _ = kl_kernels.linear_policy_loss(**given, memory_budget=SMALL)
        assert loss.requires_grad is grad
        forward = len(sent), len(reduced)
        with CommDebugMode() as backward:
            if grad:
                torch.autograd.grad(loss, leaves)
        assert (len(sent), len(reduced)) == forward
    finally:
        parallel.all_gather, dist.all_reduce = gather, reduce
    return len(reduced), backward.get_total_counts(), sent


@pytest.mark.parametrize("grad", [True, False])
def test_ranks_cut_blocks_alike_and_send_a_state_for_each(ranks, grad):
    case = Case(**FEATURES["exact KL"])
    found = ranks(traffic, case, grad, n=4)
    forward, backward, sent = found[0]
    assert len(sent) > 1
    assert sum(sent) == int(case.mask.sum()) * 4 * 9 + len(sent) * 8
    assert (forward, backward) == (1 + grad, 0)
    assert found == [found[0]] * 4


def refused(group, kind):
    case, cuts, options = Case(), UNEVEN, {}
    if kind == "ids":
        case.token_ids[case.mask] = V
    if kind == "budget":
        options["memory_budget"] = 300  # enough for the row of three of the shards
    if kind == "masks":
        case.mask[:] = torch.arange(case.mask.shape[1]) <= dist.get_rank(group)
    if kind == "places":
        cuts, options["vocab_start"] = HALVES, 0
    loss_and_gradients(group, case, cuts, options)


REFUSALS = {
    "ids": f"token_ids holds {V} at an unmasked position, which not one of the ranks holds",
    "budget": "memory_budget is 300; accepted: from about 556 bytes on",
    "masks": "masks of the ranks hold 3 to [36] tokens; .* must be the same on all ranks of a g",
    "places": "the ranks' logits are of the token ids 0 to 109, 0 to 92; together",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_is_wrong_is_named_on_every_rank(ranks, kind):
    n = 2 if kind in ("masks", "places") else 4
    with pytest.raises(ValueError, match=REFUSALS[kind]) as found:
        ranks(refused, kind, n=n)
    assert [str(e) for e in found.value.errors] == [str(found.value)] * n


def unchecked(group, case):
    checks = parallel._check_held_once
    parallel._check_held_once = lambda *_: None  # as on a GPU
    try:
        return loss_and_gradients(group, case, HALVES, {"memory_budget": SMALL})
    finally:
        parallel._check_held_once = checks


def test_a_token_on_no_rank_is_nan_where_nobody_looks(ranks):
    case = Case()
    row = case.mask.nonzero()[1]
    case.token_ids[tuple(row)] = V
    loss, _, (hidden, _) = together(ranks(unchecked, case, n=2))
    assert loss.isnan()
    assert hidden.isnan().any(-1).nonzero().tolist() == [row.tolist()]


def test_a_start_without_a_group_is_refused():
    with pytest.raises(ValueError, match="vocab_start is 3, but there is no group"):
        Case().ours(vocab_start=3)
