"""`python -m kl_kernels cost`: what a GPU runs, counted on tensors without data, and its limits."""

import json

import pytest
import torch

from kl_kernels.cli import main
from kl_kernels.lab.cost.command import cost
from kl_kernels.lab.cost.jobs import JOBS, Size
from kl_kernels.lab.cost.ledger import Ledger, n_bytes
from kl_kernels.lab.cost.prices import rates

LOSS = "linear_policy_loss"
HEADS = [name for name in JOBS if name.startswith("linear_token_")]
LLAMA = {"rows": 8192, "width": 4096, "vocab": 128256}
QWEN = {"rows": 8192, "width": 896, "vocab": 151936}
# Products of [rows, width, vocab] in forward and backward; a mixture's heads are multiplied twice.
PRODUCTS = {"linear_token_stats": 4, "linear_token_kl": 6, "linear_token_jsd": 8}
KERNELS = ("fold_part", "mixture_part", "token_stats_backward_", "token_kl_backward_")
KERNELS += ("token_jsd_backward_",)


def found(name, chip="h200", dtype=torch.bfloat16, **changes):
    flags = {"frozen_head": False, "reference": False, "masked": False}
    return cost(name, Size(**(LLAMA | flags | {"dtype": dtype} | changes)), chip)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HEADS)
def test_heads_multiply_as_few_narrow_matrices_as_they_can(name, dtype):
    product = 2 * 8192 * 4096 * 128256
    narrow = str(dtype).removeprefix("torch.")
    assert found(name, dtype=dtype)["gemm_flops_by_operand_dtype"] == {
        narrow: PRODUCTS[name] * product
    }
    frozen = found(name, dtype=dtype, frozen_head=True)["gemm_flops_by_operand_dtype"]
    assert frozen == {narrow: (PRODUCTS[name] - 1) * product}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("size", "most"), [(LLAMA, 1.15), (QWEN, 1.45)])
def test_little_is_added_to_the_products(name, size, most):
    of = found(name, **size)
    assert of["predicted_ms"] <= most * of["gemm_ms"]


def test_a_llama_head_takes_fifty_milliseconds():
    assert found("linear_token_stats")["predicted_ms"] <= 50
    assert found("linear_token_stats")["least_ms"] == pytest.approx(
        3 * 8.607e12 / 791.2e9, rel=1e-3
    )


@pytest.mark.parametrize("name", HEADS)
def test_a_tile_takes_few_operations_and_nobody_waits(name):
    of = found(name)
    n_tiles = sum(o["op"] in KERNELS for o in of["operations"])
    assert len(of["operations"]) <= 15 * n_tiles
    assert of["host_syncs"] == 0


@pytest.mark.parametrize("reference", [False, True])
def test_a_loss_of_heads_multiplies_each_matrix_once(reference):
    product, products = 2 * 8192 * 4096 * 128256, 3 + reference
    of = found(LOSS, reference=reference)
    assert of["gemm_flops_by_operand_dtype"] == {"bfloat16": products * product}
    frozen = found(LOSS, reference=reference, frozen_head=True)
    assert frozen["gemm_flops_by_operand_dtype"] == {"bfloat16": (products - 1) * product}
    assert of["host_syncs"] == 1  # for the number of rows under the mask


@pytest.mark.parametrize(("size", "most"), [(LLAMA, 1.15), (QWEN, 1.45)])
def test_a_loss_of_heads_adds_little_to_its_products(size, most):
    """Every block visits all sums."""
    of = found(LOSS, **size)
    assert of["predicted_ms"] <= most * of["gemm_ms"]
    assert found(LOSS)["predicted_ms"] <= 38
    blocks = [o for o in of["operations"] if o["op"] == "policy_loss"]
    assert len(of["operations"]) <= 15 * len(blocks) + 200


@pytest.mark.parametrize("name", HEADS)
def test_a_mask_halves_the_products_and_is_waited_for(name):
    whole, half = found(name), found(name, masked=True)
    assert half["gemm_ms"] == pytest.approx(whole["gemm_ms"] / 2, rel=0.05)
    assert half["host_syncs"] == 1  # for the number of rows


@pytest.mark.parametrize("name", [*HEADS, LOSS])
def test_rows_that_are_listed_are_not_waited_for(name):
    assert found(name, masked=True, listed=True)["host_syncs"] == 0


@pytest.mark.parametrize("name", ["token_stats", "linear_token_stats"])
def test_ranks_share_the_vocabulary(name):
    alone, together = found(name), found(name, ranks=8)
    assert together["least_ms"] == pytest.approx(alone["least_ms"] / 8)
    assert together["predicted_ms"] < alone["predicted_ms"] / 2
    assert {o["op"] for o in together["operations"]} & {"_allgather_base_", "allgather_"}


