"""Every kernel with the arguments that decide what it compiles to.

The launchers run on tensors without data, and what they would have launched is recorded: there is
no second list of a kernel's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from triton import JITFunction

from kl_kernels.backends.triton import launch, launch_mixture, launch_parts
from kl_kernels.schemas import (
    ESTIMATORS,
    FinishPartsArgs,
    FoldPartArgs,
    FoldTailArgs,
    GAEArgs,
    KLRewardsArgs,
    MixturePartArgs,
    PolicyLossArgs,
    ScaleGradientArgs,
    TokenJSDArgs,
    TokenJSDBackwardArgs,
    TokenKLArgs,
    TokenKLBackwardArgs,
    TokenStatsArgs,
)

OPTIONS = {*launch.COMPILE, "num_warps"}  # the compiler's options, not arguments of a kernel


@dataclass(frozen=True)
class Variant:
    name: str
    kernel: Any
    arguments: dict[str, Any]  # a dtype stands for a pointer to it
    # Names of the loops over the vocabulary, in program order; without them, work per token only.
    loops: tuple[str, ...] = ()
    unit: str = ""  # "logit", or "pair" of a policy's and a reference's
    units: int = 0  # in one iteration of one thread


@dataclass(frozen=True)
class Shape:
    """The shape of logits, [1, rows, vocab_size]: what is known of it is compiled in."""

    rows: int
    vocab_size: int

    @property
    def aligned(self) -> bool:
        """Whether a thread reads more than one logit at once."""
        return launch.tile_of(_operands(self)["logits"])["LANE"] > 1


def _operands(shape: Shape) -> dict[str, Any]:
    """Make every argument that any operator has, by name."""
    rows = (1, shape.rows)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    logits = empty(*rows, shape.vocab_size, dtype=torch.bfloat16)
    per_token = empty(*rows)
    states = {name: empty(2, *rows) for name in ("policy_state", "ref_state")}
    grads = {
        f"grad_{name}": per_token for name in ("logprob", "kl", "forward_kl", "entropy", "jsd")
    }
    return {
        **grads,
        **states,
        "logits": logits,
        "ref_logits": logits,
        "grad_logits": logits,
        "gradient": logits,
        "token_ids": empty(*rows, dtype=torch.int64),
        "skipped_ids": empty(*rows, 64, dtype=torch.int64),
        "mask": empty(*rows, dtype=torch.bool),
        "kl": per_token,
        "entropy": per_token,
        "mixture_kl": per_token,
        "scores": empty(1),
        "score_index": empty(1, dtype=torch.int64),
        "old_logprobs": per_token,
        "advantages": per_token,
        "token_weights": per_token,
        "importance_weights": None,
        "ref_logprobs": None,
        "own_gradient": None,
        "factor": empty(),
        "temperature": 0.9,
        "ref_temperature": 0.9,
        "softcap": None,
        "ref_softcap": None,
        "beta": 0.5,
        "estimator": ESTIMATORS.index("k1"),
        "kl_estimator": ESTIMATORS.index("exact"),
        "kl_coef": 0.1,
        "kl_clip": None,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "log_ratio_clamp": 20.0,
        "entropy_coef": 0.01,
        "part": False,
    }


def variants(shape: Shape) -> list[Variant]:
    """Gradients are those of log-probability, entropy and the KL that a name tells of; the policy
    loss has an entropy, and an exact KL where there is a reference.
    """
    operands = _operands(shape)

    def args(cls: type[Any], **changes: Any) -> Any:
        given = operands | changes
        return cls(**{field: given[field] for field in cls._fields})

    kl_backward = args(TokenKLBackwardArgs)
    fold_pair, finish_kl = _launches(launch.token_kl, args(TokenKLArgs))
    fold_policy, finish_policy = _launches(launch.token_stats, args(TokenStatsArgs))
    _, finish_rewards = _launches(launch.kl_rewards, args(KLRewardsArgs))
    _, part = _launches(launch_parts.fold_part, args(FoldPartArgs))
    states = torch.empty((8, 9, 1, shape.rows), device="meta")  # eight ranks
    ranges = torch.empty((8, 2), device="meta")
    parts_args = FinishPartsArgs(states, ranges, operands["mask"])
    (finish_parts,) = _launches(launch_parts.finish_parts, parts_args)
    tail, _ = _launches(launch_parts.fold_tail, args(FoldTailArgs))
    (kl,) = _launches(launch.token_kl_backward, kl_backward._replace(grad_forward_kl=None))
    odd = _operands(Shape(shape.rows, shape.vocab_size | 1))
    of_odd = {name: odd[name] for name in ("logits", "ref_logits", "grad_logits")}
    unaligned_kl = kl_backward._replace(grad_forward_kl=None, **of_odd)
    (unaligned,) = _launches(launch.token_kl_backward, unaligned_kl)
    (both_kls,) = _launches(launch.token_kl_backward, kl_backward)
    no_kl_gradient = kl_backward._replace(grad_kl=None, grad_forward_kl=None)
    (no_kl,) = _launches(launch.token_kl_backward, no_kl_gradient)
    (loss_pair,) = _launches(launch.policy_loss, args(PolicyLossArgs))
    (loss,) = _launches(launch.policy_loss, args(PolicyLossArgs, ref_logits=None, kl_coef=0.0))
    (mixture,) = _launches(launch_mixture.token_jsd, args(TokenJSDArgs))
    (mixture_part,) = _launches(launch_mixture.mixture_part, args(MixturePartArgs))
    (mixture_backward,) = _launches(launch_mixture.token_jsd_backward, args(TokenJSDBackwardArgs))
    (scale,) = _launches(launch.scale_gradient, args(ScaleGradientArgs))
    per_token = torch.empty((1, 1024), device="meta")
    gae_args = GAEArgs(per_token, per_token, per_token.bool(), 0.99, 0.95, skip_masked=True)
    (gae,) = _launches(launch.gae, gae_args)

    twice = ("fast", "running max")
    return [
        _over_vocabulary("fold: policy and reference", fold_pair, twice, "pair"),
        _over_vocabulary("fold: policy", fold_policy, twice, "logit"),
        _over_vocabulary("backward: KL", kl, ("tiles",), "pair"),
        _over_vocabulary("backward: KL, unaligned rows", unaligned, ("tiles",), "pair"),
        _over_vocabulary("backward: both KLs", both_kls, ("tiles",), "pair"),
        _over_vocabulary("backward: no KL", no_kl, ("tiles",), "logit"),
        _over_vocabulary(
            "policy loss: policy and reference", loss_pair, (*twice, "gradient"), "pair"
        ),
        _over_vocabulary("policy loss: policy", loss, (*twice, "gradient"), "logit"),
        _over_vocabulary("mixture: whole rows", mixture, (*twice, "second"), "pair"),
        _over_vocabulary("mixture: parts", mixture_part, ("second",), "pair"),
        _over_vocabulary("backward: mixture", mixture_backward, ("tiles",), "pair"),
        _over_vocabulary("scale", scale, ("tiles",), "logit"),
        Variant("fold: tail", *tail),
        Variant("finish: policy", *finish_policy),
        Variant("finish: both KLs", *finish_kl),
        Variant("finish: rewards", *finish_rewards),
        Variant("part of a vocabulary", *part),
        Variant("finish: parts", *finish_parts),
        Variant("gae", *gae),
    ]


Launch = tuple[Any, dict[str, Any]]  # a kernel and its arguments


def _over_vocabulary(name: str, launched: Launch, loops: tuple[str, ...], unit: str) -> Variant:
    kernel, arguments = launched
    return Variant(name, kernel, arguments, loops, unit, arguments["STEPS"] * arguments["LANE"])


def _launches(launcher: Callable[[Any], Any], args: Any) -> list[Launch]:
    """Record the launches of an operator's launcher, in order."""
    with _recorded() as found:
        launcher(args)
    return found


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    found: list[Launch] = []
    with ExitStack() as stack:
        for module in (launch, launch_mixture, launch_parts):
            for name, kernel in vars(module).copy().items():
                if isinstance(kernel, JITFunction):
                    recorder = _Recorder(kernel, found)
                    stack.enter_context(patch.object(module, name, recorder))
        yield found


class _Recorder:
    """A stand-in for a kernel that records its launches."""

    def __init__(self, kernel: Any, found: list[Launch]):
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._record

    def _record(self, **given: Any) -> None:
        arguments = {
            name: value.dtype if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
            if name not in OPTIONS
        }
        self._found.append((self._kernel, arguments))
