"""Features of the Triton kernels alone: tiles, splits, two loops per row, alignment, late checks.

Tiles are so small here that some hundred logits make several tiles and splits and a tail. Features
of every backend are tested elsewhere, at the sizes the kernels are launched with.
"""

import argparse
import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from operators import arguments

import kl_kernels
from kl_kernels.backends import reference
from kl_kernels.backends import triton as triton_kernels
from kl_kernels.backends.triton import fold, launch
from kl_kernels.lab.validate.cases import DIFFICULTIES, Case
from kl_kernels.lab.validate.errors import errors
from kl_kernels.schemas import GAEArgs

V = 328  # aligned for every dtype; see SMALL for what becomes of it
TILE, SPLIT = 64, 256
# In float32 a tile is 64 logits, so a row has a split of four tiles and one of 64 + 8; in bfloat16
# 128 logits and splits of two tiles and of 72. Unaligned rows have tiles of 64 as well.
SMALL = {
    "lanes": 16,
    "steps": 1,
    "unaligned_steps": 4,
    "fold_split": SPLIT,
    "backward_split": 128,
    "finish_rows": 4,
    "gae_block": 4,
    "policy_loss_lanes": 16,
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(launch, "CONFIG", dataclasses.replace(launch.CONFIG, **SMALL))


@pytest.fixture
def folded_again(monkeypatch):
    """One entry for each split that the running-max loop has folded."""
    splits, fold_running_max = [], fold.fold_running_max

    def record(*args):
        splits.append(args)
        return fold_running_max(*args)

    monkeypatch.setattr(fold, "fold_running_max", record)
    return splits


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = (3 * torch.randn(2, 2, V, generator=g) for _ in range(2))
    return logits, ref_logits, torch.randint(V, (2, 2), generator=g)


def token_kl(logits, ref_logits, token_ids, mask=None, **transforms):
    given = {"logits": logits, "ref_logits": ref_logits, "token_ids": token_ids, "mask": mask}
    return triton_kernels.token_kl(arguments("token_kl", **given, **transforms))


# Lanes of 4, of 8, and of 1 for rows that are not aligned.
LAYOUTS = [(V, torch.float32), (V, torch.bfloat16), (V - 27, torch.float32)]


@pytest.mark.parametrize(
    ("difficulty", "layout"),
    [
        *(("random", layout) for layout in LAYOUTS[1:]),
        *zip(DIFFICULTIES, itertools.cycle(LAYOUTS)),  # each in one: they take seconds
    ],
)
def test_tiles_and_splits_change_nothing(difficulty, layout):
    assert_true(Case(difficulty, *layout))


def test_a_pair_of_dtypes_is_read_in_the_lanes_of_the_wider():
    assert_true(Case("random", V, torch.bfloat16, torch.float32))
    assert_true(Case("offset", V, torch.float32, torch.bfloat16))


def assert_true(*cases):
    wrong = [e for case in cases for e in errors(case, "triton") if not e.accepted]
    assert not wrong, "\n".join(map(str, wrong))


# Rows that are read once.


def test_ordinary_rows_and_padded_columns_are_folded_once(inputs, folded_again):
    logits, ref_logits, token_ids = inputs
    for padding in (0, 5, V - SPLIT - TILE):
        for x in (logits, ref_logits):
            x[..., V - padding :] = -torch.inf
        token_kl(logits, ref_logits, token_ids.clamp_max(SPLIT))
        assert not folded_again


LOWEST = torch.finfo(torch.float32).min
TROUBLES = [
    (-torch.inf, -torch.inf),
    (LOWEST, LOWEST),
    (-torch.inf, 0.0),
    (0.0, LOWEST),
    (torch.nan, 0.0),
    (0.0, torch.nan),
    (torch.inf, 0.0),
    (0.0, torch.inf),
    (40.0, 0.0),
    (0.0, 40.0),
]


@pytest.mark.parametrize("where", [0, TILE + 1, SPLIT - TILE, SPLIT + 1])
def test_only_the_split_in_trouble_is_folded_again(where, inputs, folded_again):
    in_first_tile, in_last_tile = where in (0, SPLIT + 1), where == SPLIT - TILE
    for trouble in TROUBLES:
        logits, ref_logits, token_ids = (t.clone() for t in inputs)
        logits[0, 1, where], ref_logits[0, 1, where] = trouble
        folded_again.clear()
        token_kl(logits, ref_logits, token_ids)
        # The anchor is the first tile's maximum, and the last tile takes -inf for what it is.
        fine = (in_first_tile and 40.0 in trouble) or (in_last_tile and min(trouble) <= LOWEST)
        assert len(folded_again) == (not fine), trouble


def test_rows_that_rule_tokens_out_in_the_first_tile_skip_the_anchored_loop(inputs, monkeypatch):
    guarded, fold_tile = [], fold.fold_tile

    def record(*args):
        guarded.append(args[-1])
        return fold_tile(*args)

    monkeypatch.setattr(fold, "fold_tile", record)
    logits, ref_logits, token_ids = inputs
    token_kl(logits, ref_logits, token_ids)
    assert False in guarded
    guarded.clear()
    logits[..., 1::2] = -torch.inf
    token_kl(logits, ref_logits, token_ids)
    assert False not in guarded


def test_the_sampled_token_anchors_a_late_peak(inputs, folded_again):
    logits, ref_logits, token_ids = inputs
    late = TILE + 7
    token_ids[:] = late
    logits[..., late], ref_logits[..., late] = 90.0, 80.0
    result = token_kl(logits, ref_logits, token_ids)
    assert not folded_again
    torch.testing.assert_close(result[0], torch.zeros(2, 2), rtol=0.0, atol=1e-7)  # logprob


def test_both_loops_agree(inputs, monkeypatch):
    once = token_kl(*inputs)[:5]
    monkeypatch.setattr(fold, "is_sound", lambda s, of, has_ref: s.sx != s.sx)
    for a, b in zip(once, token_kl(*inputs)[:5]):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


# Infinite KL is decided by support, in either loop, however small the weight.


@pytest.mark.parametrize("where", [3, TILE + 1, SPLIT - 1, V - 1])
@pytest.mark.parametrize("x", [0.0, -200.0, -65504.0, torch.finfo(torch.float32).min])
def test_kl_is_infinite_where_the_reference_has_no_support(x, where, inputs):
    logits, ref_logits, token_ids = inputs
    token_ids[:] = 5
    logits[0, 0, where], ref_logits[0, 0, where] = x, -torch.inf
    logits[0, 1, where], ref_logits[0, 1, where] = -torch.inf, x
    logits[1, 0, where], ref_logits[1, 0, where] = -torch.inf, -torch.inf
    _, _, kl, forward_kl, _, _, _ = token_kl(logits, ref_logits, token_ids)
    infinite = torch.tensor([[True, False], [False, False]])
    assert torch.equal(kl == torch.inf, infinite)
    assert torch.equal(forward_kl == torch.inf, infinite.flip(1))


def test_kl_is_finite_over_lowest_logits(inputs):
    logits, ref_logits, token_ids = inputs
    logits[..., TILE : TILE + 9], ref_logits[..., TILE : TILE + 9] = 12.0, LOWEST
    # At temperature 2 the lowest logit is representable in log2 units, the sum of a few is not.
    kl = token_kl(logits, ref_logits, token_ids, temperature=2.0, ref_temperature=2.0).kl
    assert ((kl > 1e20) & (kl < torch.inf)).all()


# Results and gradients of a row, whatever surrounds it.


@pytest.mark.parametrize("vocab_size", [V, V - 27])
def test_a_row_alone_is_bitwise_the_row_in_a_batch(vocab_size):
    g = torch.Generator().manual_seed(1)
    logits, ref_logits = (torch.randn(3, 3, vocab_size, generator=g) for _ in range(2))
    token_ids = torch.randint(vocab_size, (3, 3), generator=g)
    batch = token_kl(logits, ref_logits, token_ids)
    for b, t in ((0, 0), (1, 2), (2, 1)):
        rows = (slice(b, b + 1), slice(t, t + 1))
        for copy in (torch.Tensor.contiguous, torch.clone, lambda x: x):
            alone = token_kl(copy(logits[rows]), copy(ref_logits[rows]), token_ids[rows])
            for a, of_batch in zip(alone, batch):
                assert torch.equal(a, of_batch[(..., *rows)])


@pytest.mark.parametrize(
    ("dtypes", "vocab_size", "view", "lane"),
    [
        ((torch.bfloat16,), V, lambda x: x, 8),
        ((torch.float32,), V, lambda x: x, 4),
        ((torch.bfloat16, torch.float32), V, lambda x: x, 4),
        ((torch.bfloat16,), V, lambda x: x[..., :-27], 8),
        ((torch.bfloat16,), V, lambda x: x[:, :-1], 8),
        ((torch.bfloat16,), V, lambda x: x[..., 4:], 1),
        ((torch.bfloat16,), V - 4, lambda x: x, 1),
        ((torch.bfloat16,), V - 4, lambda x: x[:1, :1], 1),
        ((torch.bfloat16,), V - 4, lambda x: x[:1, :1].expand(2, 3, -1), 1),
    ],
)
def test_loads_are_as_wide_as_every_row_allows(dtypes, vocab_size, view, lane):
    tensors = [view(torch.zeros(2, 3, vocab_size, dtype=d)) for d in dtypes]
    assert launch.tile_of(*tensors)["LANE"] == lane


def test_each_mix_of_gradients_is_the_sum_of_its_parts(inputs):
    """Every number is written: none is left from the buffer's memory."""
    logits, ref_logits, token_ids = inputs
    mask = torch.tensor([[True, False], [True, True]])
    logits[0, 1] = torch.nan
    result = token_kl(logits, ref_logits, token_ids, mask)
    one = torch.ones(2, 2)
    total = torch.zeros(2, 2, V)
    names = ["grad_logprob", "grad_kl", "grad_forward_kl", "grad_entropy"]
    singles = [{name: one} for name in names]
    saved = {name: getattr(result, name) for name in ("policy_state", "ref_state", "kl", "entropy")}
    for grads in (*singles, dict.fromkeys(names, one)):
        grad = torch.full_like(logits, torch.nan)
        args = arguments(
            "token_kl_backward",
            logits=logits,
            ref_logits=ref_logits,
            token_ids=token_ids,
            mask=mask,
            grad_logits=grad,
            **saved,
            **grads,
        )
        triton_kernels.token_kl_backward(args)
        assert torch.equal(grad[0, 1], torch.zeros(V))
        if grads in singles:
            total += grad
    torch.testing.assert_close(grad, total, rtol=1e-5, atol=1e-6)


# A token id out of range cannot be refused on a GPU without waiting for it: it shows as NaN.


@pytest.mark.parametrize("bad", [-1, -100, V, 10**12])
def test_a_token_out_of_range_is_never_read_and_gives_nan(bad, inputs, monkeypatch):
    logits, ref_logits, token_ids = inputs
    good = token_kl(logits, ref_logits, token_ids)
    monkeypatch.setattr(launch, "check_token_range", lambda *_: None)
    token_ids[1, 0] = bad
    result = token_kl(logits, ref_logits, token_ids)
    here = torch.tensor([[False, False], [True, False]])
    for i in (0, 1):
        assert torch.equal(result[i].isnan(), here)
        assert torch.equal(result[i][~here], good[i][~here])
    torch.testing.assert_close(result[2:5], good[2:5], rtol=2e-6, atol=1e-6)
    for wanted in (0.0, 1.0):
        grad = torch.empty_like(logits)
        args = arguments(
            "token_stats_backward",
            grad_logprob=torch.where(here, wanted, 1.0),
            logits=logits,
            token_ids=token_ids,
            policy_state=result.policy_state,
            entropy=result.entropy,
            grad_logits=grad,
        )
        triton_kernels.token_stats_backward(args)
        assert torch.equal(grad.isnan().all(-1), here & (wanted != 0))
        assert torch.equal(grad.isnan().any(-1), here & (wanted != 0))


def test_a_large_stride_does_not_wrap(tmp_path):
    """Rows 2^30 logits apart, in a sparse file."""
    stride = 2**30 + 16
    storage = torch.from_file(
        str(tmp_path / "logits"), shared=True, size=2 * stride + V, dtype=torch.bfloat16
    )
    far = storage.as_strided((1, 3, V), (3 * stride, stride, 1))
    near = torch.randn(1, 3, V).bfloat16()
    far.copy_(near)
    token_ids = torch.tensor([[0, 1, 2]])
    for a, b in zip(token_kl(far, far, token_ids), token_kl(near, near, token_ids)):
        assert torch.equal(a, b)


def test_gae_carries_over_blocks():
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 11, generator=g), torch.randn(3, 11, generator=g)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, 3:9] = False  # more than one block of four
    for skip_masked in (True, False):
        args = GAEArgs(rewards, values, mask, 0.97, 0.9, skip_masked, None)
        got, expected = triton_kernels.gae(args), reference.gae(args)
        torch.testing.assert_close(tuple(got), tuple(expected), rtol=2e-6, atol=2e-6)


