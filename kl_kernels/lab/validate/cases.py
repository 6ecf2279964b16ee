"""Inputs on which fused softmax and KL kernels have failed, each reproducible by name."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Inputs:
    """Arguments of `token_kl`; with rows [B, T] that exercise the same difficulty."""

    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor | None = None  # [B, T]
    temperature: float = 1.0
    ref_temperature: float | None = None
    softcap: float | None = None
    ref_softcap: float | None = None

    def to(self, dtype: torch.dtype, ref_dtype: torch.dtype | None = None) -> Inputs:
        """Return the inputs rounded to `dtype`, from which the true values are then computed."""
        return replace(
            self,
            logits=_rounded(self.logits, dtype),
            ref_logits=_rounded(self.ref_logits, ref_dtype or dtype),
        )

    def on(self, device: str) -> Inputs:
        return replace(
            self,
            logits=self.logits.to(device),
            ref_logits=self.ref_logits.to(device),
            token_ids=self.token_ids.to(device),
            mask=None if self.mask is None else self.mask.to(device),
        )


def _rounded(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite logit stays finite in a smaller range."""
    limits = torch.finfo(dtype)
    return torch.where(logits.isfinite(), logits.clamp(limits.min, limits.max), logits).to(dtype)


@dataclass(frozen=True)
class Case:
    difficulty: str
    vocab_size: int
    dtype: torch.dtype
    ref_dtype: torch.dtype | None = None  # None: the policy's

    @property
    def name(self) -> str:
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.ref_dtype) if d]
        return f"{self.difficulty}-{self.vocab_size}-{'-'.join(dtypes)}"

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return DIFFICULTIES[self.difficulty](self.vocab_size, generator).to(
            self.dtype, self.ref_dtype
        )


ROWS = (2, 2)  # B, T: enough for strides over both to matter


def _random(vocab_size: int, g: torch.Generator, spread: float = 3.0) -> Inputs:
    return Inputs(
        logits=spread * torch.randn(*ROWS, vocab_size, generator=g),
        ref_logits=spread * torch.randn(*ROWS, vocab_size, generator=g),
        token_ids=torch.randint(vocab_size, ROWS, generator=g),
    )


def _random_rows(vocab_size: int, g: torch.Generator) -> Inputs:
    return _random(vocab_size, g)


def _wide(vocab_size: int, g: torch.Generator) -> Inputs:
    """Logits uniform in +-50, the widest range accuracy is promised for."""
    inputs = _random(vocab_size, g)
    wide = [100 * torch.rand(*ROWS, vocab_size, generator=g) - 50 for _ in range(2)]
    return replace(inputs, logits=wide[0], ref_logits=wide[1])


def _peaked(vocab_size: int, g: torch.Generator) -> Inputs:
    """The token has nearly all the probability: p_token -> 1 cancels in its gradient."""
    inputs = _random(vocab_size, g)
    return replace(inputs, logits=_raise_token(inputs.logits, inputs.token_ids, 25.0))


def _raise_token(logits: Tensor, token_ids: Tensor, by: float) -> Tensor:
    return logits.scatter_add(-1, token_ids[..., None], torch.full((*ROWS, 1), by))


def _late_peak(vocab_size: int, g: torch.Generator) -> Inputs:
    """The maximum is the last logit and is not the token: an anchor taken early is far too low."""
    inputs = _random(vocab_size, g)
    logits, ref_logits = inputs.logits.clone(), inputs.ref_logits.clone()
    logits[..., -1], ref_logits[..., -1] = 300.0, 250.0
    return replace(
        inputs, logits=logits, ref_logits=ref_logits, token_ids=torch.zeros(ROWS, dtype=torch.long)
    )


def _unlikely_token(vocab_size: int, g: torch.Generator) -> Inputs:
    """The token has hardly any probability."""
    inputs = _random(vocab_size, g)
    return replace(inputs, logits=_raise_token(inputs.logits, inputs.token_ids, -60.0))


def _near(vocab_size: int, g: torch.Generator) -> Inputs:
    """The reference is the policy but for one part in a thousand: KL is tiny and p - q cancels."""
    inputs = _random(vocab_size, g)
    noise = 1e-3 * torch.randn(*ROWS, vocab_size, generator=g)
    return replace(inputs, ref_logits=inputs.logits + noise)


def _equal(vocab_size: int, g: torch.Generator) -> Inputs:
    """The reference is the policy: KL is exactly 0."""
    inputs = _random(vocab_size, g)
    return replace(inputs, ref_logits=inputs.logits.clone())


def _offset(vocab_size: int, g: torch.Generator) -> Inputs:
    """Large offsets, different in both: log p = x - logsumexp loses all digits if done naively."""
    inputs = _random(vocab_size, g)
    return replace(inputs, logits=inputs.logits + 1e4, ref_logits=inputs.ref_logits - 9e3)


def _flat(vocab_size: int, g: torch.Generator) -> Inputs:
    """All logits equal: the entropy is ln V."""
    inputs = _random(vocab_size, g)
    return replace(inputs, logits=torch.full_like(inputs.logits, 7.0))


