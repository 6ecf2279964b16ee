"""The code of docs/how-to/fsdp2.md, run by ranks, trains as one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from pages import blocks_of
from tiny_lm import policy_and_reference
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import kl_kernels

B, PROMPT, T, V, N_RANKS, STEPS = 8, 3, 5, 22, 4, 2  # 22 rows of weight over 4 ranks: 6, 6, 6, 4
BEFORE = slice(PROMPT - 1, -1)
MESHES = {"fsdp": (N_RANKS,), "hsdp": (2, 2)}


def batch(step):
    """In the second step a rank has no tokens."""
    torch.manual_seed(1 + step)
    ids = torch.randint(V, (B, PROMPT + T))
    lengths = torch.randint(1, T + 1, (B,))
    lengths[:2] = 1 - step
    return {
        "ids": ids,
        "token_ids": ids[:, PROMPT:],
        "mask": torch.arange(T) < lengths[:, None],
        "advantages": torch.randn(B, 1).expand(B, T).double(),
        "old_logprobs": -3 + 0.1 * torch.randn(B, T).double(),
    }


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def mesh_named(name):
    shape = MESHES[name]
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])


SHARD, CALL, LOSS, WHOLE_LOSS, SHARD_WITH_METHOD, CALL_METHOD = blocks_of("how-to/fsdp2.md")


def rows_of_rank(given):
    own = torch.arange(B).chunk(N_RANKS)[dist.get_rank()]
    return {name: x[own] for name, x in given.items()}


def names_of(policy, reference):
    return {
        "torch": torch,
        "kl_kernels": kl_kernels,
        "policy": policy,
        "reference": reference,
        "before": BEFORE,
        "beta": 0.3,
    }


def by_ranks(group, way, mesh):
    """The gradients of each step and the weights at the end."""
    policy, reference = policy_and_reference(vocab_size=V, bias=False)
    names = names_of(policy, reference) | {"mesh": mesh_named(mesh)}
    if mesh == "hsdp":  # the reference may be sharded as well
        fully_shard(reference.model, mesh=names["mesh"])
        fully_shard(reference.lm_head, mesh=names["mesh"])
    exec(SHARD_WITH_METHOD if way == "method" else SHARD, names)
    gradients = []
    for step in range(STEPS):
        given = names | rows_of_rank(batch(step))
        exec(CALL_METHOD if way == "method" else CALL, given)
        exec(WHOLE_LOSS if way == "loss" else LOSS, given)
        gradients.append([whole(weight.grad) for weight in policy.parameters()])
    return gradients, [whole(weight).detach() for weight in policy.parameters()]


def by_one_process():
    """The same, from logits."""
    policy, reference = policy_and_reference(vocab_size=V, bias=False)
    names = names_of(policy, reference)
    names["optimizer"] = torch.optim.SGD(policy.parameters(), lr=0.1)
    gradients = []
    for step in range(STEPS):
        given = names | batch(step)
        logits, ref_logits = (lm(given["ids"]).logits[:, BEFORE] for lm in (policy, reference))
        out = kl_kernels.token_kl(logits, ref_logits, given["token_ids"], mask=given["mask"])
        exec(LOSS, given | {"out": out})
        gradients.append([weight.grad.clone() for weight in policy.parameters()])
    return gradients, [weight.detach() for weight in policy.parameters()]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("way", ["parameter", "loss", "method"])
def test_the_page_trains_as_one_process_on_the_whole_batch(ranks, way, mesh):
    expected = by_one_process()
    for found in ranks(by_ranks, way, mesh, n=N_RANKS):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def sharded_head(group, bias):
    policy, _ = policy_and_reference(vocab_size=V, bias=bias)
    fully_shard(policy.model, mesh=mesh_named("fsdp"))
    fully_shard(policy.lm_head, mesh=mesh_named("fsdp"))
    return policy


def scored(policy, weight, bias=None, rows_of=rows_of_rank):
    """The log-probabilities of a rank's tokens, summed."""
    given = rows_of(batch(0))
    hidden = policy.model(given["ids"]).last_hidden_state[:, BEFORE]
    return kl_kernels.linear_token_stats(
        hidden, weight, given["token_ids"], bias=bias
    ).logprob.sum()


def scored_alone(policy):
    """The same of all ranks' tokens, by torch, over the number of ranks."""
    given = batch(0)
    logprobs = policy(given["ids"]).logits[:, BEFORE].log_softmax(-1)
    return logprobs.gather(-1, given["token_ids"][..., None]).sum() / N_RANKS


