"""The operators: one class of arguments for each, and the facts that all backends share.

A backend is any namespace with the functions of `OPERATORS`, each taking its class of arguments
(`dispatch.py` lists them). The schemas that torch registers are derived from the classes, for the
operators (`library.py`) as for the compiled libraries that implement them (`compiled.py`).
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

# A tensor that the operator writes; where it is [B, T, V], it may be the logits themselves.
Written = Annotated[Tensor, "a!"]

# Logits may be a part of a vocabulary: a shard, or a tile of a linear head. Tokens outside of the
# part are then NO_TOKEN, and backward operators are told by `part`.


class FoldPartArgs(NamedTuple):
    """The state of a part of a vocabulary, [len(state_fields(has_ref)), B, T]."""

    logits: Tensor  # [B, T, V]
    ref_logits: Tensor | None  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None


class FoldTailArgs(NamedTuple):
    """The state of a row without some of its tokens, [len(state_fields(False)), B, T].

    `skipped_ids` ascend, and from V on they skip nothing. The token may be one of them.
    """

    logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]
    skipped_ids: Tensor  # [B, T, K]
    mask: Tensor | None  # [B, T]
    temperature: float
    softcap: float | None


class TokenStatsArgs(NamedTuple):
    """Log-probability and entropy."""

    logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    temperature: float
    softcap: float | None


class TokenStatsOutputs(NamedTuple):
    """The results and what backward needs; or the gradients of the results."""

    logprob: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    policy_state: Tensor  # [2, B, T]


class TokenStatsBackwardArgs(NamedTuple):
    """The gradient of `token_stats`."""

    grad_logprob: Tensor | None  # [B, T]
    grad_entropy: Tensor | None  # [B, T]
    logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    policy_state: Tensor  # [2, B, T]
    entropy: Tensor  # [B, T]
    temperature: float
    softcap: float | None
    part: bool
    grad_logits: Written  # [B, T, V]


class TokenKLArgs(NamedTuple):
    """Log-probabilities under both models, KL both ways and entropy."""

    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None


class TokenKLOutputs(NamedTuple):
    """The results and what backward needs; or the gradients of the results."""

    logprob: Tensor  # [B, T]
    ref_logprob: Tensor  # [B, T]
    kl: Tensor  # [B, T] KL(policy || reference)
    forward_kl: Tensor  # [B, T] KL(reference || policy)
    entropy: Tensor  # [B, T]
    policy_state: Tensor  # [2, B, T]
    ref_state: Tensor  # [2, B, T]


class TokenKLBackwardArgs(NamedTuple):
    """The gradient of `token_kl`."""

    grad_logprob: Tensor | None  # [B, T]
    grad_kl: Tensor | None  # [B, T]
    grad_forward_kl: Tensor | None  # [B, T]
    grad_entropy: Tensor | None  # [B, T]
    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    policy_state: Tensor  # [2, B, T]
    ref_state: Tensor  # [2, B, T]
    kl: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None
    part: bool
    grad_logits: Written  # [B, T, V]


class TokenJSDArgs(NamedTuple):
    """The divergence to the mixture (1 - beta) policy + beta reference, 0 < beta < 1."""

    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    mask: Tensor | None  # [B, T]
    beta: float
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None


class TokenJSDOutputs(NamedTuple):
    """The results and what backward needs; or the gradients of the results."""

    jsd: Tensor  # [B, T]
    mixture_kl: Tensor  # [B, T] KL(policy || mixture)
    policy_state: Tensor  # [2, B, T]
    ref_state: Tensor  # [2, B, T]


class MixturePartArgs(NamedTuple):
    """A part's share of both sums of a mixture, [len(MIXTURE_SUMS), B, T]."""

    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    mask: Tensor | None  # [B, T]
    policy_state: Tensor  # [2, B, T] of the whole rows
    ref_state: Tensor  # [2, B, T]
    beta: float
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None


class TokenJSDBackwardArgs(NamedTuple):
    """The gradient of `token_jsd`, of whole rows as of parts."""

    grad_jsd: Tensor  # [B, T]
    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    mask: Tensor | None  # [B, T]
    policy_state: Tensor  # [2, B, T]
    ref_state: Tensor  # [2, B, T]
    mixture_kl: Tensor  # [B, T]
    beta: float
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None
    grad_logits: Written  # [B, T, V]


