"""LigerFusedLinearGRPOLoss, beside Liger's own: values, metrics and gradients."""

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs
from liger_kernel.chunked_loss.fused_linear_ppo import _SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE

from kl_kernels.integrations.liger import LigerFusedLinearGRPOLoss as Ours

B, T, D = 4, 6, 8
V = _SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE + 37  # two chunks of theirs
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


HIDDEN, WEIGHT, BIAS = normal(B, T, D), normal(V, D), normal(V)
IDS = torch.randint(V, (B, T), generator=GENERATOR)
MASK = (torch.arange(T) < torch.tensor([[6], [3], [1], [5]])).long()
ADVANTAGES = torch.tensor([1.0, -0.7, 0.4, -2.0])
LOGPROBS = ((HIDDEN @ WEIGHT.T + BIAS).log_softmax(-1).gather(-1, IDS[..., None]))[..., 0]
OLD, REF = LOGPROBS + 0.4 * normal(B, T), LOGPROBS + 0.5 * normal(B, T)
RATIOS = normal(B, T).abs() + 0.1
REF_HEAD = {
    "ref_input": HIDDEN + 0.1 * normal(B, T, D),
    "ref_weight": WEIGHT + 0.1 * normal(V, D),
    "ref_bias": BIAS,
}


def results(module, given, dtype=torch.float32, frozen=False):
    """Loss, metrics and gradients of two calls, the second of hidden states further away."""
    found = []
    for scale in (1.0, 0.8):
        leaves = [t.to(dtype).clone() for t in (HIDDEN * scale, WEIGHT, BIAS)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        if frozen:
            leaves[1].requires_grad_(False)
        loss, metrics = module(*leaves[:2], IDS, MASK, ADVANTAGES, bias=leaves[2], **given)
        (3 * loss).backward()
        found += [loss.detach(), *metrics, *(x.grad for x in leaves if x.requires_grad)]
    return found


KINDS = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 9},
}
CALLS = {
    "first update": ({"beta": 0.0, "use_ref_model": False}, {}),
    "no reference": ({"use_ref_model": False}, {"old_per_token_logps": OLD}),
    "log-probabilities": ({"beta": 0.2}, {"old_per_token_logps": OLD, "ref_per_token_logps": REF}),
    "reference's head": ({"beta": 0.2, "temperature": 0.8}, REF_HEAD),
    "another engine": (
        {"use_ref_model": False, "epsilon_low": 0.1, "epsilon_high": 0.3},
        {"old_per_token_logps": OLD, "vllm_is_ratio": RATIOS},
    ),
    "ratio per answer": (
        {"use_ref_model": False},
        {"old_per_token_logps": OLD, "vllm_is_ratio": RATIOS[:, 0]},
    ),
    "two-sided": ({"use_ref_model": False, "delta": 1.4}, {"old_per_token_logps": OLD - 0.4}),
}


@pytest.mark.exercises("LigerFusedLinearGRPOLoss: loss, metrics and gradients")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_the_loss_is_theirs(kind, call):
    options, given = CALLS[call]
    options = KINDS[kind] | options
    theirs = results(Theirs(compiled=False, **options), given)
    ours = results(Ours(compiled=False, **options), given)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
    assert theirs[-1].abs().max() > 1e-3


@pytest.mark.exercises("LigerFusedLinearGRPOLoss: tokens of all micro-batches, a frozen layer")
@pytest.mark.parametrize("items", [41, torch.tensor(41)])
def test_items_in_batch_and_a_frozen_layer(items):
    given = {"old_per_token_logps": OLD, "num_items_in_batch": items}
    options = {"beta": 0.0, "use_ref_model": False, "compiled": False}
    theirs = results(Theirs(**options), given, frozen=True)
    ours = results(Ours(**options), given, frozen=True)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.exercises("LigerFusedLinearGRPOLoss: bfloat16")
def test_bfloat16():
    options, given = {"beta": 0.0, "use_ref_model": False, "compiled": False}, {}
    theirs = results(Theirs(**options), given, torch.bfloat16)
    ours = results(Ours(**options), given, torch.bfloat16)
    for one, other in zip(ours, theirs):
        largest = float(other.abs().max()) or 1.0
        torch.testing.assert_close(one, other, rtol=0.03, atol=0.03 * largest)


@pytest.mark.exercises("LigerFusedLinearGRPOLoss: the same constructor and call")
def test_the_signatures():
    import inspect

    for name in ("__init__", "forward"):
        theirs, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (Theirs, Ours))
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
