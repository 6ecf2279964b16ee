"""GRPO's output layer with three matrix products in the place of four.

A batch's first update is by the policy that sampled it: the ratio is 1, nothing is clipped, and
without a KL every loss type of TRL has the same gradient per token up to its normaliser m,

    d loss / d logprob_t = -A_t m_t

which depends on no logit. It is known before the output layer is multiplied, and so that layer's
gradients are made in forward, of the logits that are there (as `linear_policy_loss` does it). TRL
still computes its own loss and metrics from the log-probabilities. Should backward find that their
gradient is another than the one foreseen, then the gradients are computed again, from that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kl_kernels.functional.hidden import linear_token_stats
from kl_kernels.functional.hidden_arguments import prepare_head
from kl_kernels.functional.hidden_policy_loss import MEMORY_BUDGETS
from kl_kernels.integrations.adapters import warn_of_adapted_head
from kl_kernels.partitioned.heads import Factors, full_precision
from kl_kernels.partitioned.policy_loss import loss_and_gradients
from kl_kernels.partitioned.tiles import Rows
from kl_kernels.schemas import ESTIMATORS, POLICY_LOSS_TERMS, PolicyLossArgs

# Largest distance of the gradient from the foreseen one, as a share of its largest entry: rounding.
TOLERANCE = 1e-5
_KL, _ENTROPY = map(POLICY_LOSS_TERMS.index, ("kl", "entropy"))


class Foreseen(NamedTuple):
    """Gradient of a loss with respect to the log-probabilities of a batch's answers."""

    gradient: Tensor  # [B, T]
    counts: Tensor  # [B, T] bool: what the output layer scores
    prompt: int  # tokens before them

    def rows(self, n: int) -> tuple[Tensor, Tensor | None] | None:
        """Gradient and counts of the n rows that a head is given; None: these are other rows.

        TRL hands over the tokens that are scored, on GPUs, or all positions that have a next one.
        """
        size, length = self.counts.shape
        if n == size * (self.prompt + length - 1):
            before = (self.prompt - 1, 0)
            padded = (torch.nn.functional.pad(t, before) for t in (self.gradient, self.counts))
            gradient, counts = (t.flatten() for t in padded)
            return gradient, counts
        gradient = self.gradient[self.counts]
        return (gradient, None) if n == len(gradient) else None


_foreseen: ContextVar[Foreseen | None] = ContextVar("foreseen", default=None)


@contextmanager
def expecting(foreseen: Foreseen | None) -> Iterator[None]:
    """Let the next head that is differentiated in this context know the gradient."""
    before = _foreseen.set(foreseen)
    try:
        yield
    finally:
        _foreseen.reset(before)


def foresee(trainer: Any, inputs: dict[str, Any]) -> Foreseen | None:
    """Foresee the gradient of `GRPOTrainer._compute_loss`; None: it depends on log-probabilities.

    That is so with a KL (beta), an entropy bonus, masks by entropy or by distance, and at a batch's
    later updates.
    """
    if (
        inputs.get("old_per_token_logps") is not None
        or trainer.beta != 0
        or trainer.top_entropy_quantile < 1
        or trainer.off_policy_mask_threshold is not None
        or trainer._entropy_bonus_enabled
        or not torch.is_grad_enabled()
    ):
        return None
    counts, advantages = inputs["completion_mask"], inputs["advantages"]
    mask = counts * inputs["tool_mask"] if "tool_mask" in inputs else counts
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    return Foreseen(
        -advantages * mask / _normaliser(trainer, inputs, mask),
        counts.bool(),
        inputs["prompt_ids"].shape[1],
    )