def test_a_small_kl_of_flat_rows_is_as_good_as_its_sums(monkeypatch):
    """Its two sums are near 4096; their logarithms, in float32, are 5e-7 off each.

    Rounding to nearest is off by at most 2^-24 / sqrt(3) of a result, root mean square. In these
    units a thread's n = V / N terms, added one after the other, are off by sqrt(n / 3), the mean
    of N threads by sqrt(n / 3 / N), and their tree adds sqrt(2). Exponentials off by 2 units in the
    last place leave 1 / sqrt(V) of that.
    """
    monkeypatch.setattr(launch, "CONFIG", launch.LaunchConfig())
    n_seeds, n_rows, vocab_size, lanes = 6, 4, 4096, launch.CONFIG.lanes
    of_sum = 2**-24 / 3**0.5 * (vocab_size / 3 / lanes**2 + 2) ** 0.5
    of_kl = 2**0.5 * of_sum  # two sums; their logarithms would be off by 4e-7
    assert of_kl < 1e-7
    ids = torch.zeros((1, n_rows), dtype=torch.long)
    off = []
    for seed in range(n_seeds):
        g = torch.Generator().manual_seed(seed)
        logits = 0.1 * torch.randn((1, n_rows, vocab_size), generator=g)
        ref_logits = logits + 4.5e-3 * torch.randn((1, n_rows, vocab_size), generator=g)
        got = kl_kernels.token_kl(logits, ref_logits, ids, backend="triton")
        true = kl_kernels.token_kl(logits.double(), ref_logits.double(), ids, backend="reference")
        assert true.kl.max() < 1.1e-5
        off += [got.kl - true.kl, got.forward_kl - true.forward_kl]
    off = torch.stack(off)
    assert off.square().mean().sqrt() < 1.5 * of_kl  # 24 rows tell it to a seventh of itself
    assert off.abs().max() < 5 * of_kl


