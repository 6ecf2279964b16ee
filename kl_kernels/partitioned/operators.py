"""Linear heads as torch operators: torch.compile sees one node where a loop over tiles runs.

Each takes the heads' factors, arguments of its own, and the heads' options; types and order of its
schema are those of the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra.parts import Whole
from kl_kernels.algebra.row import Finished
from kl_kernels.ops.library import define
from kl_kernels.partitioned import flops
from kl_kernels.partitioned.functions import Inputs, Saved, Upstream
from kl_kernels.partitioned.head_gradients import Gradients, jsd_gradients, kl_gradients
from kl_kernels.partitioned.heads import (
    Factors,
    HeadOptions,
    fold_heads,
    full_precision,
    mixture_sums,
)
from kl_kernels.partitioned.tiles import Rows, positions
from kl_kernels.schemas import MIXTURE_SUMS, TokenKLOutputs, returned, schema_of


class FoldHeadsArgs(NamedTuple):
    """Statistics of rows, as `TokenKLOutputs`."""

    token_ids: Tensor  # [B, T]
    which: Tensor | None  # as `Rows` takes it


class MixtureOfHeadsArgs(NamedTuple):
    """Both sums of a mixture, [len(MIXTURE_SUMS), B, T]."""

    which: Tensor | None
    policy_state: Tensor  # [2, B, T]
    ref_state: Tensor  # [2, B, T]
    beta: float


class HeadsKLBackwardArgs(NamedTuple):
    """The gradients of hidden, weight and bias that are needed."""

    grad_logprob: Tensor | None  # [B, T]
    grad_kl: Tensor | None  # [B, T]
    grad_forward_kl: Tensor | None  # [B, T]
    grad_entropy: Tensor | None  # [B, T]
    token_ids: Tensor  # [B, T]
    which: Tensor | None
    policy_state: Tensor  # [2, B, T]
    ref_state: Tensor  # [2, B, T]
    kl: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool


class HeadsJSDBackwardArgs(NamedTuple):
    """The gradients of hidden, weight and bias that are needed."""

    grad_jsd: Tensor  # [B, T]
    which: Tensor | None
    policy_state: Tensor  # [2, B, T]
    ref_state: Tensor  # [2, B, T]
    mixture_kl: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    beta: float
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool


# Bodies of the operators, for those who want to look inside.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def define_of_heads(
    name: str, own: type[Any], returns: str, implementation: Any, fake: Any, products: Any
) -> None:
    classes = (Factors, own, HeadOptions)
    ends = len(Factors._fields), len(Factors._fields) + len(own._fields)

    def apart(args: Sequence[Any]) -> tuple[Any, Any, Any]:
        return Factors(*args[: ends[0]]), own(*args[slice(*ends)]), HeadOptions(*args[ends[1] :])

    @wraps(implementation)
    def run(*args: Any) -> Any:
        factors, a, options = apart(args)
        with torch.no_grad(), full_precision(factors.weight):
            return implementation(factors, a, options)

    IMPLEMENTATIONS[name] = run
    define(name, schema_of(returns, *classes), run, lambda *args: fake(*apart(args)))
    flops.register(name, lambda args: products(apart(args)[1]))


def _fold(factors: Factors, a: FoldHeadsArgs, options: HeadOptions) -> tuple[Tensor, ...]:
    rows = Rows(a.token_ids.shape, a.which)
    whole = fold_heads(factors.heads(options), rows, a.token_ids, options)
    return tuple(map(rows.put_last, (*whole.outputs, whole.policy_state, whole.ref_state)))


def _folded(factors: Factors, a: FoldHeadsArgs, options: HeadOptions) -> tuple[Tensor, ...]:
    leading = [(2,) if field.endswith("_state") else () for field in TokenKLOutputs._fields]
    return tuple(empty_of_heads(factors, options, *lead, *a.token_ids.shape) for lead in leading)


def _mixture(factors: Factors, a: MixtureOfHeadsArgs, options: HeadOptions) -> Tensor:
    rows = Rows(a.policy_state.shape[1:], a.which)
    states = rows.take_last(a.policy_state), rows.take_last(a.ref_state)
    return rows.put_last(mixture_sums(factors.heads(options), rows, states, a.beta, options))


def _mixed(factors: Factors, a: MixtureOfHeadsArgs, options: HeadOptions) -> Tensor:
    return empty_of_heads(factors, options, len(MIXTURE_SUMS), *a.policy_state.shape[1:])


def empty_of_heads(factors: Factors, options: HeadOptions, *shape: int) -> Tensor:
    return factors.hidden.new_empty(shape, dtype=factors.heads(options)[0].tile_dtype)


def _kl_backward(factors: Factors, a: HeadsKLBackwardArgs, options: HeadOptions) -> list[Tensor]:
    rows, needs = Rows(a.token_ids.shape, a.which), a[-3:]
    saved = Saved(a.policy_state, a.ref_state, a.kl, a.entropy)
    upstream = Upstream(*a[:4])
    heads = factors.heads(options)
    return needed(kl_gradients(heads, rows, a.token_ids, saved, upstream, needs, options))


def _jsd_backward(factors: Factors, a: HeadsJSDBackwardArgs, options: HeadOptions) -> list[Tensor]:
    rows, needs = Rows(a.grad_jsd.shape, a.which), a[-3:]
    saved = Saved(a.policy_state, a.ref_state, a.mixture_kl, a.entropy)
    heads = factors.heads(options)
    return needed(jsd_gradients(heads, rows, saved, a.beta, a.grad_jsd, needs, options))


def _once_each(a: Any) -> tuple[int, int]:
    return 1, 1


def _kl_backward_products(a: HeadsKLBackwardArgs) -> tuple[int, int]:
    has_kl = a.grad_kl is not None or a.grad_forward_kl is not None
    return 1 + a.needs_hidden + a.needs_weight, int(has_kl)


def _jsd_backward_products(a: HeadsJSDBackwardArgs) -> tuple[int, int]:
    return 1 + a.needs_hidden + a.needs_weight, 1


def needed(gradients: Gradients) -> list[Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


def new_gradients(factors: Factors, a: Any, options: HeadOptions) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, wanted in zip(factors, a[-3:]) if wanted and t is not None]


define_of_heads(
    "fold_heads",
    FoldHeadsArgs,
    returned(TokenKLOutputs),
    _fold,
    _folded,
    _once_each,
)
define_of_heads("mixture_of_heads", MixtureOfHeadsArgs, "Tensor sums", _mixture, _mixed, _once_each)
define_of_heads(
    "heads_kl_backward",
    HeadsKLBackwardArgs,
    "Tensor[]",
    _kl_backward,
    new_gradients,
    _kl_backward_products,
)
define_of_heads(
    "heads_jsd_backward",
    HeadsJSDBackwardArgs,
    "Tensor[]",
    _jsd_backward,
    new_gradients,
    _jsd_backward_products,
)


def rows_at_hand(which: Tensor | None) -> Tensor | None:
    """Look for the rows under a mask once, and not in each operator; a graph has no such shapes."""
    if which is None or which.dtype != torch.bool or torch.compiler.is_compiling():
        return which
    return positions(which)


class LinearHeads(NamedTuple):
    """Parts that are tiles of linear heads' logits. Inputs: those of `Factors`."""

    options: HeadOptions

    def rows(self, which: Tensor | None) -> Tensor | None:
        return rows_at_hand(which)

    def fold(self, inputs: Inputs, token_ids: Tensor, rows: Tensor | None) -> Whole:
        args = FoldHeadsArgs(token_ids, rows)
        *outputs, policy_state, ref_state = torch.ops.kl_kernels.fold_heads(
            *inputs, *args, *self.options
        )
        return Whole(Finished(*outputs), policy_state, ref_state)

    def mixture_sums(
        self, inputs: Inputs, rows: Tensor | None, whole: Whole, beta: float
    ) -> Tensor:
        args = MixtureOfHeadsArgs(rows, whole.policy_state, whole.ref_state, beta)
        sums: Tensor = torch.ops.kl_kernels.mixture_of_heads(*inputs, *args, *self.options)
        return sums

    def kl_gradients(
        self,
        inputs: Inputs,
        token_ids: Tensor,
        rows: Tensor | None,
        saved: Saved,
        upstream: Upstream,
        needs: Sequence[bool],
    ) -> Gradients:
        args = HeadsKLBackwardArgs(*upstream, token_ids, rows, *saved, *needs[:3])
        found = torch.ops.kl_kernels.heads_kl_backward(*inputs, *args, *self.options)
        return in_place_of(needs[:3], found)

    def jsd_gradients(
        self,
        inputs: Inputs,
        rows: Tensor | None,
        saved: Saved,
        beta: float,
        grad_jsd: Tensor,
        needs: Sequence[bool],
    ) -> Gradients:
        args = HeadsJSDBackwardArgs(grad_jsd, rows, *saved, beta, *needs[:3])
        found = torch.ops.kl_kernels.heads_jsd_backward(*inputs, *args, *self.options)
        return in_place_of(needs[:3], found)


def in_place_of(needs: Sequence[bool], found: Sequence[Tensor]) -> Gradients:
    """The gradients that are needed, with None between them."""
    gradients = iter(found)
    return [next(gradients) if wanted else None for wanted in needs]
