"""A call for every number: a public function or an operator, and its arguments, some hostile."""

import inspect
import random
from dataclasses import dataclass, field
from typing import Any

import fuzz_arguments as hostile
import numpy as np
import torch
from fuzz_truth import TRUTHS

import kl_kernels
from kl_kernels.backends import compiled as native
from kl_kernels.rl.losses import AGGREGATIONS
from kl_kernels.schemas import OPERATORS

FUNCTIONS = tuple(
    name for name in sorted(kl_kernels.__all__) if inspect.isfunction(getattr(kl_kernels, name))
)
BACKENDS = ("cpu", "reference", None)


@dataclass
class Call:
    name: str
    function: Any
    arguments: dict[str, Any]
    changed: dict[str, str] = field(default_factory=dict)
    expected: str = hostile.VALID
    direct: bool = False  # an operator, whose values are its caller's business

    def __str__(self) -> str:
        def text(value: Any) -> str:
            if not isinstance(value, torch.Tensor):
                return repr(value)
            return f"{str(value.dtype)[6:]}{list(value.shape)}{list(value.stride())}@{value.device}"

        arguments = ", ".join(f"{name}={text(value)}" for name, value in self.arguments.items())
        return f"{self.name}({arguments}) changed: {self.changed}"


def _options(random_: random.Random, **choices: tuple[Any, ...]) -> dict[str, Any]:
    return {name: random_.choice(of) for name, of in choices.items() if random_.random() < 0.4}


