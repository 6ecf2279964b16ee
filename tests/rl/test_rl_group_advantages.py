"""`group_advantages` against its formulas, answer by answer in Python's own numbers."""

import itertools
import math
import statistics

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_kernels import group_advantages

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++")
FEW = settings(max_examples=60, deadline=None)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
# Scores as verifiers give them: few values, many of them equal.
SCORE = st.sampled_from([0.0, 1.0, -1.0, 0.1, 0.5, 1e3 + 0.1])
ANSWERS = st.lists(st.tuples(SCORE, st.sampled_from([-(2**63), -1, 0, 5, 2**63 - 1])), max_size=9)


def centered(score, group):
    return score - math.fsum(group) / len(group)


def bessel(deviations):
    return math.sqrt(math.fsum(d * d for d in deviations) / max(len(deviations) - 1, 1))


def definition(scores, ids, kind, eps):
    """Advantages by the formulas; 0 in groups whose scores are one number."""
    groups = [[s for s, other in zip(scores, ids) if other == own] for own in ids]
    deviations = [centered(score, group) for score, group in zip(scores, groups)]
    found = []
    for i, (score, group) in enumerate(zip(scores, groups)):
        if len(set(group)) == 1:
            found.append(0.0)
        elif kind == "grpo":
            found.append(deviations[i] / (statistics.stdev(group) + eps))
        elif kind == "dr_grpo":
            found.append(deviations[i])
        elif kind == "rloo":
            others = (math.fsum(group) - score) / (len(group) - 1)
            found.append(score - others)
        else:
            found.append(deviations[i] / (bessel(deviations) + eps))
    return found


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(ANSWERS, st.sampled_from([1e-4, 0.5]))
def test_it_is_the_definition_in_groups_of_any_size_and_order(kind, answers, eps):
    scores, ids = ([a[i] for a in answers] for i in (0, 1))
    found = group_advantages(
        torch.tensor(scores, dtype=torch.float64),
        group_ids=torch.tensor(ids, dtype=torch.int64),
        kind=kind,
        eps=eps,
    )
    expected = torch.tensor(definition(scores, ids, kind, eps), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for i, own in enumerate(ids):
        if len({s for s, other in zip(scores, ids) if other == own}) == 1:
            assert found[i] == 0


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 2**31))
def test_a_size_is_ids_of_consecutive_answers(kind, size, count, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(size * count, generator=g)
    ids = torch.arange(count, dtype=torch.int32).repeat_interleave(size)
    found = group_advantages(scores, group_size=size, kind=kind)
    assert torch.equal(found, group_advantages(scores, group_ids=ids, kind=kind))


def test_every_batch_of_four_rewards_of_zero_and_one():
    """Enumerated: a group of two to each prompt, and the known values of each kind."""
    r = math.sqrt(0.5)  # the std of 0 and 1
    for scores in itertools.product((0.0, 1.0), repeat=4):
        signs = [a - b for pair in (scores[:2], scores[2:]) for a, b in (pair, pair[::-1])]
        unequal = sum(sign != 0 for sign in signs)
        of_batch = math.sqrt(0.25 * unequal / 3)
        expected = {
            "grpo": [sign * 0.5 / r for sign in signs],
            "dr_grpo": [sign * 0.5 for sign in signs],
            "rloo": signs,
            "reinforce++": [sign and sign * 0.5 / of_batch for sign in signs],
        }
        for kind, of_kind in expected.items():
            found = group_advantages(torch.tensor(scores), group_size=2, kind=kind, eps=0.0)
            assert found.tolist() == pytest.approx(of_kind, rel=1e-6), (kind, scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e30, -7.7e-30, 1e3 + 0.1])
