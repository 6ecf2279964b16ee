"""PTX text as functions: each kind of statement, and texts that are refused."""

import struct

import pytest

from .parse import Address, Immediate, Instruction, Pair, Register, Special, Symbol, Vector, parse


def function(body="", head="", parameters=""):
    return parse(f".visible .entry f({parameters}){head} {{ {body} }}")["f"]


REGISTERS = ".reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<3>;"


def operands(text):
    (instruction,) = function(f"{REGISTERS} op.x {text};").body
    return instruction.args


R1, R2 = Register("_r1", 4), Register("_r2", 4)


def test_modules_have_several_functions():
    text = """
    .version 8.4
    .target sm_90a
    .address_size 64
    .extern .shared .align 16 .b8 dynamic[];
    .global .align 4 .b8 table[4] = {1, 2, 3, 4};
    .visible .entry first() { ret; }
    .weak .entry second() { ret; }
    .entry third$1() { ret; }
    .section .debug_abbrev { .b8 1 .b8 17 }
    """
    assert list(parse(text)) == ["first", "second", "third$1"]


def test_parameters_lie_at_multiples_of_their_alignment():
    found = function(
        parameters=".param .u32 a, .param .u64 .ptr .global .align 16 b, .param .u8 c,"
        ".param .align 8 .b8 d[12], .param .f32 e"
    )
    assert found.params == {
        "a": (0, 4, "u32"), "b": (8, 8, "u64"), "c": (16, 1, "u8"), "d": (24, 12, "b8"),
        "e": (36, 4, "f32"),
    }  # fmt: skip
    assert found.param_bytes == 40


def test_registers_have_their_width():
    found = function(
        ".reg .pred %p<2>; .reg .b16 %rs<3>, single; .reg .f32 %f<2>; .reg .s64 %rd<2>;"
        "op %p1; op %rs2, single, %f1, %rd1;"
    )
    assert found.regs == {"_p1": 1, "_rs2": 2, "_single": 2, "_f1": 4, "_rd1": 8}


def test_registers_of_an_inner_block_are_others():
    outer, inner, again = function(".reg .b32 t; op t; { .reg .b64 t; op t; } { } op t;").body
    assert outer.args == again.args == [Register("_t", 4)]
    assert inner.args[0].width == 8
    assert inner.args != outer.args


def test_shared_arrays_follow_each_other():
    found = parse(
        ".extern .shared .align 16 .b8 dynamic[]; .entry f() {"
        ".shared .align 4 .b8 bytes[10]; .shared .align 8 .f64 one; .shared .align 16 .u32 w[3]; }"
    )["f"]
    assert found.shared == {"bytes": (0, 10), "one": (16, 8), "w": (32, 12), "dynamic": (48, -1)}
    assert found.shared_bytes == 48


@pytest.mark.parametrize(
    ("head", "threads"),
    [
        ("", None),
        (".reqntid 128", 128),
        (".maxntid 256, 1, 1", 256),
        (".reqntid 64, 1\n.minnctapersm 2\n.maxnreg 128", 64),
        (".explicitcluster .reqnctapercluster 2, 1, 1 .maxntid 32", 32),
    ],
)
def test_threads_of_a_cta(head, threads):
    assert function(head=head).threads == threads


def test_labels_stand_between_instructions():
    body = function("$L__BB0_1: bra.uni $L__BB0_1; A:B: ret;").body
    assert [x if isinstance(x, str) else x.op for x in body] == [
        "$L__BB0_1", "bra.uni", "A", "B", "ret",
    ]  # fmt: skip
    assert body[1].args == [Symbol("$L__BB0_1")]


def test_predicates():
    body = function(f"{REGISTERS} @%p1 bra A; @!%p2 ret; A: ret;").body
    found = [(x.predicate, x.negated, x.op) for x in body if isinstance(x, Instruction)]
    assert found == [
        (Register("_p1", 1), False, "bra"),
        (Register("_p2", 1), True, "ret"),
        (None, False, "ret"),
    ]


def test_instructions_have_a_family_and_modifiers():
    (instruction,) = function(f"{REGISTERS} fma.rn.ftz.f32 %r1, %r2, %r1, %r2;").body
    assert instruction.family == "fma"
    assert instruction.modifiers == ["rn", "ftz", "f32"]
    assert instruction.args == [R1, R2, R1, R2]


