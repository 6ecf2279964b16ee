"""Offsets of packed sequences that are wrong, and what is not one for each sequence."""

import pytest
import torch

import kl_kernels

TOKENS = torch.zeros(5)
WRONG = [
    (ValueError, torch.tensor([1, 5]), "cu_seqlens begins with 1; it must begin with 0"),
    (ValueError, torch.tensor([0, 4]), r"cu_seqlens ends with 4; \w+ of shape \(5,\) needs 5"),
    (ValueError, torch.tensor([0, 6]), "cu_seqlens ends with 6"),
    (ValueError, torch.tensor([0, 4, 2, 5]), "cu_seqlens falls from 4 to 2 at index 2"),
    (ValueError, torch.tensor([0]), r"cu_seqlens has shape \(1,\), which is no sequence"),
    (ValueError, torch.tensor([[0, 5]]), r"cu_seqlens has shape \(1, 2\); it must be \[S \+ 1\]"),
    (ValueError, torch.tensor([], dtype=torch.int64), r"cu_seqlens has shape \(0,\)"),
    (ValueError, torch.tensor(5), r"cu_seqlens has shape \(\)"),
    (TypeError, torch.tensor([0.0, 5.0]), "cu_seqlens has dtype torch.float32; accepted: int64, i"),
    (TypeError, torch.tensor([0, 5], dtype=torch.int16), "cu_seqlens has dtype torch.int16"),
    (TypeError, [0, 5], "cu_seqlens is a list; it must be a torch.Tensor"),
    (ValueError, torch.tensor([0, 5], device="meta"), "cu_seqlens is on meta, .* on cpu"),
]
CALLS = {
    "compute_rewards": lambda x, cu: kl_kernels.compute_rewards(
        torch.zeros(1), x, torch.ones_like(x), 0.1, cu_seqlens=cu
    ),
    "compute_gae": lambda x, cu: kl_kernels.compute_gae(x, x, torch.ones_like(x), cu_seqlens=cu),
    "aggregate": lambda x, cu: kl_kernels.aggregate(x, torch.ones_like(x), cu_seqlens=cu),
    "ppo_policy_loss": lambda x, cu: kl_kernels.ppo_policy_loss(
        x, x, x, torch.ones_like(x), cu_seqlens=cu
    ),
    "ppo_value_loss": lambda x, cu: kl_kernels.ppo_value_loss(
        x, x, x, torch.ones_like(x), cu_seqlens=cu
    ),
    "importance_weights": lambda x, cu: kl_kernels.importance_weights(
        x, x, torch.ones_like(x), cu_seqlens=cu
    ),
    "global_denominator": lambda x, cu: kl_kernels.global_denominator(
        torch.ones_like(x), cu_seqlens=cu
    ),
    "length_normalized_scores": lambda x, cu: kl_kernels.length_normalized_scores(
        torch.zeros(1), torch.ones_like(x), cu_seqlens=cu
    ),
    "FixedKLController": lambda x, cu: kl_kernels.FixedKLController(0.1).update(
        x, 1, torch.ones_like(x), cu_seqlens=cu
    ),
    "KLMonitor": lambda x, cu: kl_kernels.KLMonitor().observe(
        1, kl=x, mask=torch.ones_like(x), cu_seqlens=cu
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_bounds_are_named(name):
    for error, cu_seqlens, message in WRONG:
        with pytest.raises(error, match=message):
            CALLS[name](TOKENS, cu_seqlens)
    with pytest.raises(
        ValueError, match=r"has shape \(2, 5\); with cu_seqlens .*\[N\] or \[1, N\]"
    ):
        CALLS[name](torch.zeros(2, 5), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"has shape \(5,\); it must be \[B, T\]"):
        CALLS[name](TOKENS, None)


def test_what_is_per_sequence_is_counted():
    cu_seqlens, mask = torch.tensor([0, 2, 5]), torch.ones(5)
    with pytest.raises(ValueError, match=r"scores has shape \(1,\); cu_seqlens .* needs \(2,\)"):
        kl_kernels.compute_rewards(torch.zeros(1), TOKENS, mask, 0.1, cu_seqlens=cu_seqlens)
    for index, most in ([2, 0], 1), ([0, 3], 2):
        with pytest.raises(ValueError, match=f"score_position holds .*to {most}$"):
            kl_kernels.compute_rewards(
                torch.zeros(2), TOKENS, mask, 0.1,
                score_position=torch.tensor(index), cu_seqlens=cu_seqlens,
            )  # fmt: skip
    with pytest.raises(ValueError, match="cu_seqlens is given, but kl is a single number"):
        kl_kernels.FixedKLController(0.1).update(0.5, 1, cu_seqlens=cu_seqlens)