def valid_arguments(name: str, random_: random.Random) -> dict[str, Any]:
    """Make valid arguments for any public function."""
    g = torch.Generator().manual_seed(random_.randrange(1 << 30))
    b, t, v, d, k = (
        random_.choice(sizes)
        for sizes in ((1, 2, 3), (1, 2, 5), (1, 3, 17, 130), (1, 4), (1, 2, 3))
    )
    k = min(k, v)
    dtype = random_.choice(hostile.FLOATS[:1] * 3 + hostile.FLOATS)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=g) * 2).to(dtype)

    ids = torch.randint(v, (b, t), generator=g)
    mask = torch.rand((b, t), generator=g) < 0.7
    of_logits = _options(
        random_,
        mask=(mask, mask.float(), mask.long()),
        temperature=(0.5, 1, 2.0),
        softcap=(5.0, 30, None),
        backend=BACKENDS if dtype != torch.float64 else BACKENDS[1:],
    )
    of_both = {
        **of_logits,
        **_options(random_, ref_temperature=(0.7, None), ref_softcap=(20.0, None)),
    }
    listed = torch.rand((b, t, v), generator=g) < random_.choice((0.1, 0.5, 1.0))
    listed &= torch.rand((b, t, 1), generator=g) < 0.8  # some rows list nothing
    listed |= listed.any(-1, keepdim=True) & torch.nn.functional.one_hot(ids, v).bool()
    support = _options(random_, support=(kl_kernels.Support.from_mask(listed),))
    supports = {**support, **_options(random_, ref_support=("same", "full"))}
    jsd = {**of_both, **_options(random_, beta=(0, 1, 0.5, 0.1, 1e-6))}
    logits, ref_logits = normal(b, t, v), normal(b, t, v)
    float_tokens = {
        n: normal(b, t) for n in ("kl", "rewards", "values", "logprobs", "returns", "advantages")
    }
    if name == "token_stats":
        return {"logits": logits, "token_ids": ids, **of_logits, **support}
    if name == "token_kl":
        return {"logits": logits, "ref_logits": ref_logits, "token_ids": ids, **of_both, **supports}
    if name == "token_jsd":
        return {"logits": logits, "ref_logits": ref_logits, **jsd}
    if name == "kl_rewards":
        of_both.pop("mask", None)
        return {
            "logits": logits, "ref_logits": ref_logits, "token_ids": ids, "scores": normal(b),
            "mask": mask, "kl_coef": 0.1, **of_both, **supports,
            **_options(random_, kl_estimator=("k1", "exact"), kl_clip=(1.0, None),
                       score_position=("last_token", "after_last"), score_clip=(0.5, None)),
        }  # fmt: skip
    if name == "selective_log_softmax":
        several = torch.randint(v, (b, t, k), generator=g)
        options = {n: of_logits[n] for n in ("temperature", "backend") if n in of_logits}
        masks = _options(random_, row_mask=(mask, mask.long()))
        index = random_.choice(({"index": ids, **support}, {"index": several}))
        return {"logits": logits, **index, **options, **masks}
    if name == "topk_kl":
        size = v if k == v else v + 3  # a list of all tokens leaves nothing; another does
        whole = torch.randn((b, t, size), generator=g).log_softmax(-1)
        topk_ids = torch.rand((b, t, v), generator=g).topk(k).indices
        options = {**of_logits, **_options(random_, beta=(0, 1, 0.5, 0.1))}
        return {"logits": logits, "topk_ids": topk_ids, "topk_logprobs": whole[..., :k], **options}
    if name.startswith("linear_token_"):
        head = {"hidden": normal(b, t, d), "weight": normal(v, d)}
        if name != "linear_token_stats":
            head |= {"ref_hidden": normal(b, t, d + 1), "ref_weight": normal(v, d + 1)}
        head |= {} if name == "linear_token_jsd" else {"token_ids": ids}
        given = {"linear_token_stats": of_logits, "linear_token_kl": of_both}.get(name, jsd)
        scales = _options(
            random_, logit_scale=(0.25, 1.0), bias=(normal(v), None), memory_budget=(1 << 20,)
        )
        return {**head, **given, **scales}
    if name.endswith("_policy_loss") and name != "ppo_policy_loss":
        of_both.pop("mask", None)
        models, ref_models = {"logits": logits}, {"ref_logits": ref_logits}
        if name == "linear_policy_loss":
            models = {"hidden": normal(b, t, d), "weight": normal(v, d)}
            ref_models = {"ref_hidden": normal(b, t, d + 1), "ref_weight": normal(v, d + 1)}
            of_both.pop("inplace_backward", None)
            supports = {}
        reference = random_.choice(({}, ref_models | {"kl_loss_coef": 0.1}))
        return {
            **models, "token_ids": ids, "old_logprobs": -normal(b, t).abs(), "mask": mask,
            "advantages": normal(b, t), **reference, **of_both, **supports,
            **_options(random_, aggregation=("token-mean", "seq-mean-token-sum"), dual_clip=(3.0,),
                       entropy_coef=(0.01,), weights=(normal(b, t).abs(),)),
        }  # fmt: skip
    if name == "compute_gae":
        arguments = {n: float_tokens[n] for n in ("rewards", "values")}
        return {
            **arguments,
            "mask": mask,
            **_options(
                random_,
                gamma=(0.9, 1),
                lam=(0, 1.0),
                masked=("skip", "zero"),
                backend=(None, "reference"),
            ),
        }
    if name == "compute_rewards":
        options = _options(random_, score_clip=(0.5, None), kl_clip=(0.3, None))
        return {
            "scores": normal(b),
            "kl": float_tokens["kl"],
            "mask": mask,
            "kl_coef": 0.2,
            **options,
        }
    if name == "kl_penalty":
        kinds = ("k1", "k2", "k3", "abs", "k3+", "mse")
        return {
            "logprobs": float_tokens["logprobs"],
            "ref_logprobs": normal(b, t),
            **_options(
                random_, kl_penalty=kinds, mask=(mask,), kl_clamp=(10.0,), log_ratio_clamp=(20.0,)
            ),
        }
    if name == "importance_weights":
        options = _options(
            random_, mode=("truncate", "mask"), level=("token", "sequence", "geometric")
        )
        return {
            "logprobs": normal(b, t),
            "rollout_logprobs": -normal(b, t).abs(),
            "mask": mask,
            **options,
        }
    if name == "ppo_policy_loss":
        arguments = {n: -normal(b, t).abs() for n in ("logprobs", "old_logprobs", "advantages")}
        options = _options(random_, dual_clip=(3.0,), clip_low=(0.1,), denominator=(7,))
        return {**arguments, "mask": mask, **options}
    if name == "ppo_value_loss":
        arguments = {n: normal(b, t) for n in ("values", "old_values", "returns")}
        return {**arguments, "mask": mask, **_options(random_, clip_range=(0.1, None))}
    if name in ("aggregate", "global_denominator"):
        options = _options(random_, aggregation=AGGREGATIONS)
        if name == "aggregate":
            options |= {"loss_per_token": normal(b, t), **_options(random_, denominator=(7,))}
        return {"mask": mask, **options}
    if name == "sampling_gap":
        of_tokens = {n: normal(b, t).abs() for n in ("logprob", "entropy")}
        return {"logprob": -of_tokens["logprob"], "entropy": of_tokens["entropy"], "mask": mask}
    if name.startswith("masked_"):
        options = {"masked_whiten": {"shift_mean": (True, False), "eps": (1e-8, 0)}}.get(name, {})
        return {"x": normal(b, t), "mask": mask, **_options(random_, **options)}
    if name == "missing_eos_penalty":
        return {"scores": normal(b), "ended": mask[:, 0], "penalty": 1.0}
    if name == "overlong_penalty":
        return {"lengths": mask.sum(1), "max_length": 10, "buffer": 4}
    if name == "length_normalized_scores":
        return {"scores": normal(b), "mask": mask, **_options(random_, exponent=(0.5, 1))}
    raise ValueError(f"{name} has no arguments here; every public function needs some")


