"""The operators in a form that the transforms of `torch.func` take.

`torch.library.register_autograd` makes operators that those transforms refuse. The same formulas
as a `torch.autograd.Function` with `setup_context` they do take: `grad`, `vjp`, `jacrev` and
`vmap`, which gradients per sample are made of. There are no forward-mode derivatives (`jvp`,
`jacfwd`, `hessian`) and no second ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kl_kernels.checks import no_forward_mode


def function(
    name: str, setup: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The operator `name` as a function of the formulas that are registered for it."""

    def forward(*args: Any) -> Any:
        return getattr(torch.ops.kl_kernels, name)(*args)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
        "jvp": staticmethod(_no_tangents),
        "generate_vmap_rule": True,
    }
    return type(name, (torch.autograd.Function,), members)


def _no_tangents(ctx: Any, *tangents: Any) -> None:
    raise no_forward_mode("an argument")
