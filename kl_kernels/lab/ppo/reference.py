"""The reference model the KL is measured to: what the policy was when training began.

A third kind needs no model: k1 and k2 take the reference's log-probabilities of the sampled tokens,
which are computed once per rollout and kept with it (`Batch.ref_logprobs`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kl_kernels import extras
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.policy import causal_lm

# (ids [B, P + T], attention_mask [B, P + T], T) -> logits [B, T, V], without gradient
Reference = Callable[[Tensor, Tensor, int], Tensor]


def make_reference(
    config: PPOConfig, lm: PreTrainedModel, device: torch.device
) -> tuple[PreTrainedModel, Reference]:
    """The model to train, and the reference to hold it to."""
    if config.reference == "adapter":
        lm = with_adapter(lm, config.lora_rank)
        return lm, disabled_adapter(lm)
    return lm, frozen_copy(lm, device)


def frozen_copy(lm: PreTrainedModel, device: torch.device) -> Reference:
    """A second model in memory, the policy as it is now, for good."""
    frozen = copy.deepcopy(lm).eval().requires_grad_(False).to(device)

    def reference(ids: Tensor, attention_mask: Tensor, n_answer: int) -> Tensor:
        with torch.no_grad():
            return causal_lm(frozen, ids, attention_mask, n_answer)[0]

    return reference


def with_adapter(lm: PreTrainedModel, rank: int) -> PreTrainedModel:
    """`lm` with a fresh LoRA adapter (Hu et al. 2021) on every linear layer; the rest is frozen.

    Raises:
        MissingPackageError: peft is not installed; `check_peft` tells beforehand.
    """
    check_peft()
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted: PreTrainedModel = get_peft_model(lm, adapter)
    return adapted


def check_peft() -> None:
    extras.need("reference 'adapter'", "peft")


def disabled_adapter(lm: Any) -> Reference:
    """The policy itself with its adapter off: no second model in memory.

    What is left is the model the adapter was put on. A supervised adapter has to be merged into it
    first, or the policy is held to the model from before its supervised training.
    """

    def reference(ids: Tensor, attention_mask: Tensor, n_answer: int) -> Tensor:
        off: AbstractContextManager[None] = lm.disable_adapter()
        with torch.no_grad(), off:
            return causal_lm(lm, ids, attention_mask, n_answer)[0]

    return reference


def without_adapter(lm: Any) -> PreTrainedModel:
    """A plain model to save: the adapter, if there is one, merged into the weights."""
    merged: PreTrainedModel = lm.merge_and_unload() if hasattr(lm, "merge_and_unload") else lm
    return merged
