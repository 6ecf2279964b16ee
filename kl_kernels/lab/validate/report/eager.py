"""The code of a trainer without a fused kernel, with torch's own gradients.

Upcast, as TRL and verl do: `logits.float()` and a log-softmax of it. In the dtype: a log-softmax of
the logits as they come, and all that follows in their dtype. In float32 the two are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kl_kernels.lab.validate.cases import Inputs
from kl_kernels.lab.validate.truth import BETA


def upcast_eager(inputs: Inputs) -> dict[str, Tensor]:
    return _eager(inputs, torch.float32)


def dtype_eager(inputs: Inputs) -> dict[str, Tensor]:
    return _eager(inputs, inputs.logits.dtype)


def _eager(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs [B, T], and gradients [B, T, V] of each output's sum ("d ...")."""
    logits = inputs.logits.detach().requires_grad_()
    token = inputs.token_ids[..., None]
    log_p = (logits.to(dtype) / inputs.temperature).log_softmax(-1)
    log_q = (inputs.ref_logits.to(dtype) / inputs.temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.stack([log_p + math.log(1 - BETA), log_q + math.log(BETA)]).logsumexp(0)
    found = {
        "logprob": log_p.gather(-1, token).squeeze(-1),
        "ref_logprob": log_q.gather(-1, token).squeeze(-1),
        "kl": (p * (log_p - log_q)).sum(-1),
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "entropy": -(p * log_p).sum(-1),
        "jsd": BETA * (q * (log_q - log_m)).sum(-1) + (1 - BETA) * (p * (log_p - log_m)).sum(-1),
    }

    def grad(*names: str) -> Tensor:
        total = torch.stack([found[name].float().sum() for name in names]).sum()
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    grads = {f"d {name}": grad(name) for name in ("logprob", "kl", "forward_kl", "entropy", "jsd")}
    return (
        {name: value.detach() for name, value in found.items()}
        | grads
        | {
            "stats logprob": found["logprob"].detach(),
            "stats entropy": found["entropy"].detach(),
            "d stats": grad("logprob", "entropy"),
        }
    )