def gradients_of(policy, alone):
    return [
        (whole(weight.grad), expected.grad)
        for weight, expected in zip(policy.parameters(), alone.parameters())
    ]


def of_head(group, dtype):
    policy, (alone, _) = sharded_head(group, bias=True), policy_and_reference(vocab_size=V)
    head = policy.lm_head
    scored(policy, head.weight.to(dtype), head.bias).backward()
    assert head.weight.grad.placements == head.weight.placements
    scored_alone(alone).backward()
    return gradients_of(head, alone.lm_head)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.bfloat16, 0.02)])
def test_the_gradients_of_weight_and_bias_are_the_means_over_the_ranks(ranks, dtype, rtol):
    for pairs in ranks(of_head, dtype, n=N_RANKS):
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def frozen(group):
    policy = sharded_head(group, bias=False)
    policy.lm_head.requires_grad_(False)
    scored(policy, policy.lm_head.weight).backward()
    return policy.lm_head.weight.grad, policy.model.norm.weight.grad is not None


def test_a_frozen_head_gets_no_gradient(ranks):
    assert ranks(frozen, n=N_RANKS) == [(None, True)] * N_RANKS


def with_full_tensor(group, grad_placements, needs_grad):
    policy = sharded_head(group, bias=False)
    policy.lm_head.requires_grad_(needs_grad)
    weight = policy.lm_head.weight.full_tensor(grad_placements=grad_placements)
    return scored(policy, weight).isfinite().item()


def test_a_full_tensor_whose_gradient_would_not_be_reduced_is_refused(ranks):
    with pytest.raises(ValueError, match=r"weight is the full_tensor.* pass the DTensor itself"):
        ranks(with_full_tensor, None, True, n=N_RANKS)
    assert all(ranks(with_full_tensor, [Partial()], True, n=N_RANKS))
    assert all(ranks(with_full_tensor, None, False, n=N_RANKS))


def after_unshard(group):
    policy = sharded_head(group, bias=False)
    policy.lm_head.unshard()
    scored(policy, policy.lm_head.weight).backward()
    of_this_rank = policy.lm_head.weight.grad
    policy.lm_head.reshard()
    return of_this_rank, policy.lm_head.weight.grad


def test_unshard_leaves_a_gradient_of_one_rank_that_reshard_drops(ranks):
    """The page warns of this. If this test fails, FSDP2 has mended it, and the page must say so."""
    (one, dropped), (other, _), *_ = ranks(after_unshard, n=N_RANKS)
    assert not torch.allclose(one, other)
    assert dropped is None


class Tied(torch.nn.Module):
    """A model whose output layer is tied to the embedding, as in transformers."""

    def __init__(self):
        super().__init__()
        self.lm, _ = policy_and_reference(vocab_size=V, bias=False)
        self.lm.lm_head.weight = self.lm.model.embed_tokens.weight

    def score(self, given):
        hidden = self.lm.model(given["ids"]).last_hidden_state[:, BEFORE]
        ids = given["token_ids"]
        return kl_kernels.linear_token_stats(hidden, self.lm.lm_head.weight, ids).logprob.sum()


def tied(group):
    alone, model = Tied(), Tied()
    (alone.score(batch(0)) / N_RANKS).backward()
    fully_shard(model, mesh=mesh_named("fsdp"))
    register_fsdp_forward_method(model, "score")
    model.score(rows_of_rank(batch(0))).backward()
    return gradients_of(model, alone)


def test_a_registered_method_reduces_what_tied_embeddings_share(ranks):
    for pairs in ranks(tied, n=N_RANKS):
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def with_tensor_parallelism(group):
    """Two ranks share their tokens and the head's rows, and FSDP2 shards the rest over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    (policy, _), (alone, _) = (policy_and_reference(vocab_size=V, bias=False) for _ in range(2))
    parallelize_module(policy.lm_head, mesh["tensor"], ColwiseParallel())
    fully_shard(policy.model, mesh=mesh["data"])
    fully_shard(policy.lm_head, mesh=mesh["data"])
    own = torch.arange(B).chunk(2)[mesh["data"].get_local_rank()]
    rows_of = lambda given: {name: x[own] for name, x in given.items()}  # noqa: E731
    scored(policy, policy.lm_head.weight, rows_of=rows_of).backward()
    (scored_alone(alone) * N_RANKS / 2).backward()
    return gradients_of(policy, alone)


def test_a_mesh_that_tensor_parallelism_shares_does_as_well(ranks):
    for pairs in ranks(with_tensor_parallelism, n=N_RANKS):
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
