"""`python -m kl_kernels codegen`: what the Triton kernels compile to stays within its budgets."""

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from machine.lint import asymmetric_butterflies
from machine.parse import parse

from kl_kernels.cli import main
from kl_kernels.lab.codegen import sass
from kl_kernels.lab.codegen.budgets import BUDGETS, excesses
from kl_kernels.lab.codegen.chips import Chip, limits, occupancy, second_look_hits, visit
from kl_kernels.lab.codegen.command import ARCHS, _target

NVIDIA = [arch for arch in ARCHS if arch.startswith("sm_")]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command's process for an architecture, and its directory; all of them run at once."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = {arch: tmp_path_factory.mktemp(arch) for arch in ARCHS}
    started = {
        arch: subprocess.Popen(
            [sys.executable, "-m", "kl_kernels", "codegen", "--arch", arch, "--out", out[arch]],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for arch in ARCHS
    }
    shown = {}

    def finished(arch):
        if arch not in shown:
            shown[arch] = started[arch].communicate()
        return started[arch].returncode, *shown[arch], out[arch]

    yield finished
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("arch", NVIDIA)
def test_every_loop_is_within_its_budget(arch, command):
    returncode, shown, errors, out = command(arch)
    assert returncode == 0, shown + errors
    for (kernel, loop), budget in BUDGETS.items():
        row = re.search(rf"^{kernel}, {loop} .*$", shown, re.MULTILINE)
        assert row, shown
        assert f"/ {budget.instructions:.4g} " in row[0]
        assert row[0].count("16 B") == 1 + (loop in ("tiles", "gradient"))


@pytest.mark.parametrize("arch", NVIDIA)
def test_no_kernel_touches_local_memory(arch, command):
    *_, out = command(arch)
    listings = sorted(out.glob("*.sass"))
    assert len(listings) == len(list(out.glob("*.ptx"))) == len(list(out.glob("*.cubin"))) == 20
    for listing in listings:
        opcodes = {text.split()[0] for _, text in sass.INSTRUCTION.findall(listing.read_text())}
        assert "EXIT" in opcodes
        assert not [opcode for opcode in opcodes if opcode.startswith(("LDL", "STL"))], listing


@pytest.mark.parametrize("arch", NVIDIA)
def test_barriers_keep_the_tokens_own_gradient_apart(arch, command):
    """Its logit is read before another thread overwrites it, its place is written after."""
    *_, out = command(arch)
    for kernel in ("backward-KL", "backward-both-KLs", "backward-no-KL"):
        code = [text for _, text in sass.INSTRUCTION.findall((out / f"{kernel}.sass").read_text())]
        assert sum("BAR.SYNC" in text for text in code) >= 2


@pytest.mark.parametrize("arch", NVIDIA)
def test_threads_agree_on_their_sums(arch, command):
    """Where they differ in the last bit, which of them is stored is undefined."""
    *_, out = command(arch)
    for listing in out.glob("*.ptx"):
        for function in parse(listing.read_text()).values():
            assert asymmetric_butterflies(function) == [], listing


def test_every_kernel_compiles_for_amd_without_spills(command):
    returncode, shown, errors, out = command("gfx942")
    assert returncode == 0, errors
    assert len(list(out.glob("*.hsaco"))) == 20
    for assembly in out.glob("*.amdgcn"):
        assert re.findall(r"\.vgpr_spill_count: +(\d+)", assembly.read_text()) == ["0"], assembly


# The counter, on a listing that a human can count.

LISTING = """
 Function kernel:
  REG:40 STACK:8 SHARED:0 LOCAL:0
    /*0000*/  LDC R1, c[0x0][0x28] ;                              /* 0x00000a00ff017b82 */
                                                                  /* 0x000fe20000000800 */
    /*0010*/  STG.E desc[UR4][R2.64], R0 ;                        /* 0x0000000002007986 */
    /*0020*/  LDG.E.128 R4, desc[UR4][R2.64] ;                    /* 0x0000000402047981 */
    /*0030*/  @!P0 LDG.E.U16.CONSTANT R8, desc[UR4][R2.64] ;      /* 0x0000000402088981 */
    /*0040*/  MUFU.EX2 R4, R4 ;                                   /* 0x0000000400047308 */
    /*0050*/  @!UP0 SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;            /* 0x0e001f0004057f89 */
    /*0060*/  BAR.SYNC.DEFER_BLOCKING 0x0 ;                       /* 0x0000000000007b1d */
    /*0070*/  STG.E.64 desc[UR4][R2.64], R4 ;                     /* 0x0000000402007986 */
    /*0080*/  @P0 BRA 0x20 ;                                      /* 0xfffffff000740947 */
    /*0090*/  FADD R4, R4, R5 ;                                   /* 0x0000000504047221 */
    /*00a0*/  @P1 BRA 0x90 ;                                      /* 0xfffffff000740947 */
    /*00b0*/  @P2 BRA 0xd0 ;                                      /* 0x0000001000188947 */
    /*00c0*/  EXIT ;                                              /* 0x000000000000794d */
    /*00d0*/  BRA 0xd0;                                           /* 0xfffffffc00fc7947 */
"""


def test_the_counter_finds_the_loops_that_read_and_what_they_do():
    assert sass.usage(LISTING) == (40, 8)
    (loop,) = sass.loops(LISTING, units=2)
    assert loop.instructions == 7 / 2
    assert loop.mufu == 1 / 2
    assert loop.bytes == (16 + 2 + 8) / 2
    assert (loop.load_width, loop.store_width) == (2, 8)
    assert (loop.barriers, loop.shuffles) == (1, 1)


def test_code_that_jumps_back_around_a_loop_is_no_loop():
    around = "    /*00c8*/  BRA 0x10 ;   /* 0x0000000000000000 */\n    /*00d0*/"
    assert sass.loops(LISTING.replace("    /*00d0*/", around), 2) == sass.loops(LISTING, 2)


def test_a_listing_without_figures_is_refused():
    with pytest.raises(RuntimeError, match="reports no registers: 'no such file'"):
        sass.usage("no such file")


# A loop within the budget of the backward kernel without KL, and every way out of it.

LEAN = Counter({"LDG.E.128": 2, "STG.E.128": 2, "MUFU.EX2": 16, "FFMA": 100})
KERNEL = sass.Kernel("backward: no KL", 64, 0, 0, 4, {"tiles": sass.Loop(LEAN, units=16)})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"FADD": 25}, "backward: no KL, tiles: 9.0625 instructions, budget 9"),
        ({"MUFU.EX2": 1}, "backward: no KL, tiles: 1.0625 special functions, budget 1"),
        ({"LDG.E.128": 1}, "backward: no KL, tiles: 5 bytes, budget 4"),
        ({"BAR.SYNC.DEFER_BLOCKING": 1}, "backward: no KL, tiles: 1 barriers, budget 0"),
        ({"SHFL.BFLY": 1}, "backward: no KL, tiles: 1 shuffles, budget 0"),
        (
            {"LDG.E.128": -1, "LDG.E.64": 2},
            "backward: no KL, tiles: loads of 8 bytes, expected 16",
        ),
        ({"STG.E.128": -1, "STG.E": 4}, "backward: no KL, tiles: stores of 4 bytes, expected 16"),
    ],
)
def test_what_a_loop_costs_too_much_is_told(more, message):
    assert excesses("sm_90", KERNEL) == []
    opcodes = LEAN.copy()
    opcodes.update(more)
    loop = sass.Loop(opcodes, units=16)
    assert excesses("sm_90", replace(KERNEL, loops={"tiles": loop})) == [message]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_registers_and_spills_are_told(arch):
    assert excesses(arch, replace(KERNEL, registers=65, stack=8)) == [
        "backward: no KL: 65 registers, budget 64",
        "backward: no KL: 8 bytes of stack, budget 0",
    ]


