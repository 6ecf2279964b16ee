"""The entropy of logits, for which each trainer has a name of its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kl_kernels.algebra.parts import any_token
from kl_kernels.functional.logits import token_stats
from kl_kernels.schemas import BackendName


def entropy_from_logits(backend: BackendName | None) -> Callable[..., Tensor]:
    """Make a function that returns the entropy per row in nats, which trainers may compile."""

    def entropy(
        logits: Tensor,  # [..., V]
        chunk_size: int | None = None,  # ignored: no softmax is stored
    ) -> Tensor:  # [...]
        return token_stats(logits, any_token(logits), backend=backend).entropy

    return entropy
