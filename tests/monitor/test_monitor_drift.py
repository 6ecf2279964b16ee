"""`summarize_drift`, against loops over a batch's tokens."""

import json
import math
from collections import defaultdict

import pytest
import torch

from kl_kernels.monitor import summarize_drift


def batch(seed=0, n_rows=7, n_columns=40, vocab_size=9, sampled=True):
    generator = torch.Generator().manual_seed(seed)
    kl = torch.randn(n_rows, n_columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(n_rows, n_columns, generator=generator) < 0.7
    mask[2] = False
    mask[:, 5] = False
    ids = torch.randint(vocab_size, (n_rows, n_columns), generator=generator)
    kl = kl if sampled else kl.abs()
    return kl.masked_fill(~mask, torch.nan), mask, ids


def by_loops(kl, mask, keys):
    """{key: [finite KLs], number of infinite ones} of what the mask leaves and is not NaN."""
    finite, infinite = defaultdict(list), defaultdict(int)
    for i in range(kl.shape[0]):
        for j in range(kl.shape[1]):
            value = float(kl[i, j])
            if not mask[i, j] or math.isnan(value):
                continue
            key = keys(i, j)
            finite[key] += [value] if math.isfinite(value) else []
            infinite[key] += math.isinf(value)
    return finite, infinite


def check(parts, finite, infinite, total):
    for part in parts:
        values = finite[part.key]
        assert part.kl == pytest.approx(math.fsum(values), rel=1e-12, abs=1e-12)
        assert part.count == len(values)
        assert part.mean == pytest.approx(math.fsum(values) / max(1, len(values)), abs=1e-12)
        assert part.share == pytest.approx(math.fsum(map(abs, values)) / total, rel=1e-12)
        assert part.infinite == infinite[part.key]


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("with_infinite", [True, False])
def test_parts_are_those_of_loops(sampled, grouped, with_infinite):
    kl, mask, ids = batch(sampled=sampled)
    if with_infinite:
        kl[0, 0], kl[3, 1], kl[4, 2] = math.inf, math.inf, math.nan
        mask[0, 0] = mask[3, 1] = mask[4, 2] = True
    prompts = ["a", "b", "a", "c", "b", "a", "d"] if grouped else None
    summary = summarize_drift(kl, mask, ids, prompts, top=3)
    everything, n_infinite = by_loops(kl, mask, lambda i, j: 0)
    total = math.fsum(map(abs, everything[0]))
    assert summary.kl == pytest.approx(math.fsum(everything[0]), rel=1e-12)
    assert summary.count == len(everything[0])
    assert summary.infinite == n_infinite[0] == (2 if with_infinite else 0)
    assert summary.nan == int(with_infinite)

    of_prompts = by_loops(kl, mask, lambda i, j: prompts[i] if grouped else i)
    of_positions = by_loops(kl, mask, lambda i, j: j)
    of_tokens = by_loops(kl, mask, lambda i, j: int(ids[i, j]))
    check(summary.prompts, *of_prompts, total)
    check(summary.positions, *of_positions, total)
    check(summary.tokens, *of_tokens, total)

    def first(finite, infinite):
        return sorted(infinite, key=lambda k: (-infinite[k], -math.fsum(finite[k])))[:3]

    assert [part.key for part in summary.prompts] == first(*of_prompts)
    assert [part.key for part in summary.tokens] == first(*of_tokens)
    assert [part.key for part in summary.positions] == sorted(of_positions[1])
    assert math.isclose(sum(part.share for part in summary.positions), 1)


def test_concentration_is_the_share_of_the_largest_hundredth():
    kl = torch.zeros(3, 100)
    kl[0, 0], kl[1, 1], kl[2, 2], kl[2, 3] = 4, 3, 2, 1
    ids = torch.zeros(3, 100, dtype=torch.int64)
    assert summarize_drift(kl, kl >= 0, ids).concentration == pytest.approx(0.9)
    one = torch.tensor([[2.0, 2.0]])
    assert summarize_drift(one, one > 0, ids[:1, :2]).concentration == pytest.approx(0.5)


def test_a_batch_without_tokens_has_an_empty_summary():
    for shape in ((2, 3), (0, 3), (2, 0)):
        kl = torch.full(shape, torch.nan)
        summary = summarize_drift(kl, torch.zeros(shape), torch.zeros(shape, dtype=torch.int64))
        assert (summary.kl, summary.count, summary.concentration) == (0.0, 0, 0.0)
        assert summary.prompts == summary.positions == summary.tokens == ()


def test_a_kl_of_zero_has_no_shares():
    summary = summarize_drift(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2).int())
    assert summary.concentration == 0
    assert [part.share for part in summary.tokens] == [0]


def test_tokens_can_be_named_and_the_summary_logged():
    kl, mask, ids = batch()
    summary = summarize_drift(kl.float().requires_grad_(), mask, ids, decode="token {}".format)
    assert [part.text for part in summary.tokens] == [f"token {p.key}" for p in summary.tokens]
    logged = json.loads(json.dumps(summary.to_dict()))
    assert logged["tokens"][0]["kl"] == summary.tokens[0].kl
    assert logged["positions"][0]["text"] is None


def test_prompt_ids_may_be_a_tensor():
    kl, mask, ids = batch()
    keys = [3, 3, 5, 5, 7, 7, 7]
    assert summarize_drift(kl, mask, ids, torch.tensor(keys)) == summarize_drift(
        kl, mask, ids, keys
    )


def test_wrong_shapes_are_refused():
    kl, mask, ids = batch()
    for arguments, error in (
        ((kl[0], mask[0], ids[0]), "kl has shape"),
        ((kl, mask[1:], ids), "mask has shape"),
        ((kl, mask, ids[1:]), "token_ids has shape"),
        ((kl, mask, ids, [1]), "prompt_ids has 1 entries"),
    ):
        with pytest.raises(ValueError, match=error):
            summarize_drift(*arguments)
    with pytest.raises(ValueError, match="top is 0"):
        summarize_drift(kl, mask, ids, top=0)
    with pytest.raises(TypeError, match="token_ids has dtype"):
        summarize_drift(kl, mask, ids.double())
