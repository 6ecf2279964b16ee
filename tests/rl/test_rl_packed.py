"""Functions of packed sequences against loops over each, and against the padded form."""

import math

import pytest
import torch
from hypothesis import given, settings
from packed import PACKS, Pack
from torch.utils._python_dispatch import TorchDispatchMode

import kl_kernels
from kl_kernels.rl.losses import AGGREGATIONS
from kl_kernels.rl.sequences import sequences_of

EXACT = {"rtol": 1e-12, "atol": 1e-12}
FEW = settings(max_examples=40, deadline=None)


def close(found, expected):
    torch.testing.assert_close(found, expected, **EXACT)


def discounted(rewards, values, gamma, lam):
    """Advantages of one sequence by their recursion, from plain lists."""
    advantages, after, value_after = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values)):
        after = reward + gamma * value_after - value + gamma * lam * after
        value_after = value
        advantages.insert(0, after)
    return advantages


@pytest.mark.parametrize("masked", ["skip", "zero"])
@FEW
@given(PACKS)
def test_advantages_are_those_of_each_sequence_by_itself(masked, pack):
    mask = pack.mask()
    rewards, values = (pack.normal().masked_fill(~mask, math.nan) for _ in range(2))
    advantages, returns = kl_kernels.compute_gae(
        rewards, values, mask, gamma=0.9, lam=0.8, masked=masked, cu_seqlens=pack.cu_seqlens
    )
    assert advantages.shape == rewards.shape
    parts = (pack.split(t) for t in (rewards, values, mask, advantages, returns))
    for r, v, m, found, returned in zip(*parts):
        if masked == "skip":
            expected = torch.zeros_like(r)
            expected[m] = r.new_tensor(discounted(r[m].tolist(), v[m].tolist(), 0.9, 0.8))
        else:
            r, v = (torch.where(m, t, 0.0) for t in (r, v))
            all_tokens = r.new_tensor(discounted(r.tolist(), v.tolist(), 0.9, 0.8))
            expected = torch.where(m, all_tokens, 0.0)
        close(found, expected)
        close(returned, torch.where(m, expected + v, 0.0))


@FEW
@given(PACKS)
def test_rewards_are_those_of_the_padded_form(pack):
    scores, mask = pack.scores(), pack.mask()
    kl = pack.normal().masked_fill(~mask, math.nan)
    options = {"kl_coef": 0.25, "kl_clip": 1.0, "score_clip": 0.5}
    found = kl_kernels.compute_rewards(scores, kl, mask, cu_seqlens=pack.cu_seqlens, **options)
    padded = kl_kernels.compute_rewards(scores, pack.padded(kl), pack.padded(mask), **options)
    assert torch.equal(found, pack.packed(padded))
    for part, k, m, score in zip(*map(pack.split, (found, kl, mask)), scores.clamp(-0.5, 0.5)):
        expected = [-0.25 * x for x in k[m].clamp(-1, 1).tolist()]
        if expected:  # the score is at the last token, and nowhere else
            expected[-1] += score.item()
        assert part[m].tolist() == pytest.approx(expected, rel=1e-13)


