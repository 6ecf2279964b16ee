"""The code of docs/how-to/megatron.md, run by two tensor-parallel ranks of two replicas each."""

import pytest
import torch
import torch.distributed as dist
from pages import blocks_of
from tiny_lm import policy_and_reference
from torch.distributed.device_mesh import init_device_mesh

import kl_kernels

B, PROMPT, T, V = 8, 3, 5, 19
PADDED = {"the last": 22, "a whole rank": 40}  # columns, over two ranks
BEFORE = slice(PROMPT - 1, -1)
FROM_LOGITS, LOSS, FROM_HIDDEN, LOSS_FROM_HIDDEN = blocks_of("how-to/megatron.md")


class AllReduceInBackward(torch.autograd.Function):
    """The gradient of a column-parallel layer's input: each rank has that of its own columns."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def batch():
    torch.manual_seed(1)
    ids = torch.randint(V, (B, PROMPT + T))
    lengths = torch.randint(0, T + 1, (B,))
    return {
        "ids": ids,
        "token_ids": ids[:, PROMPT:],
        "mask": torch.arange(T) < lengths[:, None],
        "advantages": torch.randn(B, 1).expand(B, T).double(),
        "old_logprobs": -3 + 0.1 * torch.randn(B, T).double(),
    }


def padded_rows(lm, columns, rank):
    """This rank's rows of the output layer, of which the padding is no zeros."""
    weight = torch.nn.functional.pad(lm.lm_head.weight.detach(), (0, 0, 0, columns - V), value=3.0)
    return weight.chunk(2)[rank].clone()


def by_ranks(group, padding, way):
    """The gradients of the body and, of this rank's rows, of the output layer; averaged."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data, tensor = mesh["data"].get_group(), mesh["tensor"].get_group()
    policy, reference = policy_and_reference(vocab_size=V, bias=False)
    columns, rank = PADDED[padding], dist.get_rank(tensor)
    weight = padded_rows(policy, columns, rank).requires_grad_()
    ref_weight = padded_rows(reference, columns, rank)
    own = torch.arange(B).chunk(2)[dist.get_rank(data)]
    given = {name: x[own] for name, x in batch().items()}
    hidden = policy.model(given["ids"]).last_hidden_state[:, BEFORE]
    ref_hidden = reference.model(given["ids"]).last_hidden_state[:, BEFORE]
    names = given | {
        "torch": torch,
        "kl_kernels": kl_kernels,
        "group": tensor,
        "data_parallel_group": data,
        "vocab_size": V,
        "beta": 0.3,
    }
    if way != "logits":
        names |= {"hidden": hidden, "weight": weight}
        names |= {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
        exec(FROM_HIDDEN, names)
    else:
        logits = AllReduceInBackward.apply(hidden, tensor) @ weight.T
        names |= {"logits": logits, "ref_logits": ref_hidden @ ref_weight.T}
        exec(FROM_LOGITS, names)
    exec(LOSS_FROM_HIDDEN if way == "loss" else LOSS, names)
    gradients = [w.grad for w in (*policy.model.parameters(), weight)]
    for gradient in gradients:  # as Megatron's DDP
        dist.all_reduce(gradient, group=data)
        gradient /= 2
    return rank, gradients


def by_one_process():
    policy, reference = policy_and_reference(vocab_size=V, bias=False)
    given = batch()
    logits, ref_logits = (lm(given["ids"]).logits[:, BEFORE] for lm in (policy, reference))
    out = kl_kernels.token_kl(logits, ref_logits, given["token_ids"], mask=given["mask"])
    names = {"kl_kernels": kl_kernels, "beta": 0.3, "data_parallel_group": None, "out": out}
    exec(LOSS, given | names)
    return [weight.grad for weight in (*policy.model.parameters(), policy.lm_head.weight)]


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("way", ["logits", "hidden", "loss"])
def test_the_page_gives_each_rank_the_gradient_of_one_process(ranks, way, padding):
    *of_body, of_weight = by_one_process()
    of_weight = torch.nn.functional.pad(of_weight, (0, 0, 0, PADDED[padding] - V)).chunk(2)
    for rank, found in ranks(by_ranks, padding, way, n=4):
        expected = [*of_body, of_weight[rank]]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
