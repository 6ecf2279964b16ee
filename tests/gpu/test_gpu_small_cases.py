"""Every operator on a few small inputs, whatever its launches: against float64, and bit by bit."""

import math

import pytest
import small_cases
import torch

N = 6
# A row's numbers, but for those that depend on the rest of its sequence.
OF_SEQUENCES = {
    "kl_rewards.rewards",
    "kl_rewards.advantage_correction",
    "kl_rewards.returns",
    "advantages",
    "returns",
}
SIZES = [(2601, torch.float32), (4112, torch.bfloat16)]


@pytest.mark.parametrize(("size", "dtype"), small_cases.CASES)
def test_every_operator_is_true(backend, device, size, dtype):
    small_cases.run(backend, device, size, dtype)


class Rows:
    """Six rows, three of which make kernels start again, with the loop that can take anything."""

    def __init__(self, vocab_size, dtype, device):
        g = torch.Generator().manual_seed(vocab_size)
        logits, ref_logits = 3 * torch.randn(2, N, vocab_size, generator=g)
        logits[1, -1] = 200.0
        ref_logits[2, -1] = 180.0
        logits[3, : vocab_size // 2] = -math.inf
        logits[4] *= 10
        self.logits, self.ref_logits = (x.to(device, dtype) for x in (logits, ref_logits))
        self.token_ids = torch.randint(vocab_size // 2, vocab_size, (N,), generator=g).to(device)
        self.weights, self.others = torch.randn(2, 4, N, generator=g).to(device)

    def evaluate(self, backend, places, shape, counts=None):
        """Every result of the rows at `places`, laid out as `shape`; only some of them count."""
        mask = torch.ones(N, dtype=torch.bool) if counts is None else counts
        mask = mask[places].view(shape).to(self.logits.device)
        hole = ~mask[..., None]
        logits, ref_logits = (
            x[places].view(*shape, -1).masked_fill(hole, torch.nan)
            for x in (self.logits, self.ref_logits)
        )
        token_ids = self.token_ids[places].view(shape)
        scores = torch.ones(shape[0], device=mask.device)
        weights, others = (x[:, places].view(4, *shape) for x in (self.weights, self.others))
        tensors = logits, ref_logits, token_ids, scores, mask
        found = small_cases.evaluate(backend, tensors, (weights, others[0], others[1]))
        return {
            name: value.flatten(0, 1)
            for name, value in found.items()
            if value.shape[:2] == shape and name not in OF_SEQUENCES
        }


@pytest.mark.parametrize(("size", "dtype"), SIZES)
def test_a_rows_bits_do_not_depend_on_other_rows(backend, device, size, dtype):
    rows = Rows(size, dtype, device)
    expected = rows.evaluate(backend, list(range(N)), (2, 3))
    assert len(expected) > 20
    assert not any(value.isnan().any() for value in expected.values())
    some = torch.tensor([True, False, True, False, False, True])
    arrangements = {
        "in another order": ([5, 2, 0, 4, 1, 3], (3, 2), None),
        "in a batch of its own": ([1], (1, 1), None),
        "among other rows": ([3, 3, 2, 0], (4, 1), None),
        "among masked rows": (list(range(N)), (2, 3), some),
        "among masked rows, the others": (list(range(N)), (2, 3), ~some),
    }
    for label, (places, shape, counts) in arrangements.items():
        found = rows.evaluate(backend, places, shape, counts)
        for name, value in found.items():
            for i, place in enumerate(places):
                if counts is None or counts[place]:
                    assert torch.equal(value[i], expected[name][place]), (label, name, place)
                else:
                    assert not value[i].any(), (label, name, place)
