"""Links what the package in a folder depends on into that folder, from the Python that runs this.

python tests/installed/link.py SITE_PACKAGES

What its metadata does not ask for, directly or through others, is not there: an import fails.
"""

import sys
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement


def main() -> None:
    site = Path(sys.argv[1])
    (package,) = distributions(path=[str(site)])
    todo: list[tuple[Distribution, frozenset[str]]] = [(package, frozenset())]
    seen = set()
    while todo:
        dependent, extras = todo.pop()
        for requirement in map(Requirement, dependent.requires or ()):
            if not wanted(requirement, extras):
                continue
            dependency = distribution(requirement.name)
            needed = (dependency, frozenset(requirement.extras))
            if (requirement.name, needed[1]) not in seen:
                seen.add((requirement.name, needed[1]))
                link(dependency, site)
                todo.append(needed)


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