def _normaliser(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> Any:
    """1 / m, a number or [B, 1]. A factor that is missing costs a pass over the gradients."""
    steps = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
    kind, size = trainer.loss_type, len(mask)
    if kind in ("cispo", "dapo", "vespo"):
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        generated = trainer.args.steps_per_generation if trainer.model.training else 1
        bound = min(1.0, trainer.epsilon_high) if kind == "cispo" else 1.0
        return tokens * steps / generated / bound
    if kind in ("grpo", "sapo"):
        return mask.sum(-1, keepdim=True).clamp(min=1.0) * size * steps
    if kind == "bnpo":
        return mask.sum().clamp(min=1.0) * steps
    if kind == "dr_grpo":
        return size * trainer.max_completion_length * steps
    return size * steps  # luspo


def compute_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make `GRPOTrainer._compute_loss` one that tells the output layer what it will ask for."""

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        warn_of_adapted_head(self.model, "GRPOTrainer")
        with expecting(foresee(self, inputs)):
            return original(self, model, inputs)

    return _compute_loss


def take_foreseen(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None] | None:
    """Gradient and counts of the rows of `hidden` [N, d], if they are known; they are told once.

    Not where `dtype`, which the head multiplies in, is float16: its loss is scaled by a number that
    nobody knows yet, without which gradients underflow.
    """
    if not (hidden.requires_grad or weight.requires_grad) or not torch.is_grad_enabled():
        return None
    foreseen = _foreseen.get()
    if foreseen is None or dtype == torch.float16:
        return None
    _foreseen.set(None)
    return foreseen.rows(len(hidden))


def one_visit(
    hidden: Tensor,  # [N, d]
    weight: Tensor,  # [V, d]
    bias: Tensor | None,  # [V]
    token_ids: Tensor,  # [N]
    gradient: Tensor,  # [N]
    counts: Tensor | None,  # [N]
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies [N], with the gradients of a loss that is foreseen."""
    apply = torch.compiler.disable(_OneVisit.apply, reason="backward looks at its gradient")
    logprob, entropy = apply(options, token_ids, gradient, counts, hidden, weight, bias)
    return logprob, entropy


class _OneVisit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: dict[str, Any],
        token_ids: Tensor,
        foreseen: Tensor,
        counts: Tensor | None,
        *factors: Any,
    ) -> tuple[Tensor, Tensor]:
        hidden, weight, bias = factors
        given = dict(options)
        if given["memory_budget"] is None:
            device = hidden.device.type
            given["memory_budget"] = MEMORY_BUDGETS.get(device, MEMORY_BUDGETS["cuda"])
        prepared = prepare_head(
            hidden,
            weight,
            bias,
            gradient_precision="narrow",
            group=None,
            vocab_start=None,
            **given,
        )
        wide = torch.promote_types(hidden.dtype, weight.dtype)
        like = foreseen[None].to(torch.promote_types(wide, torch.float32))
        args = PolicyLossArgs(
            logits=like,  # `loss_and_gradients` puts those of each block in their place
            ref_logits=None,
            token_ids=token_ids.long()[None],
            mask=torch.ones_like(like, dtype=torch.bool) if counts is None else counts[None],
            old_logprobs=None,  # the ratio is 1
            advantages=-like,
            token_weights=torch.ones_like(like),
            importance_weights=None,
            # k2 against a log-probability of 0 is logprob^2 / 2: the kernel so tells it.
            ref_logprobs=torch.zeros_like(like),
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=None,
            log_ratio_clamp=None,
            kl_coef=0.0,
            kl_estimator=ESTIMATORS.index("k2"),
            entropy_coef=0.0,
            temperature=prepared.temperature,
            ref_temperature=prepared.ref_temperature,
            softcap=prepared.softcap,
            ref_softcap=None,
            own_gradient=None,
            grad_logits=None,
        )
        heads = Factors(hidden[None], weight, bias, None, None, None).heads(prepared)
        rows = Rows(like.shape, None if counts is None else counts[None])
        needs = ctx.needs_input_grad[4:7]
        with full_precision(weight):
            terms, gradients = loss_and_gradients(heads, rows, args, prepared, needs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(foreseen, token_ids, counts, hidden, weight, bias, *gradients)
        ctx.options = options
        return -(2 * terms[_KL, 0]).sqrt(), terms[_ENTROPY, 0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        foreseen, token_ids, counts, *rest = ctx.saved_tensors
        factors, gradients = rest[:3], rest[3:]
        factor = None
        if grad_logprob is not None and grad_entropy is None:
            factor = _factor(grad_logprob, foreseen)
        if factor is None:
            upstream = grad_logprob, grad_entropy
            needs = ctx.needs_input_grad[4:]
            found = _again(token_ids, counts, factors, needs, upstream, ctx.options)
            return None, None, None, None, *found
        for gradient in gradients:
            if gradient is not None:
                torch.autograd.graph.increment_version(gradient)  # a second backward is refused
                if factor != 1:
                    gradient.mul_(factor)
        grad_hidden, grad_weight, grad_bias = gradients
        grad_hidden = None if grad_hidden is None else grad_hidden[0]
        return None, None, None, None, grad_hidden, grad_weight, grad_bias


def _factor(gradient: Tensor, foreseen: Tensor) -> float | None:  # [N]
    """The number that the foreseen gradient must be multiplied by; None: there is none."""
    if gradient.numel() == 0:
        return 1.0
    wide, known = gradient.double(), foreseen.double()
    norm = (known * known).sum()
    factor = torch.where(norm > 0, (wide * known).sum() / norm, 1.0)
    off = (wide - factor * known).abs().amax()
    # The host waits here; TRL has waited before, to log.
    value, off_by, largest = torch.stack([factor, off, wide.abs().amax()]).tolist()
    if not off_by <= TOLERANCE * largest:
        return None
    return 1.0 if abs(value - 1) <= TOLERANCE else float(value)


def _again(
    token_ids: Tensor,
    counts: Tensor | None,
    factors: Any,
    needs: Any,
    upstream: tuple[Tensor | None, Tensor | None],
    options: dict[str, Any],
) -> list[Tensor | None]:
    """The gradients of another loss than the one that was foreseen."""
    leaves: list[Any] = [None if factor is None else factor.detach() for factor in factors]
    wanted = [leaf.requires_grad_() for leaf, needed in zip(leaves, needs) if needed]
    hidden, weight, bias = leaves
    with torch.enable_grad():
        stats = linear_token_stats(hidden, weight, token_ids, counts, bias=bias, **options)
    present = [(s, g) for s, g in zip(stats, upstream) if g is not None]
    outputs, given = zip(*present)
    found = iter(torch.autograd.grad(outputs, wanted, given))
    return [next(found) if needed else None for needed in needs]
