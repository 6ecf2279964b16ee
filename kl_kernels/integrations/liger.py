"""Liger: its GRPO loss on hidden states and an output layer, by `linear_policy_loss`.

    from kl_kernels.integrations.liger import LigerFusedLinearGRPOLoss

Constructor and call are those of liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss (0.8). That one
multiplies the logits twice, and its gradients in float32; here there are three products in the
dtype of the factors.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.checks import check_choice, check_positive
from kl_kernels.functional.hidden_policy_loss import linear_policy_loss
from kl_kernels.rl.losses import Aggregation

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
_WHY_NOT = {  # its other loss types
    "cispo": "the ratio is no factor of a gradient that is clipped by token",
    "sapo": "the loss is not clipped but bent",
    "vespo": "a token's weight is made of all ratios of its sequence",
    "luspo": "it is meant for ratios of sequences, which need all tokens before any gradient",
}


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO's loss from hidden states and an output layer, as Liger's class of this name.

    Values, gradients and metrics are Liger's up to rounding, with these differences: gradients are
    summed up in float32 and rounded once, also over the sequences; NaN at masked positions reaches
    nothing; without a token there is a loss of 0; `backward` may be called once.

    Args:
        beta: coefficient of the KL to the reference, k3 of each token; 0 or above. 0: the reference
            is not used.
        compiled: ignored, as there is nothing to compile.
        use_ref_model: whether there is a reference. Without one a policy is its own: the KL is 0.
        chunk_size: ignored: the size of a block follows from linear_policy_loss's memory_budget.
        epsilon_low: the ratio is clipped below at 1 - epsilon_low; 0 or above.
        epsilon_high: the ratio is clipped above at 1 + epsilon_high; 0 or above.
        loss_type: "grpo" (mean over the tokens of a sequence, then over all sequences), "bnpo"
            (mean over the tokens of this call), "dr_grpo" (sum over sequences times
            max_completion_length) or "dapo" (mean over the tokens of all ranks).
        max_completion_length: above 0, for "dr_grpo".
        importance_sampling_level: "token"; "sequence" is refused.
        sapo_temperature_pos: ignored, as "sapo" is refused.
        sapo_temperature_neg: the same.
        temperature: divides both models' logits; finite and above 0.
        delta: upper bound of the ratio, at 1 + epsilon_high or above. None: no bound.
        use_bias_correction_kl: refused with a beta above 0 and a reference.
        vespo_k_pos: ignored, as "vespo" is refused.
        vespo_lambda_pos: the same.
        vespo_k_neg: the same.
        vespo_lambda_neg: the same.

    Raises:
        TypeError, ValueError: an argument is out of range, or one of Liger's that is refused.

    Examples:
        >>> import torch
        >>> from kl_kernels.integrations.liger import LigerFusedLinearGRPOLoss
        >>> hidden = torch.zeros(1, 2, 3, requires_grad=True)
        >>> token_ids, mask = torch.tensor([[1, 3]]), torch.tensor([[1, 1]])
        >>> loss_of = LigerFusedLinearGRPOLoss(beta=0.0)
        >>> loss, metrics = loss_of(hidden, torch.eye(4, 3), token_ids, mask, torch.tensor([1.0]))
        >>> loss.backward()
        >>> loss.item(), hidden.grad[0, 0].tolist()  # -A ([token] - p) @ weight / 2
        (-1.0, [0.125, -0.375, 0.125])
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: LossType = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: Literal["token"] = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        if loss_type in _WHY_NOT:
            raise ValueError(
                f"loss_type is {loss_type!r}, which linear_policy_loss does not compute: "
                f"{_WHY_NOT[loss_type]}; accepted: {', '.join(map(repr, get_args(LossType)))}"
            )
        check_choice("loss_type", loss_type, get_args(LossType))
        if importance_sampling_level == "sequence":
            raise ValueError(
                "importance_sampling_level is 'sequence'; a sequence's ratio needs all of its "
                "tokens before the gradient of any; accepted: 'token'"
            )
        check_choice("importance_sampling_level", importance_sampling_level, ("token",))
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length is None; loss_type 'dr_grpo' divides by it")
        self._length = 1.0
        if max_completion_length is not None:
            self._length = check_positive("max_completion_length", max_completion_length)
        if delta is not None and delta < 1 + epsilon_high:
            raise ValueError(
                f"delta is {delta}, below 1 + epsilon_high = {1 + epsilon_high}, where it would "
                "bound what the clip bounds; accepted: from that on, or None"
            )
        if use_bias_correction_kl and beta != 0 and use_ref_model:
            raise ValueError(
                "use_bias_correction_kl is True with a beta; k3 times the ratio is not computed in "
                "one visit; accepted: False. (kl_penalty has gradients of a KL in expectation.)"
            )
        self.beta, self.use_ref_model = beta, use_ref_model
        self.loss_type = loss_type
        self._options: dict[str, Any] = {
            "clip_low": epsilon_low,
            "clip_high": epsilon_high,
            "dual_clip": delta,
            "temperature": temperature,
            "log_ratio_clamp": None,
        }

    def forward(
        self,
        _input: Tensor,  # [B, T, d]
        lin_weight: Tensor,  # [V, d]
        selected_token_ids: Tensor,  # [B, T]
        attention_mask: Tensor,  # [B, T]
        advantages: Tensor,  # [B]
        bias: Tensor | None = None,  # [V]
        ref_per_token_logps: Tensor | None = None,  # [B, T]
        old_per_token_logps: Tensor | None = None,  # [B, T]
        ref_input: Tensor | None = None,  # [B, T, ref_d]
        ref_weight: Tensor | None = None,  # [V, ref_d]
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B], [B, 1] or [B, T]
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss and Liger's metrics: the KL, where beta is not 0, and the clip fraction.

        Args:
            _input: [B, T, d] hidden states; row t is the one that the token of row t came from.
            lin_weight: [V, d] of the output layer.
            selected_token_ids: [B, T] the sampled tokens.
            attention_mask: [B, T] bool, or numbers that are 0 or 1.
            advantages: [B] of each sequence.
            bias: [V] of the output layer.
            ref_per_token_logps: [B, T] the reference's log-probabilities.
            old_per_token_logps: [B, T] those of the policy that sampled. None: this policy's.
            ref_input: [B, T, ref_d] the reference's hidden states, where its log-probabilities are
                not given.
            ref_weight: [V, ref_d] of the reference's output layer.
            ref_bias: [V] of the reference's output layer.
            vllm_is_ratio: [B], [B, 1] or [B, T] factors of the clipped loss.
            num_items_in_batch: tokens of all ranks and micro-batches, for "dapo". None: those of
                this call on all ranks.

        Returns:
            (loss, metrics): 0-dim tensors.

        Raises:
            TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or
                there is no reference where one is used.
        """
        reference = self._reference(ref_per_token_logps, ref_input, ref_weight, ref_bias)
        length = selected_token_ids.shape[-1]
        if vllm_is_ratio is not None:
            column = vllm_is_ratio[:, None] if vllm_is_ratio.ndim == 1 else vllm_is_ratio
            vllm_is_ratio = column.expand(-1, length)
        aggregation, denominator = self._aggregation(attention_mask, num_items_in_batch)
        loss, metrics = linear_policy_loss(
            _input,
            lin_weight,
            selected_token_ids,
            old_per_token_logps,
            advantages[:, None].expand(-1, length),
            attention_mask,
            bias=bias,
            weights=vllm_is_ratio,
            aggregation=aggregation,
            denominator=denominator,
            **reference,
            **self._options,
        )
        clipped = metrics["clip_fraction"]
        if self.beta == 0:
            return loss, (clipped,)
        return loss, (metrics.get("kl", torch.zeros_like(clipped)), clipped)

    def _reference(
        self,
        logprobs: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> dict[str, Any]:
        """Return the arguments of `linear_policy_loss` that are about the reference."""
        if not self.use_ref_model or self.beta == 0:
            return {}
        given: dict[str, Any] = {"kl_loss_coef": self.beta, "kl_estimator": "k3"}
        if logprobs is not None:
            return given | {"ref_logprobs": logprobs}
        if hidden is None or weight is None:
            raise ValueError(
                "use_ref_model is True and there is no reference; pass ref_per_token_logps, or "
                "ref_input and ref_weight"
            )
        constants = (None if t is None else t.detach() for t in (hidden, weight, bias))
        return given | dict(zip(("ref_hidden", "ref_weight", "ref_bias"), constants))

    def _aggregation(
        self,
        mask: Tensor,  # [B, T]
        num_items_in_batch: float | Tensor | None,
    ) -> tuple[Aggregation, float | Tensor | None]:
        """Return the aggregation and denominator that are Liger's of the loss type."""
        if self.loss_type == "grpo":  # a sequence without tokens counts
            return "seq-mean-token-mean", float(max(len(mask), 1))
        if self.loss_type == "bnpo":
            return "token-mean", None
        if self.loss_type == "dr_grpo":
            return "token-mean", max(len(mask), 1) * self._length
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items_in_batch is None:
            count = mask.sum().float()
            if ranks > 1:
                dist.all_reduce(count)
        else:
            count = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
        return "token-mean", (count / ranks).clamp(min=1)
