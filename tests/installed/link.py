"""Link a package's dependencies into the folder that holds it, from the Python that runs this.

python tests/installed/link.py SITE_PACKAGES [REQUIREMENT...]

Packages that its metadata does not ask for, directly or through others, are absent: importing them
fails. With requirements, these and their dependencies are linked, and the folder may be empty.
"""

import sys
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement


def main() -> None:
    site, names = Path(sys.argv[1]), sys.argv[2:]
    if not names:
        (package,) = distributions(path=[str(site)])
        names = package.requires or []
    todo: list[tuple[list[str], frozenset[str]]] = [(names, frozenset())]
    seen = set()
    while todo:
        requirements, extras = todo.pop()
        for requirement in map(Requirement, requirements):
            if not wanted(requirement, extras):
                continue
            dependency = distribution(requirement.name)
            needed = (dependency, frozenset(requirement.extras))
            if (requirement.name, needed[1]) not in seen:
                seen.add((requirement.name, needed[1]))
                link(dependency, site)
                todo.append((dependency.requires or [], needed[1]))


def wanted(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": e}) for e in (extras or {""}))


def link(dependency: Distribution, site: Path) -> None:
    tops = {file.parts[0] for file in dependency.files or ()} - {"..", "__pycache__"}
    for top in tops:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(dependency.locate_file(top))).resolve())


if __name__ == "__main__":
    main()