@pytest.mark.parametrize(
    ("text", "bits", "kind"),
    [
        ("5", 5, "int"),
        ("-5", -5, "int"),
        ("0", 0, "int"),
        ("0x1F", 31, "int"),
        ("-0x1f", -31, "int"),
        ("4294967295U", 2**32 - 1, "int"),
        ("0f3F800000", 0x3F800000, "f32"),
        ("0FbF800000", 0xBF800000, "f32"),
        ("0d3FF0000000000000", 0x3FF0000000000000, "f64"),
        ("0D7ff8000000000000", 0x7FF8000000000000, "f64"),
        ("-1.5", int.from_bytes(struct.pack(">f", -1.5), "big"), "f32"),
    ],
)
def test_immediates(text, bits, kind):
    assert operands(text) == [Immediate(bits, kind)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[%r1]", Address(R1, 0)),
        ("[%r1+8]", Address(R1, 8)),
        ("[ %r1 + 8 ]", Address(R1, 8)),
        ("[%r1+-8]", Address(R1, -8)),
        ("[%r1-0x10]", Address(R1, -16)),
        ("[name+4]", Address(Symbol("name"), 4)),
        ("[4096]", Address(Immediate(4096, "int"), 0)),
        ("{%r1, %r2}", Vector((R1, R2))),
        ("{ _, 7 }", Vector((None, Immediate(7, "int")))),
        ("%r1|%p1", Pair((R1, Register("_p1", 1)))),
        ("_|%p1", Pair((None, Register("_p1", 1)))),
        ("%tid.x", Special("%tid.x")),
        ("_", None),
    ],
)
def test_operands(text, expected):
    assert operands(text) == [expected]
    assert operands(f"%r2, {text}, %r1") == [R2, expected, R1]


def test_lines_and_sources():
    text = """.entry f() {
    .loc 1 0 0  // no source
    a;  /* a comment;
    of two lines */ b;
    .loc 1 58 3
    c
      ; d;
    .loc 2 7 1, function_name $L__info_string0, inlined_at 1 58 3
    e;
    }
    .file 1 "/home/someone/loss.py"
    .file 2 "/home/someone" "other.py"
    """
    found = [(x.op, x.line, x.where) for x in parse(text)["f"].body]
    assert found == [
        ("a", 3, ""), ("b", 4, ""), ("c", 6, "loss.py:58"), ("d", 7, "loss.py:58"),
        ("e", 9, "other.py:7"),
    ]  # fmt: skip


@pytest.mark.parametrize("mask", ["4095", "0xfff"])
def test_the_bytes_used_are_those_of_the_next_instruction(mask):
    pragmas = f'.pragma "nounroll"; .pragma "used_bytes_mask {mask}";'
    body = function(f"{REGISTERS} a; {pragmas} ld.b32 %r1, [%r2]; ld.b32 %r1, [%r2];").body
    assert [x.used for x in body] == [None, 0xFFF, None]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (".func g() { ret; }", "a .func"),
        (".visible .func (.param .b32 r) g() { ret; }", "a .func"),
        (".alias f, g;", ".alias f, g"),
        (".entry f(.param .u32 a[) { ret; }", "parameter .param .u32 a["),
        (".entry f(.param .u7 a) { ret; }", "parameter .param .u7 a"),
        (".entry f() .maxntid 16, 16 { ret; }", "directive"),
        (".entry f() .unknown { ret; }", "directive .unknown"),
        (".entry f() { .reg .u7 %r<2>; }", ".reg .u7 %r<2>"),
        (".entry f() { .reg .b8 %r<2>; }", ".reg .b8 %r<2>"),
        (".entry f() { .shared .b8 x[4]; }", ".shared .b8 x[4]"),
        (".entry f() { .shared .align 4 .u7 x[4]; }", ".shared .align 4 .u7 x[4]"),
        (".entry f() { .local .align 4 .b8 x[4]; }", ".local .align 4 .b8 x[4]"),
        (".entry f() { A: A: ret; }", "label A, twice"),
        (".entry f() { @%p1 ret; }", "predicate %p1"),
        (".entry f() { .reg .b32 %r<2>; @%r1 ret; }", "predicate %r1"),
        (".entry f() { .reg .b32 %r<2>; op %r1 %r1; }", "operand %r1 %r1"),
        (".entry f() { op 1e5; }", "operand 1e5"),
        (".entry f() { op 017; }", "operand 017"),
        (".entry f() { op !x; }", "operand !x"),
        (".entry f() { op [x + y + z]; }", "address [x + y + z]"),
        (".entry f() { op [%undeclared]; }", "address [%undeclared]"),
        (".entry f() { .reg .b32 %r<22>; op [%r21; }", "operand [%r21"),
        (".entry f() { .reg .b32 %r<22>; op {%r21; ret; }", "operand {%r21"),
        # Texts that end too early.
        (".entry f() { ret; ", "the end of f is missing"),
        (".entry f() { { ret; }", "the end of f is missing"),
        (".entry f() { ret }", "no semicolon"),
        (".entry f() { ret", "no semicolon"),
        (".entry f(", "no semicolon"),
    ],
)
def test_a_broken_text_is_refused_with_its_line(text, refused):
    with pytest.raises(NotImplementedError) as error:
        parse(f"\n\n{text}")
    assert str(error.value).startswith(f"line 3: {refused}")
