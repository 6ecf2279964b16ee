"""The transforms of `torch.func`: which functions take them, and in what form.

`torch.library.register_autograd` makes operators that those transforms refuse. The same formulas
as a `torch.autograd.Function` with `setup_context` they do take: `grad`, `vjp`, `jacrev` and
`vmap`, which gradients per sample are made of. There are no forward-mode derivatives (`jvp`,
`jacfwd`, `hessian`) and no second ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def are_active() -> bool:
    # Not public, but what torch.autograd.Function itself asks, and torch.compile knows it.
    active: bool = torch._C._are_functorch_transforms_active()
    return active


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


def refuse(name: str) -> None:
    """Otherwise torch would tell the user to change our source."""
    if are_active():
        raise NotImplementedError(
            f"{name} takes no transforms of torch.func (grad, vjp, jacrev, vmap); use "
            "torch.autograd, or token_stats, token_kl, token_jsd or kl_rewards, which do take them"
        )


def check_no_tangent(name: str, tensor: Tensor) -> None:
    """Operators that only know backward drop tangents: torch would call the derivative 0."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise _refusal(name)


def _no_tangents(ctx: Any, *tangents: Any) -> None:
    raise _refusal("an argument")


def _refusal(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} carries a tangent, but kl_kernels has no forward-mode derivatives "
        "(torch.func.jvp, jacfwd, hessian); use backward"
    )