@FEW
@given(PACKS)
def test_a_score_is_placed_in_its_own_sequence(pack):
    scores, mask = pack.scores(), pack.mask()
    index = torch.tensor([n // 2 if n > 1 else n - 1 for n in pack.lengths])
    positions = {
        "after_last": [None] * len(scores),
        "given": index.int(),
        "nowhere": torch.full_like(index, -1),
    }
    for name, position in positions.items():
        given_position = name if name == "after_last" else position
        found = kl_kernels.compute_rewards(
            scores, pack.normal(), mask, 0.0,
            score_position=given_position, cu_seqlens=pack.cu_seqlens,
        )  # fmt: skip
        for s, (part, m) in enumerate(zip(pack.split(found), pack.split(mask))):
            own = name if name == "after_last" else position[s : s + 1]
            alone = kl_kernels.compute_rewards(
                scores[s : s + 1], 0.0 * part[None], m[None], 0.0, score_position=own
            )
            assert torch.equal(part, alone[0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@FEW
@given(PACKS)
def test_an_aggregate_is_the_mean_of_the_loops_and_so_is_its_gradient(aggregation, pack):
    mask = pack.mask()
    losses = pack.normal().masked_fill(~mask, math.nan).requires_grad_()
    found = kl_kernels.aggregate(losses, mask, aggregation, cu_seqlens=pack.cu_seqlens)
    kept = [x[m].tolist() for x, m in zip(pack.split(losses), pack.split(mask)) if m.any()]
    sums = [sum(x) for x in kept]
    of_each = {
        "token-mean": lambda: sum(sums) / sum(map(len, kept)),
        "seq-mean-token-sum": lambda: sum(sums) / len(kept),
        "seq-mean-token-mean": lambda: sum(sum(x) / len(x) for x in kept) / len(kept),
        "seq-mean-token-sum-norm": lambda: sum(sums) / len(kept) / pack.longest,
    }
    assert found.item() == pytest.approx(of_each[aggregation]() if kept else 0, abs=1e-12)
    padded = kl_kernels.aggregate(pack.padded(losses), pack.padded(mask), aggregation)
    close(found, padded)
    (grad,) = torch.autograd.grad(found, losses)
    (expected,) = torch.autograd.grad(padded, losses)
    close(grad, expected)
    count = kl_kernels.global_denominator(mask, aggregation, cu_seqlens=pack.cu_seqlens)
    assert count.item() == (sum(map(len, kept)) if aggregation == "token-mean" else len(kept))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@FEW
@given(PACKS)
def test_losses_and_their_gradients_are_those_of_the_padded_form(aggregation, pack):
    mask = pack.mask()
    new, old, other, weights = (-pack.normal().abs().masked_fill(~mask, math.nan) for _ in range(4))

    def both(function, leaf, *constants, **per_token):
        leaf = leaf.clone().requires_grad_()
        loss, metrics = function(
            leaf, *constants, mask, cu_seqlens=pack.cu_seqlens, aggregation=aggregation, **per_token
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        in_rows = {name: pack.padded(value) for name, value in per_token.items()}
        expected, of_rows = function(
            pack.padded(leaf), *map(pack.padded, constants), pack.padded(mask),
            aggregation=aggregation, **in_rows,
        )  # fmt: skip
        close(loss, expected)
        close(grad, torch.autograd.grad(expected, leaf)[0])
        close(metrics, of_rows)

    both(kl_kernels.ppo_policy_loss, new, old, other, weights=-weights)
    both(kl_kernels.ppo_value_loss, new, old, other)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@FEW
@given(PACKS)
def test_importance_weights_are_those_of_the_padded_form(mode, level, pack):
    mask = pack.mask()
    ours, engines = (-pack.normal().abs() for _ in range(2))
    if pack.n > 2:
        engines.flatten()[pack.n // 2] = math.nan
    found, metrics = kl_kernels.importance_weights(
        ours, engines, mask, mode=mode, level=level, cu_seqlens=pack.cu_seqlens
    )
    padded, expected = kl_kernels.importance_weights(
        *map(pack.padded, (ours, engines, mask)), mode=mode, level=level
    )
    close(found, pack.packed(padded))
    close(metrics, expected)
    if level == "sequence":
        for w, a, b, m in zip(*map(pack.split, (found, ours, engines, mask))):
            product = math.exp(sum((a - b)[m].tolist()))
            known = not math.isnan(product)
            capped = min(product, 2.0) if mode == "truncate" else product * (0.5 <= product <= 5)
            assert w[m].tolist() == pytest.approx([capped if known else 0.0] * int(m.sum()))


@FEW
@given(PACKS)
def test_scores_are_adjusted_by_the_lengths_of_packed_sequences(pack):
    scores, mask = pack.scores(), pack.mask()
    found = kl_kernels.length_normalized_scores(scores, mask, cu_seqlens=pack.cu_seqlens)
    close(found, kl_kernels.length_normalized_scores(scores, pack.padded(mask)))
    lengths = pack.cu_seqlens.diff()
    penalty = kl_kernels.overlong_penalty(lengths, 5, 3)
    assert penalty.tolist() == pytest.approx([-min(max(n - 2, 0), 3) / 3 for n in pack.lengths])


def controllers(unit):
    return (
        kl_kernels.FixedKLController(0.1, unit=unit),
        kl_kernels.AdaptiveKLController(0.1, 1.0, 100, unit=unit),
        kl_kernels.ThresholdKLController(0.1, 1.0, unit=unit),
        kl_kernels.PIKLController(0.1, 1.0, unit=unit),
    )


@pytest.mark.parametrize("unit", ["sequence_sum", "token_mean"])
def test_controllers_and_the_monitor_go_as_with_the_padded_form(unit):
    packed_form, padded_form = controllers(unit), controllers(unit)
    monitors = [kl_kernels.KLMonitor(kl_budget=3.0, unit=unit) for _ in range(2)]
    told = 0
    for step, lengths in enumerate(([3, 0, 9, 1], [1, 4], [0, 0], [20, 1, 1], [2] * 6, [30])):
        pack = Pack(lengths, step, as_row=step % 2 == 0)
        mask = pack.mask()
        kl, entropy, ratio = (pack.normal().abs() * (1 + step / 2) for _ in range(3))
        kl = kl.masked_fill(~mask, math.nan)
        updates = []
        for group, form, kwargs in (
            (packed_form, lambda x: x, {"cu_seqlens": pack.cu_seqlens}),
            (padded_form, pack.padded, {}),
        ):
            updates.append(
                [c.update(form(kl), n_steps=4, mask=form(mask), **kwargs) for c in group]
            )
        for ours, theirs in zip(*updates):
            assert ours == pytest.approx(theirs, rel=1e-12, nan_ok=True)
        if mask.any():
            sums = [float(x[m].sum()) for x, m in zip(pack.split(kl), pack.split(mask)) if m.any()]
            expected = sum(sums) / (len(sums) if unit == "sequence_sum" else int(mask.sum()))
            assert updates[0][0].kl == pytest.approx(expected)
        found, padded = (
            monitor.observe(
                step, kl=form(kl), entropy=form(entropy), ratio=form(ratio),
                logprob=form(-entropy), mask=form(mask), reward=pack.scores() * 0, **kwargs,
            )
            for monitor, form, kwargs in (
                (monitors[0], lambda x: x, {"cu_seqlens": pack.cu_seqlens}),
                (monitors[1], pack.padded, {}),
            )
        )  # fmt: skip
        assert [e.kind for e in found] == [e.kind for e in padded]
        for ours, theirs in zip(found, padded):
            assert ours.value == pytest.approx(theirs.value, rel=1e-12)
        told += len(found)
    assert told > 0


def everything(pack, kl, old, scores, mask):
    """All that looks along sequences, as one number."""
    how = {"cu_seqlens": pack.cu_seqlens}
    rewards = kl_kernels.compute_rewards(scores, kl, mask, 0.1, **how)
    advantages, returns = kl_kernels.compute_gae(rewards, old, mask, **how)
    weights, _ = kl_kernels.importance_weights(kl, old, mask, level="sequence", **how)
    mean = {"aggregation": "seq-mean-token-mean", **how}
    policy, _ = kl_kernels.ppo_policy_loss(kl, old, advantages, mask, weights=weights, **mean)
    value, _ = kl_kernels.ppo_value_loss(kl, old, returns, mask, **mean)
    normalised = kl_kernels.length_normalized_scores(scores, mask, **how)
    return policy + value + kl_kernels.aggregate(kl, mask, **mean) + normalised.sum()


@pytest.mark.parametrize("as_row", [False, True])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(lengths, as_row):
    pack = Pack(lengths, as_row=as_row)
    kl = pack.normal().requires_grad_()
    loss = everything(pack, kl, pack.normal(), torch.zeros(len(lengths)), pack.mask())
    assert loss.item() == 0
    assert torch.autograd.grad(loss, kl)[0].shape == kl.shape
    update = kl_kernels.FixedKLController(0.1).update(
        kl, 1, pack.mask(), cu_seqlens=pack.cu_seqlens
    )
    assert not update.applied


def test_gradients_are_those_of_differences():
    pack = Pack([3, 0, 2, 1])
    old, scores, mask = pack.normal() - 3, pack.scores(), pack.mask(1.0)
    aggregated = lambda x: kl_kernels.aggregate(  # noqa: E731
        x.square(), mask, "seq-mean-token-mean", cu_seqlens=pack.cu_seqlens
    )
    leaf = (old + 0.05 * pack.normal()).requires_grad_()
    assert torch.autograd.gradcheck(aggregated, leaf)
    value = lambda x: kl_kernels.ppo_value_loss(  # noqa: E731
        x, old, scores.new_zeros(6), mask, aggregation="seq-mean-token-sum-norm",
        cu_seqlens=pack.cu_seqlens,
    )[0]  # fmt: skip
    assert torch.autograd.gradcheck(value, leaf)


def test_one_graph_serves_all_packs():
    function = lambda lengths, *given: everything(Given(lengths), *given)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
    for seed, lengths in enumerate(([3, 0, 2], [1, 4, 5, 2])):
        pack = Pack(lengths, seed, dtype=torch.int32)
        given = pack.normal() - 3, pack.normal() - 3, pack.scores(), pack.mask()
        close(compiled(pack.cu_seqlens, *given), function(pack.cu_seqlens, *given))


def test_no_value_is_looked_at_on_a_device():
    """Tensors on meta have none, so that reading one, which waits for a GPU, is an error."""
    pack = Pack([3, 0, 2])
    given = [x.to("meta") for x in (pack.normal(), pack.normal(), pack.scores(), pack.mask())]
    pack.cu_seqlens = pack.cu_seqlens.to("meta")
    assert everything(pack, *given).is_meta


class Given:
    def __init__(self, cu_seqlens):
        self.cu_seqlens = cu_seqlens


class Allocated(TorchDispatchMode):
    """Bytes of all that torch's operators returned, freed or not."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.total += tensor.untyped_storage().nbytes()
        return result


def test_memory_follows_the_tokens():
    """All tensors ever made, together, are less than a single padded one of float32."""
    pack = Pack([4000] + [1] * 999)
    kl, old = (pack.normal().float() - 3 for _ in range(2))
    kl.requires_grad_()
    with Allocated() as made:
        everything(pack, kl, old, pack.scores().float(), pack.mask()).backward()
        kl_kernels.KLMonitor().observe(
            1, kl=kl, ratio=kl, mask=pack.mask(), cu_seqlens=pack.cu_seqlens
        )
    assert 0 < made.total < 4 * 1000 * 4000


def test_a_long_sequence_loses_no_digits():
    """Sums of float32 are not added up in float32."""
    pack = Pack([1, 200_000, 1])
    x = pack.normal().float()
    sums = sequences_of("x", x, pack.cu_seqlens).sums(x)
    exact = torch.stack([part.double().sum() for part in pack.split(x)])
    torch.testing.assert_close(sums.double(), exact, rtol=1e-7, atol=0)
