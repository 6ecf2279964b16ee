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

B, T = 2, 3
# One logit; less than a tile; tiles and a tail, aligned and not; several splits of a row.
CASES = [
    (1, torch.float32),
    (301, torch.bfloat16),
    (2601, torch.float32),
    (4112, torch.bfloat16),
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
    token_ids = torch.randint(vocab_size // 2, vocab_size, (B, T), generator=g)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards, values = torch.randn(2, B, T, generator=g)
    weights = torch.randn(4, B, T, generator=g)
    tensors = [logits.to(dtype), ref_logits.to(dtype), token_ids, torch.ones(B), mask]
    extra = [weights, rewards, values]
    got = evaluate(backend, [t.to(device) for t in tensors], [t.to(device) for t in extra])
    expected = evaluate("reference", tensors, extra)
    for name, value in got.items():
        atol = 1e-5 if value.dtype == torch.float32 else 0.03
        value = value.cpu()
        if not torch.allclose(value, expected[name], atol=atol, rtol=atol):
            error = float((value - expected[name]).abs().max())
            raise RuntimeError(f"{backend}, V = {vocab_size}: {name} is off by up to {error}")


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
    capped = {"softcap": 30.0, "temperature": 0.8}
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    backend = parser.parse_args().backend
    for vocab_size, dtype in CASES:
        run(backend, "cpu" if backend == "cpu" else "cuda", vocab_size, dtype)
        print(f"{backend}: V = {vocab_size}, {dtype}: right", flush=True)


if __name__ == "__main__":
    main()