def test_equal_scores_have_none_even_where_their_mean_rounds(kind, score):
    for n, dtype in itertools.product((1, 3, 7, 10, 49), (torch.float32, torch.float64)):
        equal = torch.full((n,), score, dtype=dtype)
        others = torch.arange(n, dtype=dtype)  # a second group, which is not constant
        for eps in (0.0, 1e-4):
            alone = group_advantages(equal, group_size=n, kind=kind, eps=eps)
            beside = group_advantages(torch.cat([equal, others]), group_size=n, kind=kind, eps=eps)
            assert (alone == 0).all()
            assert (beside[:n] == 0).all()
            assert (beside[n:] != 0).any() == (n > 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_offset_of_all_scores_changes_nothing(kind):
    scores = torch.randint(-8, 8, (24,)).double()
    found = group_advantages(scores, group_size=6, kind=kind)
    torch.testing.assert_close(
        group_advantages(scores + 2.0**40, group_size=6, kind=kind), found, **CLOSE
    )


@pytest.mark.parametrize("kind", ["dr_grpo", "grpo", "reinforce++"])
def test_advantages_of_a_group_add_up_to_nothing(kind):
    found = group_advantages(torch.randn(24).double(), group_size=4, kind=kind)
    torch.testing.assert_close(found.view(-1, 4).sum(1), torch.zeros(6).double(), **CLOSE)


def test_it_takes_no_gradient_and_any_dtype():
    scores = torch.tensor([0.0, 1.0, 1.0, 3.0], requires_grad=True)
    expected = group_advantages(scores, group_size=2)
    assert not expected.requires_grad
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.float64):
        found = group_advantages(scores.detach().to(dtype), group_size=2)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.float(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_no_answers(kind):
    none = torch.zeros(0)
    assert group_advantages(none, group_size=4, kind=kind).shape == (0,)
    assert group_advantages(none, group_ids=none.long(), kind=kind).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_part_of_one_graph(kind):
    def both(x, ids):
        by_size = group_advantages(torch.tanh(x), group_size=3, kind=kind)
        return by_size * 2 + group_advantages(x, group_ids=ids, kind=kind)

    torch._dynamo.reset()
    x, ids = torch.randn(12), torch.arange(12) % 5
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ids), both(x, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_looks_at_stays_in_its_group(kind):
    """Under torch.compile, as on a GPU, NaN is not refused."""
    scores = torch.tensor([torch.nan, 1.0, 0.0, 1.0, 2.0, 2.0])
    torch._dynamo.reset()
    unlooked = torch.compile(
        lambda x: group_advantages(x, group_size=2, kind=kind), backend="aot_eager"
    )
    found = unlooked(scores)
    assert found[:2].isnan().all()
    assert found[2:4].isnan().all() == (kind == "reinforce++")
    assert (found[4:] == 0).all()


# Answers of each rank: groups are spread over ranks, one is whole, one answer is alone; the third
# rank has none. In the second step all scores are equal.
SIZES = (5, 2, 0, 4)
IDS = torch.tensor([9, 9, -4, 2**40, 9, -4, 9, 3, 3, -4, 9])
STEPS = (torch.randn(11, generator=torch.Generator().manual_seed(1)), torch.full((11,), 0.1))


def own(x, group, sizes=SIZES):
    return x.split(sizes)[dist.get_rank(group)]


def of_spread_groups(group):
    return [
        group_advantages(own(scores, group), group_ids=own(IDS, group), kind=kind, group=group)
        for scores in STEPS
        for kind in KINDS
    ]


def test_groups_spread_over_ranks_are_those_of_one_process(ranks):
    found = ranks(of_spread_groups, n=4)
    for i, (scores, kind) in enumerate(itertools.product(STEPS, KINDS)):
        alone = group_advantages(scores, group_ids=IDS, kind=kind)
        assert torch.equal(torch.cat([of_rank[i] for of_rank in found]), alone)


WHOLE = (6, 0, 3, 9)  # each group has three answers


def of_whole_groups(group, scores):
    return [
        group_advantages(own(scores, group, WHOLE), group_size=3, kind=kind, group=group)
        for kind in KINDS
    ]


def test_whole_groups_of_ranks_are_those_of_one_process(ranks):
    for scores in (torch.randn(18), torch.full((18,), 0.1), torch.full((18,), 7.0)):
        found = ranks(of_whole_groups, scores, n=4)
        for i, kind in enumerate(KINDS):
            alone = group_advantages(scores, group_size=3, kind=kind)
            together = torch.cat([of_rank[i] for of_rank in found])
            torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


def without_answers(group):
    none = torch.zeros(0)
    return [
        group_advantages(none, kind=kind, group=group, **groups).shape
        for kind in KINDS
        for groups in ({"group_size": 2}, {"group_ids": none.long()})
    ]


def test_no_rank_has_answers(ranks):
    assert ranks(without_answers, n=2) == [[(0,)] * 8] * 2


SCORES = torch.zeros(4)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"kind": "gspo"}, "kind is 'gspo'; accepted: 'grpo', 'dr_grpo', 'rloo', "),
        (ValueError, {"group_size": 3}, "group_size is 3, which does not divide the 4 scores"),
        (ValueError, {"group_size": 0}, "group_size is 0; it must be an integer, 1 or above"),
        (TypeError, {"group_size": 2.0}, "group_size is 2.0, a float; it must be an integer"),
        (ValueError, {"group_size": None}, "group_size and group_ids: neither given"),
        (ValueError, {"group_ids": torch.zeros(4).long()}, "group_size and group_ids: both given"),
        (ValueError, {"eps": -1.0}, "eps is -1.0"),
        (ValueError, {"scores": torch.zeros(2, 2)}, r"scores has shape \(2, 2\); it must be \[B\]"),
        (TypeError, {"scores": [0.0] * 4}, "scores is a list"),
        (ValueError, {"scores": torch.tensor([0.0, math.nan])}, "scores holds nan at index 1; it"),
        (ValueError, {"scores": torch.tensor([-math.inf, 0.0])}, "scores holds -inf at index 0"),
    ],
)
def test_wrong_arguments_are_named(error, options, message):
    with pytest.raises(error, match=message):
        group_advantages(**{"scores": SCORES, "group_size": 2} | options)


@pytest.mark.parametrize(
    ("error", "ids", "message"),
    [
        (TypeError, torch.zeros(4), "group_ids has dtype torch.float32; accepted: int64, int32"),
        (ValueError, torch.zeros(3).long(), r"group_ids has shape \(3,\), scores \(4,\)"),
        (ValueError, torch.zeros(4, device="meta").long(), "group_ids is on meta, scores on cpu"),
        (TypeError, [0, 0, 1, 1], "group_ids is a list"),
    ],
)
def test_wrong_ids_are_named(error, ids, message):
    with pytest.raises(error, match=message):
        group_advantages(SCORES, group_ids=ids)