class FinishPartsArgs(NamedTuple):
    """States of all parts of rows, to be merged and finished.

    A row is NaN where not exactly one part holds its token, and all are where `ranges` says that
    the parts are not 0 to V - 1, each token once.
    """

    states: Tensor  # [parts, 9 or 4, B, T]: `fold_part`'s
    ranges: Tensor | None  # [parts, 2]: a part's first token and how many; None: not checked
    mask: Tensor | None  # [B, T]


class KLRewardsArgs(NamedTuple):
    """Arguments of `token_kl`, and the coefficients of the rewards."""

    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    scores: Tensor  # [B]
    score_index: Tensor  # [B] where the score goes, -1 for nowhere
    kl_coef: float
    estimator: int  # an index of ESTIMATORS
    kl_clip: float | None
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None


class KLRewardsOutputs(NamedTuple):
    """Rewards, then the fields of `TokenKLOutputs`; or the gradients of the results."""

    rewards: Tensor  # [B, T]
    advantage_correction: Tensor  # [B, T]
    logprob: Tensor  # [B, T]
    ref_logprob: Tensor  # [B, T]
    kl: Tensor  # [B, T]
    forward_kl: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    policy_state: Tensor  # [2, B, T]
    ref_state: Tensor  # [2, B, T]


class PolicyLossArgs(NamedTuple):
    """POLICY_LOSS_TERMS of each token and, with `grad_logits`, the gradient of the loss."""

    logits: Tensor  # [B, T, V]
    ref_logits: Tensor | None  # [B, T, V] for the exact KL
    token_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    old_logprobs: Tensor | None  # [B, T]; None: the ratio is 1
    advantages: Tensor  # [B, T]
    token_weights: Tensor  # [B, T] of a token's loss in the whole
    importance_weights: Tensor | None  # [B, T] of the clipped loss in the token's; None: 1
    ref_logprobs: Tensor | None  # [B, T] for the estimators k2 and k3
    clip_low: float
    clip_high: float
    dual_clip: float | None
    log_ratio_clamp: float | None
    kl_coef: float
    kl_estimator: int  # an index of ESTIMATORS
    entropy_coef: float
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None
    own_gradient: Written | None  # [B, T] the token's own entry, where grad_logits is rounded
    grad_logits: Written | None  # [B, T, V]


class ScaleGradientArgs(NamedTuple):
    """Multiplies in place; touches nothing where the factor is 1."""

    gradient: Written  # [B, T, V]
    factor: Tensor  # [] float32


class GAEArgs(NamedTuple):
    """Generalised advantage estimation."""

    rewards: Tensor  # [B, T]
    values: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    gamma: float
    lam: float
    skip_masked: bool
    cu_seqlens: Tensor | None  # [S + 1] int64 of packed sequences, [1, N]; None: each row is one


class GAEOutputs(NamedTuple):
    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T]


class Operator(NamedTuple):
    """An operator's class of arguments, and what it returns."""

    args: type[Any]
    outputs: Any  # a class of outputs, the name of the only one, or None


OPERATORS = {
    "fold_part": Operator(FoldPartArgs, "state"),
    "fold_tail": Operator(FoldTailArgs, "state"),
    "finish_parts": Operator(FinishPartsArgs, TokenKLOutputs),
    "token_stats": Operator(TokenStatsArgs, TokenStatsOutputs),
    "token_stats_backward": Operator(TokenStatsBackwardArgs, None),
    "token_kl": Operator(TokenKLArgs, TokenKLOutputs),
    "token_kl_backward": Operator(TokenKLBackwardArgs, None),
    "token_jsd": Operator(TokenJSDArgs, TokenJSDOutputs),
    "mixture_part": Operator(MixturePartArgs, "sums"),
    "token_jsd_backward": Operator(TokenJSDBackwardArgs, None),
    "kl_rewards": Operator(KLRewardsArgs, KLRewardsOutputs),
    "policy_loss": Operator(PolicyLossArgs, "terms"),
    "scale_gradient": Operator(ScaleGradientArgs, None),
    "gae": Operator(GAEArgs, GAEOutputs),
}


