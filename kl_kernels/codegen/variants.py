"""Every kernel with the arguments that decide what it compiles to, as `launch.py` passes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kl_kernels.triton_kernels import launch
from kl_kernels.triton_kernels.backward import backward_kernel
from kl_kernels.triton_kernels.fold import finish_kernel, fold_kernel, part_kernel
from kl_kernels.triton_kernels.loss import policy_loss_kernel
from kl_kernels.triton_kernels.mixture import mix_backward_kernel, mix_kernel
from kl_kernels.triton_kernels.scale import scale_kernel
from kl_kernels.triton_kernels.scan import gae_kernel

LOGITS = torch.bfloat16
PER_TOKEN = torch.float32
SCALES: dict[str, Any] = {"k": 1.5, "ref_k": 1.5, "softcap": None, "ref_softcap": None}


@dataclass(frozen=True)
class Variant:
    name: str
    kernel: Any
    arguments: dict[str, Any]  # a dtype stands for a pointer to it
    # Names of the loops over the vocabulary, in program order; without them, work per token only.
    loops: tuple[str, ...] = ()
    unit: str = ""  # "logit", or "pair" of a policy's and a reference's
    units: int = 0  # in one iteration of one thread


@dataclass(frozen=True)
class Shape:
    """Of the logits, [1, rows, vocab_size]: what is known of it is compiled in."""

    rows: int
    vocab_size: int

    @property
    def logits(self) -> torch.Tensor:
        return torch.empty((1, self.rows, self.vocab_size), dtype=LOGITS, device="meta")

    def sizes(self, split: int) -> dict[str, int]:
        strides = launch.strides_of(self.logits, None)
        names = ("batch_stride", "token_stride", "ref_batch_stride", "ref_token_stride")
        return {
            "n_rows": self.rows, "n_tokens": self.rows, "vocab_size": self.vocab_size,
            "n_splits": -(-self.vocab_size // split), **dict(zip(names, strides)),
        }  # fmt: skip

    def grad_strides(self) -> dict[str, int]:
        return dict(zip(("grad_batch_stride", "grad_token_stride"), self.logits.stride()))

    def tile(self) -> dict[str, int]:
        return launch.tile_of(self.logits)

    @property
    def aligned(self) -> bool:
        """Whether a thread reads more than one logit at once."""
        return self.tile()["LANE"] > 1


def variants(shape: Shape) -> list[Variant]:
    return [
        _fold("policy and reference", shape, ref=True),
        _fold("policy", shape, ref=False),
        _backward("KL", shape, kl=True, forward_kl=False),
        _backward("both KLs", shape, kl=True, forward_kl=True),
        _backward("no KL", shape, kl=False, forward_kl=False),
        _policy_loss("policy and reference", shape, ref=True),
        _policy_loss("policy", shape, ref=False),
        _mix("whole rows", shape, given=False),
        _mix("parts", shape, given=True),
        _mix_backward(shape),
        _scale(shape),
        _finish("policy", shape, ref=False, rewards=False),
        _finish("both KLs", shape, ref=True, rewards=False),
        _finish("rewards", shape, ref=True, rewards=True),
        _part(shape),
        _gae(),
    ]


def _fold(name: str, shape: Shape, *, ref: bool) -> Variant:
    tile = shape.tile()
    split = launch.CONFIG.fold_split
    arguments: dict[str, Any] = dict(
        logits_ptr=LOGITS, ref_ptr=_if(ref, LOGITS), token_ids_ptr=torch.int64, mask_ptr=torch.bool,
        states_ptr=PER_TOKEN, SPLIT=split, **shape.sizes(split), **SCALES, **tile,
    )  # fmt: skip
    unit = "pair" if ref else "logit"
    loops = ("fast", "careful")
    return Variant(f"fold: {name}", fold_kernel, arguments, loops, unit, _per_thread(tile))


def _backward(name: str, shape: Shape, *, kl: bool, forward_kl: bool) -> Variant:
    """With gradients of log-probability and entropy in any case."""
    tile = shape.tile()
    split = launch.CONFIG.backward_split
    of_ref = _if(kl, PER_TOKEN)
    arguments: dict[str, Any] = dict(
        grad_logprob_ptr=PER_TOKEN, grad_kl_ptr=of_ref, grad_entropy_ptr=PER_TOKEN,
        grad_forward_kl_ptr=_if(forward_kl, PER_TOKEN),
        logits_ptr=LOGITS, ref_ptr=_if(kl, LOGITS), token_ids_ptr=torch.int64, mask_ptr=torch.bool,
        policy_state_ptr=PER_TOKEN, ref_state_ptr=of_ref, kl_ptr=of_ref, entropy_ptr=PER_TOKEN,
        grad_logits_ptr=LOGITS, temperature=0.9, SPLIT=split,
        **shape.sizes(split), **shape.grad_strides(), **SCALES, **tile,
    )  # fmt: skip
    unit = "pair" if kl else "logit"
    return Variant(
        f"backward: {name}", backward_kernel, arguments, ("tiles",), unit, _per_thread(tile)
    )


def _policy_loss(name: str, shape: Shape, *, ref: bool) -> Variant:
    """With entropy in the loss, and the exact KL where there is a reference."""
    tile = launch.whole_row_tile(shape.logits)
    sizes = shape.sizes(shape.vocab_size)
    del sizes["n_splits"]
    arguments: dict[str, Any] = dict(
        logits_ptr=LOGITS, ref_ptr=_if(ref, LOGITS), token_ids_ptr=torch.int64, mask_ptr=torch.bool,
        old_logprob_ptr=PER_TOKEN, advantage_ptr=PER_TOKEN, token_weight_ptr=PER_TOKEN,
        importance_weight_ptr=None, ref_logprob_ptr=None, terms_ptr=PER_TOKEN,
        grad_logits_ptr=LOGITS, temperature=0.9,
        clip_low=0.2, clip_high=0.2, dual_clip=3.0, log_ratio_clamp=20.0,
        kl_coef=0.1 * ref, entropy_coef=0.01, ESTIMATOR=1, HAS_KL=ref, HAS_ENTROPY=True,
        **sizes, **shape.grad_strides(), **SCALES, **tile,
    )  # fmt: skip
    unit = "pair" if ref else "logit"
    loops = ("fast", "careful", "gradient")
    return Variant(
        f"policy loss: {name}", policy_loss_kernel, arguments, loops, unit, _per_thread(tile)
    )


def _mix(name: str, shape: Shape, *, given: bool) -> Variant:
    tile = launch.whole_row_tile(shape.logits)
    sizes = shape.sizes(shape.vocab_size)
    del sizes["n_splits"]
    arguments: dict[str, Any] = dict(
        logits_ptr=LOGITS, ref_ptr=LOGITS, mask_ptr=torch.bool, policy_state_ptr=PER_TOKEN,
        ref_state_ptr=PER_TOKEN, jsd_ptr=PER_TOKEN, mixture_kl_ptr=PER_TOKEN,
        weight=0.5, ref_weight=0.5, GIVEN=given, **sizes, **SCALES, **tile,
    )  # fmt: skip
    loops = ("second",) if given else ("fast", "careful", "second")
    return Variant(f"mixture: {name}", mix_kernel, arguments, loops, "pair", _per_thread(tile))


def _mix_backward(shape: Shape) -> Variant:
    tile = shape.tile()
    split = launch.CONFIG.backward_split
    arguments: dict[str, Any] = dict(
        grad_jsd_ptr=PER_TOKEN, logits_ptr=LOGITS, ref_ptr=LOGITS, mask_ptr=torch.bool,
        policy_state_ptr=PER_TOKEN, ref_state_ptr=PER_TOKEN, mixture_kl_ptr=PER_TOKEN,
        grad_logits_ptr=LOGITS, weight=0.5, ref_weight=0.5, temperature=0.9, SPLIT=split,
        **shape.sizes(split), **shape.grad_strides(), **SCALES, **tile,
    )  # fmt: skip
    return Variant(
        "backward: mixture", mix_backward_kernel, arguments, ("tiles",), "pair", _per_thread(tile)
    )


def _scale(shape: Shape) -> Variant:
    tile = shape.tile()
    batch_stride, token_stride, _ = shape.logits.stride()
    arguments: dict[str, Any] = dict(
        gradient_ptr=LOGITS, factor_ptr=PER_TOKEN, n_rows=shape.rows, n_tokens=shape.rows,
        vocab_size=shape.vocab_size, batch_stride=batch_stride, token_stride=token_stride, **tile,
    )  # fmt: skip
    return Variant("scale", scale_kernel, arguments, ("tiles",), "logit", _per_thread(tile))


def _finish(name: str, shape: Shape, *, ref: bool, rewards: bool) -> Variant:
    of_ref, of_rewards = _if(ref, PER_TOKEN), _if(rewards, PER_TOKEN)
    arguments: dict[str, Any] = dict(
        states_ptr=PER_TOKEN, logits_ptr=LOGITS, ref_ptr=_if(ref, LOGITS),
        token_ids_ptr=torch.int64, mask_ptr=torch.bool, logprob_ptr=PER_TOKEN,
        ref_logprob_ptr=of_ref, kl_ptr=of_ref, forward_kl_ptr=of_ref, entropy_ptr=PER_TOKEN,
        policy_state_ptr=PER_TOKEN, ref_state_ptr=of_ref,
        rewards_ptr=of_rewards, correction_ptr=of_rewards,
        scores_ptr=of_rewards, score_index_ptr=_if(rewards, torch.int64),
        kl_coef=0.1, kl_clip=None, ESTIMATOR=0, ROWS=launch.CONFIG.finish_rows,
        **shape.sizes(launch.CONFIG.fold_split), **SCALES,
    )  # fmt: skip
    return Variant(f"finish: {name}", finish_kernel, arguments)


def _part(shape: Shape) -> Variant:
    arguments: dict[str, Any] = dict(
        states_ptr=PER_TOKEN, logits_ptr=LOGITS, ref_ptr=LOGITS, token_ids_ptr=torch.int64,
        mask_ptr=torch.bool, state_ptr=PER_TOKEN, ROWS=launch.CONFIG.finish_rows,
        **shape.sizes(launch.CONFIG.fold_split), **SCALES,
    )  # fmt: skip
    return Variant("part of a vocabulary", part_kernel, arguments)


def _gae() -> Variant:
    arguments = {
        "rewards_ptr": PER_TOKEN, "values_ptr": PER_TOKEN, "mask_ptr": torch.bool,
        "advantages_ptr": PER_TOKEN, "returns_ptr": PER_TOKEN,
        "n_tokens": 1024, "gamma": 0.99, "lam": 0.95,
        "SKIP_MASKED": True, "BLOCK_T": launch.CONFIG.gae_block,
    }  # fmt: skip
    return Variant("gae", gae_kernel, arguments)


def _if(there: bool, dtype: torch.dtype) -> torch.dtype | None:
    return dtype if there else None


def _per_thread(tile: dict[str, int]) -> int:
    return tile["STEPS"] * tile["LANE"]
