"""Imports point one way: what is below knows nothing of what is above.

functional -> {rl, partitioned} -> ops -> backends -> algebra -> {schemas, checks}; monitor -> rl;
integrations and lab -> functional; nothing imports integrations or lab.
"""

import ast
from pathlib import Path

import kl_kernels
from kl_kernels.schemas import OPERATORS

PACKAGE = Path(kl_kernels.__file__).parent

# The parts of the package that each may import, besides itself and the ground.
GROUND = {"_version", "checks", "extras", "files", "forks", "schemas", "text", "versions"}
ALLOWED = {
    "algebra": set(),
    "backends": {"algebra"},
    "ops": {"backends"},
    "partitioned": {"ops", "algebra"},
    "rl": {"ops", "algebra"},
    "functional": {"rl", "partitioned", "ops", "algebra"},
    "monitor": {"rl"},
    "integrations": {"functional", "rl", "monitor", "algebra", "partitioned"},
    "info": {"backends", "partitioned"},
    "lab": {
        *(
            "integrations",
            "functional",
            "partitioned",
            "rl",
            "monitor",
            "ops",
            "backends",
            "algebra",
        ),
        "info",
    },
    "cli": {"lab", "monitor", "info"},
    "__main__": {"cli"},
    "__init__": {"functional", "rl", "monitor"},
}
# The public names, for what stands on top of the library.
USERS_OF_PUBLIC_NAMES = {"integrations", "lab", "cli", "__main__", "info"}


def room(module):
    """The folder or file of the package that `kl_kernels.<module>` is in."""
    return module.split(".")[1] if "." in module else "__init__"


def imports():
    """(file, its room, the room it imports)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        own = inside.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "kl_kernels":
                names = [
                    f"kl_kernels.{alias.name}" if is_module(alias.name) else "kl_kernels"
                    for alias in node.names
                ]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            else:
                continue
            for name in names:
                if name.split(".")[0] == "kl_kernels":
                    yield str(inside), own, room(name)


def is_module(name):
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def test_every_room_is_in_the_plan():
    rooms = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and list(path.glob("*.py")))
    }
    assert rooms == GROUND | ALLOWED.keys()


def test_nothing_points_up():
    wrong = [
        f"{file} imports {target}"
        for file, own, target in imports()
        if target != own
        and target not in (GROUND if own in GROUND else ALLOWED[own] | GROUND)
        and not (target == "__init__" and own in USERS_OF_PUBLIC_NAMES)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_plan_has_no_circle():
    done, rest = set(), dict(ALLOWED)
    while rest:
        free = {own for own, below in rest.items() if below <= done}
        assert free, rest
        done |= free
        rest = {own: below for own, below in rest.items() if own not in free}


def test_the_ground_has_no_circle():
    below = {own: set() for own in GROUND}
    for _, own, target in imports():
        if own in GROUND and target != own:
            below[own].add(target)
    done = set()
    while len(done) < len(GROUND):
        free = {own for own in GROUND - done if below[own] <= done}
        assert free, {own: below[own] for own in GROUND - done}
        done |= free


def test_no_file_of_a_backend_is_called_like_an_operator():
    """A submodule that is imported becomes an attribute of its package, over the operator's."""
    for backend in ("triton", "reference"):
        files = {path.stem for path in (PACKAGE / "backends" / backend).glob("*.py")}
        assert not files & OPERATORS.keys(), backend
