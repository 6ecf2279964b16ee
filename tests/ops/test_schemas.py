"""The operators' classes of arguments beside what torch and C++ make of them."""

import re
from pathlib import Path

import pytest
import torch

from kl_kernels.ops import library as ops  # noqa: F401  registers the operators
from kl_kernels.schemas import OPERATORS, Execution, argument_types, schema

CSRC = Path(__file__).parents[2] / "csrc"
CPP_TYPES = {
    "const Tensor&": "Tensor",
    "const OptionalTensor&": "Tensor?",
    "double": "float",
    "std::optional<double>": "float?",
    "int64_t": "int",
    "bool": "bool",
}


def cpp_parameters(library, operator):
    """(name, type) of each parameter of the C++ function that implements an operator."""
    sources = "\n".join(
        path.read_text() for path in sorted((CSRC / library).iterdir()) if path.suffix != ".cu"
    )
    definition = rf"\b{operator}\(\s*(const (?:Optional)?Tensor&[^)]*)\)\s*\{{"
    (parameters,) = re.findall(definition, sources)
    for parameter in parameters.split(","):
        kind, name = parameter.split()[:-1], parameter.split()[-1]
        yield name, CPP_TYPES[" ".join(kind)]


@pytest.mark.parametrize("library", ["cpu", "cuda"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_cpp_takes_the_fields_of_the_class(operator, library):
    """Order and names must agree: a schema tells torch the types, and C++ is not checked."""
    expected = {
        name: kind.replace("(a!)", "")
        for name, kind in argument_types(OPERATORS[operator].args).items()
    }
    assert list(cpp_parameters(library, operator)) == list(expected.items())


def test_cpp_registers_the_operators_and_no_others():
    register = (CSRC / "common" / "register.h").read_text()
    registered = re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&bindings::(\w+)\)', register)
    assert registered == [(operator, operator) for operator in OPERATORS]


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_registers_the_fields_then_how_to_run(operator):
    registered = getattr(torch.ops.kl_kernels, operator).default._schema
    fields = [f for f in OPERATORS[operator].args._fields if f != "grad_logits"]
    names = [argument.name for argument in registered.arguments]
    if not operator.endswith("_backward"):
        fields = list(OPERATORS[operator].args._fields)
    options = names[len(fields) :]
    assert names[: len(fields)] == fields
    assert options in (["backend"], list(Execution._fields))


def test_a_schema_is_what_its_class_says():
    """Written out once, so that the derivation is tested by something else than itself."""
    assert schema("gae", "str? backend") == (
        "(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, bool skip_masked, "
        "Tensor? cu_seqlens, str? backend) -> (Tensor advantages, Tensor returns)"
    )
    assert schema("scale_gradient") == "(Tensor(a!) gradient, Tensor factor) -> ()"
    assert schema("token_stats_backward", returns_gradient=True) == (
        "(Tensor? grad_logprob, Tensor? grad_entropy, Tensor logits, Tensor token_ids, "
        "Tensor? mask, Tensor policy_state, Tensor entropy, float temperature, float? softcap, "
        "bool part) -> Tensor grad_logits"
    )
    assert schema("policy_loss").endswith("Tensor(a!)? grad_logits) -> Tensor terms")
    assert argument_types(Execution) == {"inplace_backward": "bool", "backend": "str?"}