TENSORS = (
    "cu_seqlens",
    "support",
    "mask",
    "row_mask",
    "ref_logits",
    "ref_logprobs",
    "old_logprobs",
    "old_values",
    "weights",
)
OPTIONS = (
    "backend",
    "kl_estimator",
    "ref_support",
    "score_position",
    "aggregation",
    "masked",
    "mode",
    "level",
    "kl_penalty",
    "importance_sampling_level",
    "gradient",
)
# Arguments that are ignored without a reference, or without clip_range.
NOT_ALWAYS_READ = {
    ("fused_policy_loss", "ref_temperature"),
    ("fused_policy_loss", "ref_softcap"),
    ("linear_policy_loss", "ref_temperature"),
    ("linear_policy_loss", "ref_softcap"),
    ("linear_policy_loss", "ref_logit_scale"),
    ("ppo_value_loss", "old_values"),
}
FLAGS = ("inplace_backward", "shift_mean", "unbiased", "biased", "group", "vocab_start", "dim")


def public_call(random_: random.Random) -> Call:
    name = random_.choice(FUNCTIONS)
    function = getattr(kl_kernels, name)
    call = Call(name, function, valid_arguments(name, random_))
    parameters = [p for p in inspect.signature(function).parameters if p not in FLAGS]
    if "cu_seqlens" in parameters and random_.random() < 0.3:
        call.arguments = _packed(call.arguments, random_)
    for parameter in random_.sample(parameters, random_.choice((0, 0, 1, 1, 1, 2))):
        if parameter not in call.arguments and "bias" in parameter:
            continue
        before = call.arguments.get(parameter)
        if isinstance(before, torch.Tensor):
            made = hostile.tensor(before, random_)
        elif parameter in OPTIONS:
            made = hostile.option(random_)
        elif parameter in TENSORS:
            made = hostile.not_a_tensor(random_)
        else:
            made = hostile.number(random_)
        call.arguments[parameter] = made.value
        call.changed[parameter] = made.how
        if (name, parameter) in NOT_ALWAYS_READ:
            made = hostile.Hostile(made.value, hostile.ANY, made.how)
        call.expected = _worse(call.expected, made.expected)
    return call


def _packed(arguments: dict[str, Any], random_: random.Random) -> dict[str, Any]:
    """The same rows end to end, as [N] or [1, N]."""
    b, t = arguments["mask"].shape
    shape = (b * t,) if random_.random() < 0.5 else (1, b * t)
    dtype = random_.choice((torch.int32, torch.int64))

    def flat(value: Any) -> Any:
        of_tokens = isinstance(value, torch.Tensor) and value.shape[:2] == (b, t)
        return value.reshape(*shape, *value.shape[2:]) if of_tokens else value

    packed = {
        name: value if name in ("weight", "ref_weight") else flat(value)
        for name, value in arguments.items()
    }
    return {**packed, "cu_seqlens": torch.arange(0, b * t + 1, t, dtype=dtype)}