# The package.


def test_without_triton_the_package_imports_and_says_so():
    program = """
import sys
sys.modules["triton"] = None
from kl_kernels.backends import triton as triton_kernels
assert triton_kernels.unavailable_reason() == "triton is not installed"
try:
    triton_kernels.token_kl
except ImportError:
    print("only now")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "only now\n", run.stderr


def test_importing_the_package_does_not_import_triton():
    program = "import sys, kl_kernels; print('triton.language' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no_such_operator"):
        _ = triton_kernels.no_such_operator


def test_few_rows_have_enough_bytes_on_their_way(monkeypatch):
    """Count those of 64 rows on an H200: 29 kB for each of its SMs, as launch.py explains."""
    config = launch.LaunchConfig()
    monkeypatch.setattr(launch, "CONFIG", config)
    logits = torch.empty(1, 64, 128256, dtype=torch.bfloat16, device="meta")
    n_programs = (
        64 * launch.splits_of(argparse.Namespace(logits=logits), config.fold_split)["n_splits"]
    )
    for ref_logits, n_models in ((None, 1), (logits, 2)):
        tile = launch.fold_tile_of(logits, ref_logits)
        on_their_way = n_models * tile["STEPS"] * tile["N"] * launch.VECTOR_BYTES
        assert n_programs * on_their_way / 132 >= 29e3