# The prediction, in numbers one can work out by hand.

CHIP = Chip("sm_90", sms=100, clock=1e9, bandwidth=2e12, shared=228 * 1024, l2=50, tensor=1e15)


def test_limits_are_amounts_over_rates():
    loop = sass.Loop(Counter({"LDG.E.128": 1, "MUFU.EX2": 8, "FFMA": 23}), units=4)
    # Per unit 4 bytes, 8 instructions, 2 special functions; 10^9 units; 10^11 clocks a second.
    seconds = limits(loop, 10**9, CHIP)
    assert seconds == pytest.approx(
        {"memory": 4 / 2e3, "issue": 8 / (100 * 128), "mufu": 2 / (100 * 16)}
    )


def test_a_second_look_saves_what_the_l2_still_holds():
    fold = sass.Loop(Counter({"LDG.E.128": 1}), units=4)
    gradient = sass.Loop(Counter({"LDG.E.128": 1, "STG.E.64": 1}), units=4)
    # 100 rows take 40 MiB of 50, and then 100 MiB.
    assert second_look_hits(400 << 10, 100, CHIP) == 1
    assert second_look_hits(1 << 20, 100, CHIP) == 0.5
    # Per unit 4 bytes, and 4 again and 2 to be written.
    assert visit(fold, gradient, 0.0, 10**9, CHIP) == pytest.approx(10 / 2e3)
    assert visit(fold, gradient, 0.5, 10**9, CHIP) == pytest.approx(8 / 2e3)
    assert visit(fold, gradient, 1.0, 10**9, CHIP) == pytest.approx(6 / 2e3)


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "warps"),
    [
        (32, 0, 4, 64),  # all
        (33, 0, 4, 48),  # 1056 a warp become 1280: 12 blocks of 5120
        (64, 16, 4, 32),
        (72, 16, 4, 28),  # 7 blocks of 9216
        (255, 0, 4, 8),
        (32, 100 * 1024, 4, 8),  # 2 blocks of 101 kB
        (32, 0, 1, 32),  # 32 blocks at most
    ],
)
def test_occupancy_is_set_by_the_scarcest_resource(registers, shared, num_warps, warps):
    assert occupancy(registers, shared, num_warps, CHIP) == warps / 64