def _unpacked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that `_packed` was given."""
    shape, b = arguments["mask"].shape, len(arguments["cu_seqlens"]) - 1
    return {
        name: value.reshape(b, -1)
        if isinstance(value, torch.Tensor) and value.shape == shape and name != "scores"
        else value
        for name, value in arguments.items()
    }


def _worse(one: str, other: str) -> str:
    order = (hostile.VALID, hostile.ANY, hostile.REFUSED)
    return max(one, other, key=order.index)


def _operators() -> list[tuple[str, Any]]:
    ours = [
        (f"torch.ops.kl_kernels.{name}", getattr(torch.ops.kl_kernels, name).default)
        for operator in OPERATORS
        for name in (operator, f"{operator}_")
        if hasattr(torch.ops.kl_kernels, name)
    ]
    native.namespace("cpu")  # loads it
    compiled = torch.ops.kl_kernels_cpu
    return ours + [
        (f"torch.ops.kl_kernels_cpu.{name}", getattr(compiled, name).default) for name in OPERATORS
    ]


def direct_call(random_: random.Random) -> Call:
    """An operator, with tensors of the right shape but for some."""
    name, operator = random_.choice(_operators())
    b, t, v = (
        random_.choice((0, 1, 2, 3)),
        random_.choice((0, 1, 2, 4)),
        random_.choice((0, 1, 3, 40)),
    )
    g = torch.Generator().manual_seed(random_.randrange(1 << 30))
    arguments: dict[str, Any] = {}
    for argument in operator._schema.arguments:
        kind, at = str(argument.type), argument.name
        if kind.startswith("Optional") and random_.random() < 0.3:
            arguments[at] = None
        elif "Tensor" in kind:
            if at in ("logits", "ref_logits", "grad_logits", "gradient"):
                made = torch.randn((b, t, v), generator=g)
            elif at == "token_ids":
                made = torch.randint(
                    -1 if random_.random() < 0.2 else 0, max(v, 1), (b, t), generator=g
                )
            elif at == "skipped_ids":
                made = torch.randint(-1, v + 2, (b, t, random_.choice((0, 1, 5))), generator=g)
                if random_.random() < 0.8:
                    made = made.sort(-1).values
            elif at == "mask":
                made = torch.rand((b, t), generator=g) < 0.5
            elif at.endswith("_state"):
                made = torch.rand((2, b, t), generator=g) + 1
            elif at == "factor":
                made = torch.rand((), generator=g)
            elif at == "cu_seqlens":
                b = 1
                made = torch.randint(-1, t + 2, (random_.choice((0, 1, 2, 4)),), generator=g)
                if random_.random() < 0.8:
                    made = torch.tensor([0, *made.clamp(0, t).sort().values, t])
            elif at == "score_index":
                made = torch.randint(-1, 9, (b,), generator=g)
            else:
                made = torch.randn((b,) if at == "scores" else (b, t), generator=g)
            if random_.random() < 0.1:
                made = hostile.tensor(made, random_).value
            arguments[at] = made
        elif "bool" in kind:
            arguments[at] = random_.random() < 0.5
        elif "float" in kind:
            arguments[at] = random_.choice((1.0, 0.5, 0.0, -1.0, float("nan"), 1e300))
        elif "int" in kind:
            arguments[at] = random_.choice((0, 1, 4, 5, -1, 1 << 40))
        else:
            arguments[at] = random_.choice(("cpu", "reference"))
    return Call(name, operator, arguments, expected=hostile.ANY, direct=True)


def call_of(seed: int) -> Call:
    random_ = random.Random(seed)
    return direct_call(random_) if random_.random() < 0.25 else public_call(random_)


def truth_of(call: Call) -> Any:
    """The function of the arguments in float64, if there is one."""
    truth = TRUTHS.get(call.name)
    if truth is None:
        return None

    def of(arguments: dict[str, Any]) -> Any:
        plain = {name: _plain(value) for name, value in arguments.items()}
        if plain.get("cu_seqlens") is None:
            return truth(plain)
        shape = plain["mask"].shape
        return [expected.reshape(shape) for expected in truth(_unpacked(plain))]

    return of


def _plain(value: Any) -> Any:
    """A number as Python's own."""
    return value.item() if isinstance(value, (np.ndarray, np.generic)) else value