@pytest.mark.parametrize("reference", [False, True])
def test_ranks_share_the_products_of_a_loss(reference):
    of = found(LOSS, reference=reference, ranks=8)
    product = 2 * 8192 * 4096 * (128256 // 8)
    assert of["gemm_flops_by_operand_dtype"] == {"bfloat16": (3 + reference) * product}
    frozen = found(LOSS, reference=reference, frozen_head=True, ranks=8)
    assert frozen["gemm_flops_by_operand_dtype"] == {"bfloat16": (2 + reference) * product}
    large = found(LOSS, reference=reference, rows=65536, ranks=8)
    operations = [o["op"] for o in large["operations"]]
    n_blocks = operations.count("fold_part")
    assert n_blocks > 1
    assert operations.count("_allgather_base_") + operations.count("allgather_") == n_blocks
    assert operations.count("allreduce_") == 2  # blocks' size, and the gradient of hidden states
    assert large["predicted_ms"] <= 1.5 * large["gemm_ms"]


@pytest.mark.parametrize("name", ["token_stats", "token_kl"])
def test_ranks_exchange_merge_and_finish_in_few_kernels(name):
    operations = found(name, ranks=8)["operations"]
    ops = [o["op"] for o in operations if o["pass"] == "forward"]
    behind = ops[ops.index("fold_part") + 1 :]
    assert len(behind) <= 8
    assert behind[-1] == "finish_parts"
    assert sum(o["launches"] for o in operations) <= 22


@pytest.mark.parametrize("name", [name for name in JOBS if name not in (*HEADS, LOSS)])
def test_functions_of_logits_take_one_call_each_way(name):
    of = found(name, reference=True)
    ours = [o for o in of["operations"] if o["is_ours"]]
    assert len(ours) == 2
    assert of["host_syncs"] == 0
    assert of["predicted_ms"] < 2.4 * of["least_ms"]  # a mixture is looked at twice


def test_logits_are_counted_once_for_each_pass():
    n = 2 * 8192 * 128256
    forward, backward = (o["bytes"] for o in found("token_stats")["operations"])
    vectors = 8192 * (8 + 4 * 8)
    assert n < forward < n + vectors
    assert 2 * n < backward < 2 * n + vectors


def test_a_list_and_a_tail_read_the_logits_twice_and_write_them_once():
    """The list's own numbers, 64 of a position, are what is added to the three passes."""
    n = 2 * 8192 * 128256
    operations = found("topk_kl")["operations"]
    passes = [o["bytes"] for o in operations if o["bytes"] > 0.02 * n]
    assert sum(passes) <= 3.01 * n
    assert sum(o["bytes"] for o in operations) <= 3.3 * n


def test_places_that_are_named_are_counted_and_not_all_others():
    rows, values = torch.empty(3, 1000, device="meta"), torch.empty(3, 2, device="meta")
    which, ids = (torch.empty(3, n, dtype=torch.int64, device="meta") for n in (1, 2))
    with Ledger() as ledger:
        rows.index_put_((which, ids), values)
    assert ledger.operations[0].bytes == 8 * (3 + 6) + 2 * 4 * 6


def test_products_and_copies_are_counted_as_by_hand():
    a, b = (torch.empty(s, device="meta") for s in ((3, 4), (4, 5)))
    with Ledger() as ledger:
        c = a @ b
        c.add_(1.0)
        c.t().expand(2, 5, 3).contiguous()
    product, added, copied = ledger.operations
    assert (product.op, product.flops, product.bytes) == ("mm", 2 * 3 * 4 * 5, 4 * (12 + 20 + 15))
    assert (added.op, added.bytes) == ("add_", 2 * 4 * 15)
    assert (copied.op, copied.bytes) == ("clone", 4 * (15 + 30))
    assert n_bytes(c.expand(7, 3, 5)) == 4 * 15


def test_what_is_written_over_its_logits_is_read_as_well():
    logits, other = torch.empty(1, 4, 1000, device="meta"), torch.empty(1, 4, 1000, device="meta")
    tokens, state = torch.empty(1, 4, device="meta"), torch.empty(2, 1, 4, device="meta")
    ids = tokens.long()
    of_row = tokens, None, logits, ids, None, state, tokens, 1.0, None, True
    with Ledger() as ledger:
        torch.ops.kl_kernels.token_stats_backward_(*of_row, logits, None)
        torch.ops.kl_kernels.token_stats_backward_(*of_row, other, None)
    inplace, beside = ledger.operations
    assert inplace.bytes == beside.bytes


def test_rows_that_are_added_to_are_counted_alone():
    sums, rows = torch.empty(1000, 8, device="meta"), torch.empty(3, 8, device="meta")
    with Ledger() as ledger:
        sums.index_add_(0, torch.empty(3, dtype=torch.long, device="meta"), rows)
    assert ledger.operations[0].bytes == 3 * 4 * 3 * 8


def test_a_chip_reaches_a_share_of_its_data_sheet():
    at = rates("h200")
    assert at.product["bfloat16"] == pytest.approx(791e12, rel=1e-3)
    assert at.product["float32"] == pytest.approx(0.8 * 67e12, rel=1e-2)
    assert at.memory == pytest.approx(4.32e12)
    assert rates("a100").product["float32"] == pytest.approx(0.8 * 19.5e12, rel=1e-2)


def test_the_command_shows_a_table_or_json(capsys):
    size = ["--rows", "100", "--width", "32", "--vocab", "1000"]
    assert main(["cost", "linear_token_stats", *size]) == 0
    shown = capsys.readouterr().out
    assert "bfloat16 -> float32" in shown
    assert "linear_token_stats on h200, predicted: " in shown
    assert main(["cost", "linear_token_stats", *size, "--frozen-head", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gemm_flops_by_operand_dtype"] == {"bfloat16": 3 * 2 * 100 * 32 * 1000}
    fields = {"op", "operand_dtype", "result_dtype", "flops", "bytes", "launches", "host_syncs"}
    assert all(fields < operation.keys() for operation in told["operations"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["token_sums"], "job is 'token_sums'; accepted: 'token_stats', "),
        (["token_kl", "--rows", "0"], "rows is 0; it must be an integer, 1 or above"),
        (["token_kl", "--chip", "tpu"], "chip is 'tpu'; accepted: 'a100', "),
        (["token_kl", "--dtype", "int8"], "dtype is 'int8'; accepted: 'bfloat16', "),
        (["token_kl", "--ranks", "7"], "vocab is 128256, which 7 ranks cannot share equally"),
        (["token_jsd", "--ranks", "2"], "ranks is 2; token_jsd takes no group: token_stats, "),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message, capsys):
    assert main(["cost", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
