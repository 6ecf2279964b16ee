"""Operators of the Triton backend that write a gradient: `write(x, y, token_ids, grad)`."""

import torch
from operators import arguments

from kl_kernels.backends import triton as triton_kernels
from kl_kernels.schemas import (
    ESTIMATORS,
    PolicyLossArgs,
    TokenKLArgs,
    TokenKLBackwardArgs,
    TokenStatsArgs,
)

V = 328
SMALL = {
    "lanes": 16,
    "steps": 1,
    "unaligned_steps": 4,
    "fold_split": 256,
    "backward_split": 128,
    "policy_loss_lanes": 16,
    "scale_programs": 5,
}
TILE = 64  # float32 logits
LAYOUTS = [(V, torch.float32), (V, torch.bfloat16), (V - 27, torch.float32)]
MASK = torch.tensor([[True, False, True], [True, True, True]])


def draw(vocab_size=V, dtype=torch.float32):
    """Logits, reference logits and tokens in the first tile, between, and in the last; NaN rows
    under the mask.
    """
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = (3 * torch.randn(2, 3, vocab_size, generator=g) for _ in range(2))
    token_ids = torch.tensor([[1, 2, 130], [TILE + 3, 255, vocab_size - 1]])
    # Likely tokens: their own gradient is far from their neighbours'.
    logits.scatter_(-1, token_ids[..., None], 8.0)
    logits[~MASK], ref_logits[~MASK] = torch.nan, torch.nan
    return logits.to(dtype), ref_logits.to(dtype), token_ids


def token_stats(x, token_ids):
    return triton_kernels.token_stats(TokenStatsArgs(x, token_ids, MASK, 0.9, None))


def stats_backward(x, y, token_ids, grad):
    out = token_stats(x, token_ids)
    one = torch.ones_like(out.entropy)
    args = arguments(
        "token_stats_backward",
        grad_logprob=one,
        grad_entropy=one,
        logits=x,
        token_ids=token_ids,
        mask=MASK,
        policy_state=out.policy_state,
        entropy=out.entropy,
        temperature=0.9,
        grad_logits=grad,
    )
    triton_kernels.token_stats_backward(args)


def kl_backward(x, y, token_ids, grad):
    args = TokenKLArgs(x, y, token_ids, MASK, 0.9, 1.1, 30.0, None)
    out = triton_kernels.token_kl(args)
    one = torch.ones_like(out.kl)
    backward = TokenKLBackwardArgs(
        grad_logprob=one,
        grad_kl=one,
        grad_forward_kl=one,
        grad_entropy=one,
        policy_state=out.policy_state,
        ref_state=out.ref_state,
        kl=out.kl,
        entropy=out.entropy,
        part=False,
        grad_logits=grad,
        **args._asdict(),
    )
    triton_kernels.token_kl_backward(backward)


def policy_loss(x, y, token_ids, grad, backend=triton_kernels, **changed):
    """The operator, by names; the ratio is anything but clipped unless `changed` says so."""
    ones = torch.ones(token_ids.shape)
    given = {
        "logits": x, "grad_logits": grad, "ref_logits": y, "token_ids": token_ids, "mask": MASK,
        "old_logprobs": None, "advantages": ones, "token_weights": ones / 6,
        "importance_weights": None, "ref_logprobs": None, "own_gradient": None,
        "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "log_ratio_clamp": 20.0,
        "kl_coef": 0.1, "kl_estimator": ESTIMATORS.index("exact"), "entropy_coef": 0.01,
        "temperature": 0.9, "ref_temperature": 1.1, "softcap": None, "ref_softcap": 30.0,
    }  # fmt: skip
    return backend.policy_loss(PolicyLossArgs(**{**given, **changed}))


def policy_loss_alone(x, y, token_ids, grad):
    policy_loss(x, None, token_ids, grad, kl_coef=0.0)


WRITERS = [stats_backward, kl_backward, policy_loss, policy_loss_alone]


def mixture_backward(x, y, token_ids, grad):
    given = {"logits": x, "ref_logits": y, "mask": MASK, "beta": 0.3, "temperature": 0.9}
    out = triton_kernels.token_jsd(arguments("token_jsd", **given))
    given |= {name: getattr(out, name) for name in ("policy_state", "ref_state", "mixture_kl")}
    args = arguments(
        "token_jsd_backward", grad_jsd=torch.ones_like(out.jsd), grad_logits=grad, **given
    )
    triton_kernels.token_jsd_backward(args)
