"""Every property has a mutant that can still be made; `make property-mutants` runs them."""

import ast

import pytest
from property_mutants import MUTANTS, PACKAGE, ROOT

TESTS = ROOT / "tests" / "algebra"


def test_every_property_has_a_mutant():
    properties = {
        (path.name, node.name)
        for path in TESTS.glob("test_properties*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert properties == {(mutant.tests, name) for name, mutant in MUTANTS.items()}


@pytest.mark.parametrize("name", MUTANTS)
def test_what_a_mutant_changes_is_there_once(name):
    mutant = MUTANTS[name]
    text = (ROOT / PACKAGE / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    changed = text.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
