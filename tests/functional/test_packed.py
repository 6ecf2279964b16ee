"""Functions of logits and hidden states on packed sequences, against the padded form."""

import pytest
import torch
from hypothesis import given, settings
from packed import PACKS, Pack

import kl_kernels
from kl_kernels.rl.losses import AGGREGATIONS

V, D = 7, 3
FEW = settings(max_examples=15, deadline=None)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def both_forms(pack, function, leaves, per_token, **options):
    """The result and gradients of the packed, and of the padded form."""
    results = []
    for form, how in ((lambda x: x, {"cu_seqlens": pack.cu_seqlens}), (pack.padded, {})):
        taken = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
        in_form = {n: form(x) if n in ROWS else x for n, x in {**taken, **per_token}.items()}
        result = function(**in_form, **options, **how)
        outputs = list(result) if isinstance(result, kl_kernels.KLRewards) else [result[0]]
        total = sum(pack.padded(x).sum() if how and x.ndim else x.sum() for x in outputs)
        results.append((result, torch.autograd.grad(total, list(taken.values()))))
    (found, grads), (expected, expected_grads) = results
    close(grads, expected_grads)
    return found, expected


ROWS = {
    *("logits", "ref_logits", "hidden", "ref_hidden", "token_ids", "mask", "old_logprobs"),
    *("advantages", "weights", "ref_logprobs"),
}


@pytest.mark.parametrize("kl_estimator", ["k1", "exact"])
@FEW
@given(PACKS)
def test_rewards_of_logits(kl_estimator, pack):
    mask = pack.mask()
    given_rows = {"ref_logits": pack.normal(V), "token_ids": pack.ids(V), "mask": mask}
    found, padded = both_forms(
        pack, kl_kernels.kl_rewards, {"logits": pack.normal(V)}, given_rows,
        scores=pack.scores(), kl_coef=0.25, kl_estimator=kl_estimator, score_clip=1.0,
    )  # fmt: skip
    for one, other in zip(found, padded):
        assert one.shape == mask.shape
        close(one, pack.packed(other))


LOSSES = {
    "fused_policy_loss": lambda pack: (
        {"logits": pack.normal(V)},
        {"ref_logits": pack.normal(V)},
    ),
    "linear_policy_loss": lambda pack: (
        {"hidden": pack.normal(D), "weight": torch.randn(V, D, dtype=torch.float64)},
        {"ref_hidden": pack.normal(D), "ref_weight": torch.randn(V, D, dtype=torch.float64)},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@FEW
@given(PACKS)
def test_policy_losses(aggregation, name, pack):
    leaves, reference = LOSSES[name](pack)
    per_token = {
        **reference,
        "token_ids": pack.ids(V),
        "old_logprobs": -pack.normal().abs(),
        "advantages": pack.normal(),
        "weights": pack.normal().abs(),
        "mask": pack.mask(),
    }
    options = {"aggregation": aggregation, "kl_loss_coef": 0.5, "entropy_coef": 0.1}
    for kl_estimator in ("exact", "k3"):
        found, padded = both_forms(
            pack, getattr(kl_kernels, name), leaves, per_token, kl_estimator=kl_estimator, **options
        )
        close(found, padded)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_every_backend_takes_packs(backend):
    pack = Pack([3, 0, 2])
    rows = pack.normal(V).float().requires_grad_()
    ids, mask, old = pack.ids(V), pack.mask(1.0), -pack.normal().abs().float()
    how = {"cu_seqlens": pack.cu_seqlens, "backend": backend}
    shaped = kl_kernels.kl_rewards(
        rows, rows.detach(), ids, pack.scores(), mask, kl_coef=0.1, **how
    )
    advantages, _ = kl_kernels.compute_gae(shaped.rewards, old, mask, **how)
    mean = {"aggregation": "seq-mean-token-mean", **how}
    loss, _ = kl_kernels.fused_policy_loss(rows, ids, old, advantages, mask, **mean)
    expected, _ = kl_kernels.fused_policy_loss(
        *map(pack.padded, (rows, ids, old, advantages, mask)),
        aggregation="seq-mean-token-mean", backend="reference",
    )  # fmt: skip
    grads = [torch.autograd.grad(of, rows)[0] for of in (loss, expected)]
    torch.testing.assert_close((loss, grads[0]), (expected, grads[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, V), (1, 5, V)])
def test_a_gradient_goes_over_packed_logits(shape):
    pack = Pack([3, 2], as_row=len(shape) == 3)
    start = pack.normal(V).float()
    rest = pack.ids(V), None, pack.normal().float(), pack.mask(1.0)
    grads = []
    for inplace_backward in (True, False):
        leaf = start.clone().requires_grad_()
        logits = leaf * 1
        loss, _ = kl_kernels.fused_policy_loss(
            logits, *rest, cu_seqlens=pack.cu_seqlens, inplace_backward=inplace_backward
        )
        assert torch.equal(logits, start) != inplace_backward
        grads.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*grads)
    with torch.no_grad():
        leaf = start.clone()
        kl_kernels.fused_policy_loss(leaf, *rest, cu_seqlens=pack.cu_seqlens, inplace_backward=True)
        assert torch.equal(leaf, start)


@pytest.mark.parametrize("name", ["kl_rewards", *LOSSES])
def test_shapes_are_named(name):
    pack = Pack([3, 2])
    rows = {"kl_rewards": {"logits": pack.normal(V), "ref_logits": pack.normal(V)}}
    leaves = rows[name] if name in rows else LOSSES[name](pack)[0]
    rest = {"token_ids": pack.ids(V), "mask": pack.mask()}
    if name == "kl_rewards":
        rest |= {"scores": pack.scores(), "kl_coef": 0.1}
    else:
        rest |= {"old_logprobs": None, "advantages": pack.normal()}
    function = getattr(kl_kernels, name)
    with pytest.raises(ValueError, match=r" has shape \(5, \d\); it must be \[B, T, "):
        function(**leaves, **rest)
    with pytest.raises(ValueError, match="cu_seqlens ends with 4; mask of shape"):
        function(**leaves, **rest, cu_seqlens=torch.tensor([0, 4]))
    doubled = {n: x if n == "weight" else x.expand(2, *x.shape) for n, x in leaves.items()}
    rest = {
        n: x.expand(2, *x.shape) if isinstance(x, torch.Tensor) and n != "scores" else x
        for n, x in rest.items()
    }
    with pytest.raises(ValueError, match=r"with cu_seqlens it must be \[N\] or \[1, N\]"):
        function(**doubled, **rest, cu_seqlens=pack.cu_seqlens)
