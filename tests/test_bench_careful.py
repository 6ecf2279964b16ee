"""The rules that `bench/careful.py` counts by are the kernels' own (CUDA's: test_cuda_on_host)."""

import dataclasses

import pytest
import torch
from careful_rows import careful_rows
from operators import arguments

from kl_kernels import triton_kernels
from kl_kernels.triton_kernels import fold, launch

SPLIT = 256
SMALL = {"lanes": 16, "steps": 1, "unaligned_steps": 4, "fold_split": SPLIT}


@pytest.fixture
def rules(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "bench")
    import careful_rules

    return careful_rules


@pytest.fixture
def loops_run(monkeypatch):
    """(address of the part, tiles before the last, loops) of each part in the order of folding."""
    found = []
    fold_anchored, fold_tile, fold_careful = fold.fold_anchored, fold.fold_tile, fold.fold_careful

    def anchored(x_ptr, *args):
        found.append([int(x_ptr.handle.data[0]), int(args[3].handle.data[0]), []])
        return fold_anchored(x_ptr, *args)

    def tile(*args):
        if not args[-1]:  # GUARDED
            found[-1][2].append("fast")
        return fold_tile(*args)

    def careful(*args):
        found[-1][2].append("careful")
        return fold_careful(*args)

    monkeypatch.setattr(fold, "fold_anchored", anchored)
    monkeypatch.setattr(fold, "fold_tile", tile)
    monkeypatch.setattr(fold, "fold_careful", careful)
    return found


# Lanes of 4, of 8, and of 1 for rows that are not aligned.
@pytest.mark.parametrize(
    ("vocab_size", "dtype", "tile"),
    [(408, torch.float32, 64), (448, torch.bfloat16, 128), (401, torch.float32, 64)],
)
def test_the_triton_rule_is_what_the_kernel_does(
    vocab_size, dtype, tile, rules, loops_run, monkeypatch
):
    monkeypatch.setattr(launch, "CONFIG", dataclasses.replace(launch.CONFIG, **SMALL))
    x, y, token_ids = careful_rows(60, vocab_size, (0, SPLIT), tile, most=2**20)
    x, y = x.to(dtype), y.to(dtype)
    expected = rules.loops_taken(rules.TritonRule.for_logits, x, y, token_ids)
    both = rules.Loops.FAST | rules.Loops.CAREFUL
    assert {*expected.flatten().tolist()} == {rules.Loops.FAST, rules.Loops.CAREFUL, both}
    assert rules.TritonRule.for_logits(x, y).tile == tile
    given = {"logits": x[None], "ref_logits": y[None], "token_ids": token_ids[None]}
    triton_kernels.token_kl(arguments("token_kl", **given))
    got = []
    for address, n_full, loops in loops_run:
        assert address == x.data_ptr() + x.itemsize * (
            len(got) // 2 * vocab_size + len(got) % 2 * SPLIT
        )
        if "careful" not in loops:
            got.append(rules.Loops.FAST)
        else:
            at_once = n_full > 0 and "fast" not in loops
            got.append(rules.Loops.CAREFUL if at_once else both)
    assert torch.equal(torch.tensor(got).view(-1, 2), expected)


def test_sizes_are_the_kernels_own(rules):
    rule = rules.CudaRule.of_header()
    assert (rule.threads, rule.lanes, rule.part, rule.crowded) == (256, 8, 32768, 512)
    assert rule.part_size(32000) == 32768
    assert rule.part_size(128256) == 32768
    assert rule.part_size(65537) == 22528  # three parts of eleven tiles
