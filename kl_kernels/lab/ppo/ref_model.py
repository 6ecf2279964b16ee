"""The reference model that the KL is measured to: the policy as it was when training began.

A third way needs no model: k1 and k2 take the reference's log-probabilities of the sampled tokens,
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
from kl_kernels.lab.ppo.policy import causal_lm

# (ids [B, P + T], attention_mask [B, P + T], T) -> logits [B, T, V], without gradient
RefModel = Callable[[Tensor, Tensor, int], Tensor]


def make_ref_model(
    lm: PreTrainedModel,
    device: torch.device,
    lora_rank: int | None,  # None: all of the weights are trained
) -> tuple[PreTrainedModel, RefModel]:
    """Make the model to train, and the reference to hold it to."""
    if lora_rank is None:
        return lm, frozen_copy(lm, device)
    lm = add_adapter(lm, lora_rank)
    return lm, disabled_adapter(lm)


def frozen_copy(lm: PreTrainedModel, device: torch.device) -> RefModel:
    """Copy the policy as it is now; the copy is a second model in memory, and never changes."""
    frozen = copy.deepcopy(lm).eval().requires_grad_(False).to(device)

    def ref_model(ids: Tensor, attention_mask: Tensor, n_answer: int) -> Tensor:
        with torch.no_grad():
            return causal_lm(frozen, ids, attention_mask, n_answer)[0]

    return ref_model


def add_adapter(lm: PreTrainedModel, lora_rank: int) -> PreTrainedModel:
    """Put a fresh LoRA adapter (Hu et al. 2021) on every linear layer; the rest is frozen.

    Raises:
        MissingPackageError: peft is not installed; `check_peft` tells beforehand.
    """
    check_peft()
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
    adapted: PreTrainedModel = get_peft_model(lm, adapter)
    return adapted


def check_peft() -> None:
    extras.need("reference 'adapter'", "peft")


def disabled_adapter(lm: Any) -> RefModel:
    """Run the policy itself with its adapter off: no second model in memory.

    With the adapter off, the policy is the model that the adapter was put on. A supervised adapter
    must be merged into that model first; otherwise the policy is held to the model from before its
    supervised training.
    """

    def ref_model(ids: Tensor, attention_mask: Tensor, n_answer: int) -> Tensor:
        off: AbstractContextManager[None] = lm.disable_adapter()
        with torch.no_grad(), off:
            return causal_lm(lm, ids, attention_mask, n_answer)[0]

    return ref_model


def merge_adapter(lm: Any) -> PreTrainedModel:
    """Merge the adapter, if there is one, into the weights: a plain model to save."""
    merged: PreTrainedModel = lm.merge_and_unload() if hasattr(lm, "merge_and_unload") else lm
    return merged