# Arguments.


@pytest.mark.parametrize(
    ("arch", "chip", "compiled_for", "predicted"),
    [
        (None, None, "sm_90", "sm_90"),
        (None, "a100", "sm_80", "sm_80"),
        (None, "b200", "sm_100", "sm_100"),
        ("sm_90", "h100", "sm_90", "sm_90"),
        ("gfx942", None, "gfx942", None),
    ],
)
def test_a_chip_says_which_architecture_it_is(arch, chip, compiled_for, predicted):
    found, of = _target(arch, chip)
    assert found == compiled_for
    assert (of and of.arch) == predicted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_70"], "arch is 'sm_70'; accepted: 'sm_80', 'sm_90', 'sm_100', 'gfx942'"),
        (["--chip", "h20"], "chip is 'h20'; accepted: 'a100', 'h100', 'h200', 'b200'"),
        (["--chip", "a100", "--arch", "sm_90"], "chip is 'a100', an sm_80; arch is 'sm_90'"),
        (["--rows", "0"], "rows is 0; it must be at least 1"),
        (["--vocab-size", "1"], "vocab-size is 1; it must be at least 2"),
        (["--out", __file__], f"out is {__file__!r}; it cannot be made: File exists"),
    ],
)
def test_a_bad_argument_is_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["codegen", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_interpreted_kernels_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["codegen"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_missing_triton_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main(["codegen"]) == 2
    assert "triton is not installed" in capsys.readouterr().err
