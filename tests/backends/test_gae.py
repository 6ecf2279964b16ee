"""Generalised advantage estimation of every backend, against the definition on plain lists."""

import itertools

import pytest
import torch


def advantages_of(rewards, values, gamma, lam):
    """Equation 16 of Schulman et al. (2016): the sum over l of (gamma lam)^l delta_{t+l}."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]


def expected(rewards, values, mask, gamma, lam, skip_masked):
    """Skipping works on the sequence without its masked tokens; otherwise those count as 0."""
    advantages = torch.zeros_like(rewards, dtype=torch.float64)
    for b in range(len(rewards)):
        r, v = rewards[b].double(), values[b].double()
        if skip_masked:
            keep = mask[b].nonzero().squeeze(-1)
            advantages[b, keep] = torch.tensor(
                advantages_of(r[keep].tolist(), v[keep].tolist(), gamma, lam), dtype=torch.float64
            )
        else:
            r, v = (torch.where(mask[b], t, 0.0) for t in (r, v))
            all_tokens = torch.tensor(
                advantages_of(r.tolist(), v.tolist(), gamma, lam), dtype=torch.float64
            )
            advantages[b] = torch.where(mask[b], all_tokens, 0.0)
    return advantages, torch.where(mask, advantages + values.double(), 0.0)


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
@pytest.mark.parametrize(
    ("backend", "n_tokens"),
    [
        *itertools.product(("reference", "cpu"), (0, 1, 2, 31, 130)),
        *itertools.product(("triton",), (0, 1, 130)),  # one block, whatever the number
    ],
)
def test_gae_is_the_definition(backend, skip_masked, gamma, lam, n_tokens):
    g = torch.Generator().manual_seed(n_tokens)
    rewards = torch.randn(5, n_tokens, generator=g)
    values = torch.randn(5, n_tokens, generator=g)
    mask = torch.rand(5, n_tokens, generator=g) < 0.6
    if n_tokens:
        mask[0], mask[1] = True, False
    rewards[~mask], values[~mask] = torch.nan, torch.inf  # must not be read
    got = torch.ops.kl_kernels.gae(rewards, values, mask, gamma, lam, skip_masked, None, backend)
    for a, b in zip(got, expected(rewards, values, mask, gamma, lam, skip_masked)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_packed_sequences_are_those_of_rows(backend, skip_masked):
    g = torch.Generator().manual_seed(0)
    for lengths in ([5, 0, 1, 700], [0, 0], [0, 33, 0], []):
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        tokens = (1, sum(lengths))
        rewards, values = torch.randn(2, *tokens, generator=g)
        mask = torch.rand(tokens, generator=g) < 0.6
        rewards[~mask], values[~mask] = torch.nan, torch.inf
        how = 0.9, 0.8, skip_masked
        found = torch.ops.kl_kernels.gae(rewards, values, mask, *how, bounds, backend)
        for s, n in enumerate(lengths):
            own = slice(int(bounds[s]), int(bounds[s]) + n)
            alone = [t[:, own] for t in (rewards, values, mask)]
            for a, b in zip(found, torch.ops.kl_kernels.gae(*alone, *how, None, "reference")):
                torch.testing.assert_close(a[:, own], b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 4], [0, 5], [0, 3, 2, 4], [-1, 4], [0]])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bounds_beyond_the_tokens_are_refused(backend, bounds):
    tokens = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="cu_seqlens"):
        torch.ops.kl_kernels.gae(
            tokens, tokens, tokens > 0, 0.9, 0.8, True, torch.tensor(bounds), backend
        )


def test_no_wrong_bounds_lead_out_of_the_tokens():
    """Nobody looks at them on a GPU."""
    tokens = torch.ones(3, 4)  # the operator sees the second row
    args = (tokens[1:2], tokens[1:2], tokens[1:2] > 0, 0.9, 0.8, True)
    for bounds in ([5, 1, 9], [0, 99], [-7, 3, 2, 4], [4, 0]):
        for found in torch.ops.kl_kernels.gae(*args, torch.tensor(bounds), "triton"):
            assert found.isfinite().all()
