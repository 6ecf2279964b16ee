"""Instructions that reach memory or other threads: each calls a method of the machine, `C`."""

from __future__ import annotations

from .lower_arithmetic import family, only
from .lower_values import TYPES, Values, size_of
from .parse import Address, Immediate, Instruction, Operand, Pair, Symbol, Vector

VECTORS = {"v2": 2, "v4": 4, "v8": 8}
# Hints to caches, and orders among accesses that the machine keeps anyway: it is sequential.
HINTS = (
    "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "volatile", "relaxed", "cta", "cluster",
    "gpu", "sys", "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::cache_hint",
    "L2::128B", "L2::256B", "L2::64B", "L2::evict_first", "b128",
)  # fmt: skip
SPACES = ("global", "shared", "shared::cta", "shared::cluster", "param")


def parts_of(operand: Operand | None) -> tuple[Operand | None, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def space_of(of: Instruction) -> str:
    """The state space of an access; an address that names none may be of any."""
    named = [m for m in of.modifiers if m in SPACES]
    if named == ["shared::cluster"]:
        raise NotImplementedError(of.op)
    return named[0].split("::")[0] if named else "generic"


def count_of(of: Instruction, parts: tuple) -> int:
    count = next((VECTORS[m] for m in of.modifiers if m in VECTORS), 1)
    if len(parts) != count:
        raise NotImplementedError(of.op)
    return count


@family("ld", "ldu")
def load(v: Values, of: Instruction) -> None:
    only(of, *HINTS, *SPACES, *VECTORS)
    kind = TYPES[of.modifiers[-1]]
    size, parts = size_of(kind), parts_of(of.args[0])
    if space_of(of) == "param":
        return load_parameter(v, of, kind, parts)
    arguments = f"{v.address(of.args[1])}, {size}, {count_of(of, parts)}"
    used = "" if of.used is None else f", {of.used}"
    v.emit(f"v = C.load_{space_of(of)}({arguments}, {v.condition(of)}, m, {of.line}{used})")
    for place, part in enumerate(parts):
        if part is not None:
            # As the type says, so that a narrower signed number is extended by its sign.
            v.write(part, kind if kind[0] == "i" else f"u{size}", taken(place, kind, size), of)


def taken(place: int, kind: str, size: int) -> str:
    return f"v[{place}].view(i{size})" if kind[0] == "i" else f"v[{place}]"


def load_parameter(v: Values, of: Instruction, kind: str, parts: tuple) -> None:
    address = of.args[1]
    if not isinstance(address, Address) or not isinstance(address.base, Symbol):
        raise NotImplementedError(f"parameter at {address}")
    if address.base.name not in v.kernel.function.params:
        raise NotImplementedError(f"parameter {address.base.name}")
    offset = v.kernel.function.params[address.base.name][0] + address.offset
    for place, part in enumerate(parts):
        at = offset + place * size_of(kind)
        v.write(part, kind, f"full(n, C.param({at}, {kind}))", of)


@family("st")
def store(v: Values, of: Instruction) -> None:
    only(of, *HINTS, *SPACES, *VECTORS)
    size = size_of(TYPES[of.modifiers[-1]])
    parts = parts_of(of.args[1])
    count_of(of, parts)
    values = ", ".join(v.array(part, f"u{size}") for part in parts)
    arguments = f"{v.address(of.args[0])}, [{values}], {size}"
    v.emit(f"C.store_{space_of(of)}({arguments}, {v.condition(of)}, m, {of.line})")


@family("ldmatrix")
def load_matrices(v: Values, of: Instruction) -> None:
    only(of, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", *SPACES)
    if of.predicate is not None:
        raise NotImplementedError("a predicated ldmatrix")
    parts = parts_of(of.args[0])
    trans = "trans" in of.modifiers
    v.emit(f"v = C.ldmatrix({v.address(of.args[1])}, {len(parts)}, {trans}, m, {of.line})")
    for place, part in enumerate(parts):
        v.write(part, "u4", f"v[{place}]", of)


@family("stmatrix")
def store_matrices(v: Values, of: Instruction) -> None:
    only(of, "sync", "aligned", "m8n8", "x1", "x2", "x4", *SPACES)
    if of.predicate is not None:
        raise NotImplementedError("a predicated stmatrix")
    values = ", ".join(v.array(part, "u4") for part in parts_of(of.args[1]))
    v.emit(f"C.stmatrix({v.address(of.args[0])}, [{values}], m, {of.line})")


@family("cp")
def copy_asynchronously(v: Values, of: Instruction) -> None:
    only(of, "async", "commit_group", "wait_group", "wait_all", "cg", "ca", *HINTS, *SPACES)
    if of.modifiers == ["async", "commit_group"]:
        v.emit("C.commit(m)")
    elif of.modifiers == ["async", "wait_group"] and isinstance(of.args[0], Immediate):
        v.emit(f"C.wait_group({of.args[0].bits}, m, {of.line})")
    elif of.modifiers == ["async", "wait_all"]:
        v.emit(f"C.wait_group(0, m, {of.line}, True)")
    elif of.modifiers[0] == "async" and len(of.args) == 3 and isinstance(of.args[2], Immediate):
        arguments = f"{v.address(of.args[0])}, {v.address(of.args[1])}, {of.args[2].bits}"
        v.emit(f"C.copy_async({arguments}, {v.condition(of)}, m, {of.line})")
    else:
        raise NotImplementedError(of.op)


@family("cvta")
def convert_address(v: Values, of: Instruction) -> None:
    """Turn an address of a space into a generic one, or back (`cvta.to`)."""
    only(of, "to", *SPACES)
    address = v.array(of.args[1], "u8")
    if "global" in of.modifiers:
        text = address
    elif "to" in of.modifiers:
        text = f"C.to_shared({address}, m)"
    else:
        text = f"{address} + C.WINDOW"
    v.write(of.args[0], "u8", text, of)


@family("mapa")
def map_address(v: Values, of: Instruction) -> None:
    """Address of the same variable in another CTA of the cluster."""
    only(of)
    address, rank = v.array(of.args[1], "u8"), v.array(of.args[2], "u4")
    v.write(of.args[0], "u8", f"C.mapa({address}, {rank}, m, {of.line})", of)


@family("shfl")
def shuffle(v: Values, of: Instruction) -> None:
    only(of, "sync", "up", "down", "bfly", "idx")
    if of.predicate is not None:
        raise NotImplementedError("a predicated shuffle")
    value = v.array(of.args[1], "u4")
    rest = ", ".join(v.read(operand, "u4") for operand in of.args[2:5])
    v.emit(f"v = C.shfl({of.modifiers[1]!r}, {value}, {rest}, m, {of.line})")
    results = of.args[0].parts if isinstance(of.args[0], Pair) else (of.args[0],)
    for place, result in enumerate(results):
        if result is not None:
            v.write(result, ("u4", "b1")[place], f"v[{place}]", of)


@family("redux")
def reduce_warp(v: Values, of: Instruction) -> None:
    """Integer reduction over the threads of a warp."""
    only(of, "sync", "add", "min", "max", "and", "or", "xor")
    if of.predicate is not None:
        raise NotImplementedError("a predicated reduction")
    kind = TYPES[of.modifiers[-1]]
    if kind[0] == "f":
        raise NotImplementedError(of.op)
    value, mask = v.array(of.args[1], kind), v.read(of.args[2], "u4")
    v.write(of.args[0], kind, f"C.redux({of.modifiers[1]!r}, {value}, {mask}, m, {of.line})", of)


@family("bar")
def barrier_of_warp(v: Values, of: Instruction) -> None:
    """bar.warp.sync; those of the CTA end their block."""
    if of.modifiers != ["warp", "sync"]:
        raise NotImplementedError(of.op)
    v.emit("C.warp_barrier(m)")


@family("barrier")
def arrival_at_cluster(v: Values, of: Instruction) -> None:
    only(of, "cluster", "arrive", "release", "relaxed", "aligned")
    if of.modifiers[:2] != ["cluster", "arrive"] or of.predicate is not None:
        raise NotImplementedError(of.op)
    v.emit(f"C.cluster_arrive(m, {'relaxed' in of.modifiers})")


@family("createpolicy")
def cache_policy(v: Values, of: Instruction) -> None:
    """A hint to the L2 cache."""
    v.write(of.args[0], "u8", "full(n, u8(0))", of)


@family("fence", "membar", "prefetch", "griddepcontrol")
def nothing(v: Values, of: Instruction) -> None:
    """Order among accesses, which the machine keeps anyway, and hints."""
