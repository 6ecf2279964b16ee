"""Every operator once on a few small inputs, for compute-sanitizer to watch.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
    python tests/gpu/small_cases.py --backend cuda

Without torch's cache every tensor is an allocation of its own, so that a read past its end shows.
All inputs are made on the CPU: the kernels that run are ours, and few of torch's.
"""

import argparse
import math

import torch

import kl_kernels
from kl_kernels.algebra.parts import local_token_ids
from kl_kernels.schemas import ESTIMATORS, NO_TOKEN

B, T = 2, 3
LONG = 1300  # tokens: several blocks of a scan, the last not full
# One logit; less than a tile; tiles and a tail, aligned and not; every stage of a row that goes
# to shared memory in stages; several splits of a row.
CASES = [
    (1, torch.float32),
    (301, torch.bfloat16),
    (2601, torch.float32),
    (4112, torch.bfloat16),
    (20011, torch.bfloat16),
    (70000, torch.bfloat16),
]
SOFTCAPPED = 301  # kernels of their own, which take their time to compile: once is enough


def run(backend, device, vocab_size, dtype):
    """Raise unless `backend` agrees with float64 on the CPU."""
    g = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(B, T, vocab_size, generator=g)
    ref_logits = 3 * torch.randn(B, T, vocab_size, generator=g)
    logits[0, 1, -1] = 200.0  # a late peak: the loop that can take anything
    logits[1, 1, : vocab_size // 2] = -math.inf
    ref_logits[1, 1, : vocab_size // 4] = -math.inf  # ruled out by both
    token_ids = torch.randint(vocab_size // 2, vocab_size, (B, T), generator=g)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards, values = torch.randn(2, B, T, generator=g)
    weights = torch.randn(4, B, T, generator=g)
    tensors = [logits.to(dtype), ref_logits.to(dtype), token_ids, torch.ones(B), mask]
    extra = [weights, rewards, values]
    got = evaluate(backend, [t.to(device) for t in tensors], [t.to(device) for t in extra])
    expected = evaluate("reference", tensors, extra)
    if vocab_size == 1:  # once, for it needs no vocabulary
        got |= long_advantages(backend, device)
        expected |= long_advantages("reference", "cpu")
    for name, value in got.items():
        value = value.cpu()
        if not close(value, expected[name]):
            error = float((value - expected[name]).abs().max())
            raise RuntimeError(f"{backend}, V = {vocab_size}: {name} is off by up to {error}")


def close(value, expected):
    """Elementwise, also of a gradient whose elements are as small as probabilities."""
    rtol = 2**-7 if value.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return torch.allclose(value.double(), expected.double(), atol=1e-5, rtol=rtol)


def evaluate(backend, tensors, extra):
    logits, ref_logits, token_ids, scores, mask = tensors
    weights, rewards, values = extra
    x = logits.detach().requires_grad_()
    shaped = kl_kernels.kl_rewards(
        logits,
        ref_logits,
        token_ids,
        scores,
        mask,
        kl_coef=0.1,
        kl_estimator="exact",
        kl_clip=5.0,
        backend=backend,
    )
    found = {f"kl_rewards.{name}": value for name, value in shaped._asdict().items()}
    advantages = torch.ops.kl_kernels.gae(rewards, values, mask, 0.99, 0.95, True, None, backend)
    found |= {"advantages": advantages[0], "returns": advantages[1]}
    if logits.shape[-1] == SOFTCAPPED:
        found |= estimates(backend, *tensors)
    found |= in_parts(backend, logits, ref_logits, token_ids, mask)
    # A softcap that bends most logits: of a wide one, the small terms of tanh show in no float32.
    capped = {"softcap": 5.0, "temperature": 0.8}
    ids = torch.arange(min(5, logits.shape[-1]), device=logits.device).expand(*mask.shape, -1)
    ref_logprobs = ref_logits.double().log_softmax(-1).gather(-1, ids).float()
    for options in ({}, capped) if logits.shape[-1] == SOFTCAPPED else ({},):
        pair = kl_kernels.token_kl(
            x, ref_logits, token_ids, mask=mask, backend=backend, **options
        )._asdict()
        stats = kl_kernels.token_stats(
            x, token_ids, mask=mask, backend=backend, **options
        )._asdict()
        label = "capped " if options else ""
        found |= {f"{label}token_kl.{name}": value.detach() for name, value in pair.items()}
        found |= {f"{label}token_stats.{name}": value.detach() for name, value in stats.items()}
        others = {
            "jsd": kl_kernels.token_jsd(
                x, ref_logits, beta=0.3, mask=mask, backend=backend, **options
            ),
            "topk_kl": kl_kernels.topk_kl(
                x, ids, ref_logprobs, beta=0.3, mask=mask, backend=backend, **options
            ),
            "selected": kl_kernels.selective_log_softmax(x, ids, row_mask=mask, backend=backend),
        }
        found |= {f"{label}{name}": value.detach() for name, value in others.items()}
        found |= {
            f"{label}d {name}": torch.autograd.grad(value, x, torch.ones_like(value))[0]
            for name, value in others.items()
        }
        del pair["ref_logprob"]
        for inplace_backward in (False, True):
            y = x.detach().clone().requires_grad_()
            loss, metrics = kl_kernels.fused_policy_loss(
                y, token_ids, rewards - 3.0, values, mask, ref_logits=ref_logits,
                kl_loss_coef=0.1, entropy_coef=0.1, dual_clip=1.5, denominator=1.0,
                inplace_backward=inplace_backward, backend=backend, **options,
            )  # fmt: skip
            (grad,) = torch.autograd.grad(2.0 * loss, y)
            found |= {f"{label}policy_loss.{name}": value for name, value in metrics.items()}
            found[f"{label}d policy_loss, in place: {inplace_backward}"] = grad
        grads = {"token_kl": pair, "token_stats": stats}
        for operator, outputs in grads.items():
            upstream = list(weights[: len(outputs)])
            (grad,) = torch.autograd.grad(list(outputs.values()), x, upstream)
            found[f"{label}d {operator}"] = grad
    return found


def long_advantages(backend, device):
    """GAE of sequences longer than a block, with holes and of two lengths."""
    g = torch.Generator().manual_seed(LONG)
    rewards, values = torch.randn(2, B, LONG, generator=g).to(device)
    mask = (torch.rand(B, LONG, generator=g) < 0.9).to(device)
    mask[1, LONG // 2 :] = False
    args = rewards, values, mask, 0.99, 0.95, True, None, backend
    advantages, returns = torch.ops.kl_kernels.gae(*args)
    return {"long advantages": advantages, "long returns": returns}


def estimates(backend, logits, ref_logits, token_ids, scores, mask):
    """Rewards by every estimate of the KL, of models near each other and not."""
    found = {}
    for estimator in ESTIMATORS:
        for label, other in {"": ref_logits, "near ": logits + 0.01 * ref_logits}.items():
            shaped = kl_kernels.kl_rewards(
                logits, other, token_ids, scores, mask,
                kl_coef=0.1, kl_estimator=estimator, biased=True, backend=backend,
            )  # fmt: skip
            found[f"{label}rewards by {estimator}"] = shaped.rewards
    return found


def in_parts(backend, logits, ref_logits, token_ids, mask):
    """The statistics, merged from halves, and from a few tokens and all others."""
    ops, size = torch.ops.kl_kernels, logits.shape[-1]
    few = min(5, size)

    def part(start, end, ref_logits):
        ids = local_token_ids(token_ids, start, end - start)
        other = None if ref_logits is None else ref_logits[..., start:end]
        options = 1.0, 1.0, None, None, backend
        return ops.fold_part(logits[..., start:end], other, ids, mask, *options)

    ids = torch.arange(few, device=logits.device).expand(*mask.shape, -1).contiguous()
    elsewhere = token_ids.masked_fill(token_ids < few, NO_TOKEN)
    tail = ops.fold_tail(logits, elsewhere, ids, mask, 1.0, None, backend)
    states = {"few": [part(0, few, None), tail]}
    if size > 1:
        states["halves"] = [part(0, size // 2, ref_logits), part(size // 2, size, ref_logits)]
    names = "logprob", "ref_logprob", "kl", "forward_kl", "entropy"
    return {
        f"{label}.{name}": value
        for label, of in states.items()
        for name, value in zip(names, ops.finish_parts(torch.stack(of), None, mask, backend))
        if label == "halves" or name in ("logprob", "entropy")
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    backend = parser.parse_args().backend
    for vocab_size, dtype in CASES:
        run(backend, "cpu" if backend == "cpu" else "cuda", vocab_size, dtype)
        print(f"{backend}: V = {vocab_size}, {dtype}: right", flush=True)


if __name__ == "__main__":
    main()
