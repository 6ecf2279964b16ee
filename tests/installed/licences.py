"""Whether every package of an SBOM has a licence that a dependency may have.

python tests/installed/licences.py SBOM
"""

import json
import sys
from pathlib import Path

from license_expression import get_spdx_licensing

# Permissive: notices are kept, and nothing is asked of programs that use it.
ACCEPTED = {
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause"),
    *("BSL-1.0", "CC0-1.0", "MIT", "PSF-2.0", "Unlicense", "Zlib"),
}
# Copyleft file by file (tqdm): asks for the sources of files that were changed, and none are.
ACCEPTED |= {"MPL-2.0"}
# Statements of packages without an SPDX expression: any BSD licence is accepted.
CLASSIFIERS = {"License :: OSI Approved :: BSD License"}


def main() -> None:
    packages = json.loads(Path(sys.argv[1]).read_text())["components"]
    if not packages:
        sys.exit(f"{sys.argv[1]} has no packages")
    refused = [f"{p['name']} {p['version']}: {refusal(p)}" for p in packages if refusal(p)]
    if refused:
        sys.exit("not among the accepted licences: " + "; ".join(refused))
    print(f"{len(packages)} packages, all of accepted licences")


def refusal(package: dict) -> str | None:
    """Return the licences a package states that are not accepted; None if all are."""
    stated = [statement(licence) for licence in package.get("licenses", ())]
    wrong = [s for s in stated if s not in CLASSIFIERS and not parts(s) <= ACCEPTED]
    return "nothing stated" if not stated else ", ".join(wrong) or None


def statement(licence: dict) -> str:
    inner = licence.get("license", {})
    return licence.get("expression") or inner.get("id") or inner["name"]


def parts(expression: str) -> set[str]:
    """The licences in an SPDX expression; of a choice, all."""
    try:
        parsed = get_spdx_licensing().parse(expression, validate=True)
    except Exception:  # it has several kinds of error for what is no SPDX expression
        return {expression}
    return {str(symbol) for symbol in get_spdx_licensing().license_symbols(parsed, decompose=False)}


if __name__ == "__main__":
    main()
