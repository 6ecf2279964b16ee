"""The same properties of the Triton kernels, on one small batch: the interpreter takes its time."""

import pytest
import test_properties as of_outputs
import test_properties_gradients as of_gradients
import torch
from hostile_rows import KINDS, Rows


def batch():
    g = torch.Generator().manual_seed(0)
    kinds = ("peaked", "near", "both-out", "late-peak")
    rows = torch.stack([KINDS[kind](37, g) for kind in kinds], 1)
    return Rows(*rows.view(2, 2, 2, 37), torch.randint(37, (2, 2), generator=g))


def generator():
    return torch.Generator().manual_seed(1)


PROPERTIES = (
    (of_outputs.test_a_constant_added_to_a_models_logits_changes_nothing, 8e3, -1e4),
    (of_outputs.test_the_order_of_the_vocabulary_is_of_no_account, generator()),
    (of_outputs.test_columns_that_both_models_rule_out_change_nothing, 5, 9),
    (of_outputs.test_divergences_are_never_negative,),
    (of_outputs.test_models_that_change_places_exchange_their_divergences, 0.2),
    (of_outputs.test_nothing_diverges_from_itself, 0.2, 0.7),
    (of_outputs.test_logprob_is_minus_torchs_cross_entropy,),
    (of_outputs.test_kl_is_cross_entropy_minus_entropy,),
    (of_gradients.test_a_constant_added_to_a_models_logits_changes_no_gradient, 8e3, -1e4),
    (of_gradients.test_a_gradient_adds_up_to_zero_over_the_vocabulary, 0.7),
    (of_gradients.test_temperature_divides_logits_and_gradient, 0.5),
    (of_gradients.test_gradients_are_those_autograd_finds_for_the_definitions,),
)


@pytest.mark.parametrize(
    ("test", "arguments"), [(test, arguments) for test, *arguments in PROPERTIES]
)
def test_on_triton(test, arguments):
    test.hypothesis.inner_test("triton", batch(), *arguments)
