"""Adapters on the output layer, which a function of that layer's weight does not see."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn


def warn_of_adapted_head(model: Any, who: str) -> None:
    """Warn where the output layer has an adapter that is not merged.

    PEFT's layers (LoRA and its relatives) are around a `base_layer`, whose weight they give as
    theirs: a product with that weight leaves the adapter out, in values and in gradients.

    Args:
        model: a Hugging Face model, or PEFT's around one.
        who: the trainer, for the message.
    """
    head = model.get_output_embeddings()
    if not isinstance(getattr(head, "base_layer", None), nn.Module):
        return
    if getattr(head, "merged", False) or getattr(head, "disable_adapters", False):
        return
    warnings.warn(
        f"the output layer has an adapter ({type(head).__name__}), and {who} multiplies by its "
        "weight alone: the adapter neither counts nor learns. Leave it out of target_modules; "
        "modules_to_save trains the whole layer",
        RuntimeWarning,
        stacklevel=3,
    )