def _ruled_out(*, policy: bool, ref: bool) -> Callable[[int, torch.Generator], Inputs]:
    """A third of the vocabulary is -inf (top-k, padding) in the policy, the reference or both.

    In the reference alone, KL is +inf and forward KL is not.
    """

    def make(vocab_size: int, g: torch.Generator) -> Inputs:
        inputs = _random(vocab_size, g)
        out = torch.rand(*ROWS, vocab_size, generator=g) < 1 / 3
        out.scatter_(-1, inputs.token_ids[..., None], False)
        logits = inputs.logits.masked_fill(out, NEG_INF) if policy else inputs.logits
        ref_logits = inputs.ref_logits.masked_fill(out, NEG_INF) if ref else inputs.ref_logits
        return replace(inputs, logits=logits, ref_logits=ref_logits)

    return make


def _leading_block(vocab_size: int, g: torch.Generator) -> Inputs:
    """The first two thirds are -inf in both: whole blocks without a finite maximum."""
    inputs = _random(vocab_size, g)
    start = 2 * vocab_size // 3
    logits, ref_logits = inputs.logits.clone(), inputs.ref_logits.clone()
    logits[..., :start], ref_logits[..., :start] = NEG_INF, NEG_INF
    token_ids = inputs.token_ids.clamp_min(start)
    return replace(inputs, logits=logits, ref_logits=ref_logits, token_ids=token_ids)


def _padded(vocab_size: int, g: torch.Generator) -> Inputs:
    """Padding columns hold the dtype's smallest number instead of -inf, in both."""
    inputs = _random(vocab_size, g)
    logits, ref_logits = inputs.logits.clone(), inputs.ref_logits.clone()
    keep = max(1, 7 * vocab_size // 8)
    lowest = torch.finfo(torch.float32).min  # the smallest of its dtype once rounded
    logits[..., keep:], ref_logits[..., keep:] = lowest, lowest
    token_ids = inputs.token_ids.clamp_max(keep - 1)
    return replace(inputs, logits=logits, ref_logits=ref_logits, token_ids=token_ids)


def _token_ruled_out(vocab_size: int, g: torch.Generator) -> Inputs:
    """The token itself is -inf: logprob -inf, gradient finite."""
    inputs = _random(vocab_size, g)
    here = inputs.token_ids[..., None]
    if vocab_size == 1:  # nothing would be left
        return inputs
    return replace(inputs, logits=inputs.logits.scatter(-1, here, NEG_INF))


def _masked_nan(vocab_size: int, g: torch.Generator) -> Inputs:
    """Rows outside the mask hold NaN and token ids out of range: 0 everywhere, nothing leaks."""
    inputs = _random(vocab_size, g)
    mask = torch.tensor([[True, False], [False, True]])
    hole = ~mask[..., None]
    return replace(
        inputs,
        logits=inputs.logits.masked_fill(hole, torch.nan),
        ref_logits=inputs.ref_logits.masked_fill(hole, torch.nan),
        token_ids=inputs.token_ids.masked_fill(~mask, -100),
        mask=mask,
    )


def _nan_row(vocab_size: int, g: torch.Generator) -> Inputs:
    """One row has a NaN, one +inf, one only -inf: they are NaN and the fourth is not touched."""
    inputs = _random(vocab_size, g)
    logits = inputs.logits.clone()
    logits[0, 0, vocab_size // 2] = torch.nan
    logits[0, 1, vocab_size // 2] = torch.inf
    logits[1, 0] = NEG_INF
    return replace(inputs, logits=logits)


def _temperature(vocab_size: int, g: torch.Generator) -> Inputs:
    return replace(_random(vocab_size, g), temperature=0.7, ref_temperature=1.3)


def _softcap(vocab_size: int, g: torch.Generator) -> Inputs:
    """Caps that bend the logits, of both; and -inf, which a cap must not lift."""
    inputs = _ruled_out(policy=True, ref=True)(vocab_size, g)
    return replace(inputs, softcap=5.0, ref_softcap=8.0, temperature=0.9)


DIFFICULTIES: dict[str, Callable[[int, torch.Generator], Inputs]] = {
    "random": _random_rows,
    "wide": _wide,
    "peaked": _peaked,
    "late-peak": _late_peak,
    "unlikely-token": _unlikely_token,
    "near": _near,
    "equal": _equal,
    "offset": _offset,
    "flat": _flat,
    "policy-inf": _ruled_out(policy=True, ref=False),
    "ref-inf": _ruled_out(policy=False, ref=True),
    "both-inf": _ruled_out(policy=True, ref=True),
    "leading-block": _leading_block,
    "padded": _padded,
    "token-inf": _token_ruled_out,
    "masked-nan": _masked_nan,
    "nan-row": _nan_row,
    "temperature": _temperature,
    "softcap": _softcap,
}
HALF_DTYPES = (torch.bfloat16, torch.float16)


def grid(vocab_sizes: tuple[int, ...]) -> list[Case]:
    """Every difficulty at every size and dtype, and mixed dtypes where the others are easy."""
    cases = [
        Case(difficulty, vocab_size, dtype)
        for vocab_size in vocab_sizes
        for difficulty in DIFFICULTIES
        for dtype in (torch.float32, *HALF_DTYPES)
    ]
    mixed = [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), HALF_DTYPES]
    return cases + [Case("random", v, d, r) for v in vocab_sizes for d, r in mixed]