class Execution(NamedTuple):
    """Execution options of a differentiable operator, which do not change its result."""

    inplace_backward: bool  # the gradient goes over the logits
    backend: str | None  # a key of `dispatch.BACKENDS`, or None for the best


A = TypeVar("A", bound=tuple[Any, ...])


def pick(cls: type[A], args: Any) -> A:
    """The fields of `cls`, a class of arguments, out of a class that has more of them."""
    return cls(*(getattr(args, field) for field in cls._fields))  # type: ignore[attr-defined]


def tensor_fields(cls: type[Any]) -> tuple[int, ...]:
    """The places of the fields that are tensors."""
    return tuple(i for i, kind in enumerate(argument_types(cls).values()) if "Tensor" in kind)


def argument_types(cls: type[Any]) -> dict[str, str]:
    """The torch schema's type of each field."""
    return {name: _torch_type(t) for name, t in get_type_hints(cls, include_extras=True).items()}


def _torch_type(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        (present,) = (t for t in get_args(annotation) if t is not NoneType)
        return _torch_type(present) + "?"
    if annotation == Written:
        return "Tensor(a!)"
    return str(annotation.__name__)


def schema(name: str, *options: str, returns_gradient: bool = False) -> str:
    """The schema of operator `name` as torch writes it.

    Args:
        name: a key of OPERATORS.
        options: further arguments, such as "str? backend".
        returns_gradient: `grad_logits` is returned, instead of an argument that is written.
    """
    operator = OPERATORS[name]
    types = argument_types(operator.args)
    outputs = operator.outputs
    if returns_gradient:
        types = {field: kind for field, kind in types.items() if field != "grad_logits"}
        outputs = "grad_logits"
    arguments = ", ".join([*_declared(types), *options])
    return f"({arguments}) -> {returned(outputs)}"


def schema_of(returns: str, *classes: type[Any]) -> str:
    """The schema of an operator that takes the fields of `classes`, one after the other."""
    arguments = [text for cls in classes for text in _declared(argument_types(cls))]
    return f"({', '.join(arguments)}) -> {returns}"


def _declared(types: dict[str, str]) -> list[str]:
    return [f"{kind} {field}" for field, kind in types.items()]


def returned(outputs: Any) -> str:
    """The results as a schema declares them: of a class, the only one by its name, or None."""
    if outputs is None:
        return "()"
    if isinstance(outputs, str):
        return f"Tensor {outputs}"
    return f"({', '.join(f'Tensor {field}' for field in outputs._fields)})"


# A token that is not among a row's logits; no id that anybody means.
NO_TOKEN = -(1 << 62)

# `algebra.RowState` and the token's position from the anchors, which is +inf where it is NO_TOKEN.
# A row that is masked, or a part that is all -inf, has sums of 0.
STATE_FIELDS = ("anchor", "sx", "ex", "token_tx", "ref_anchor", "sy", "rk", "fk", "token_ty")


def state_fields(has_ref: bool) -> tuple[str, ...]:
    """The fields of the state of a part, which are fewer without a reference."""
    return STATE_FIELDS if has_ref else STATE_FIELDS[:4]


# Sums over the parts of a vocabulary, once their row is finished; 0 where masked.
MIXTURE_SUMS = ("jsd", "mixture_kl")

# The per-token KL a reward can be shaped with, in the order kernels number them.
Estimator = Literal["k1", "exact", "k2", "k3", "abs"]
ESTIMATORS = get_args(Estimator)

# Accepted by `backend=`: the keys of `dispatch.BACKENDS`.
BackendName = Literal["triton", "cuda", "cpu", "reference"]

# Terms that `policy_loss` returns for every token, [8, B, T]. The sum of the first over the batch
# is the loss, the others are to be averaged; 0 where masked.
POLICY_LOSS_TERMS = (
    "loss",
    "clip_fraction",
    "clip_fraction_dual",
    "approx_kl",
    "approx_kl_k1",
    "ratio_mean",
    "kl",
    "entropy",
)


def output_dtype(logits: Tensor) -> torch.dtype:
    """Float32 for every dtype that is trained in; float64 stays, so that gradcheck can be used."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
