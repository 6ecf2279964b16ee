"""A vocabulary in parts, by CUDA's kernels on host threads (see test_cuda_on_host.py).

`fold_part`'s states, merged in float64, against float64 on every hard input; and the gradient of
each part against the whole's. Parts of one logit, of an odd number, and of more than one block.
"""

import itertools
import math

import pytest
import torch
from host.cuda_on_host import backend

from kl_kernels import reference
from kl_kernels.parts import finish_parts, local_token_ids, merge_parts
from kl_kernels.schemas import ELSEWHERE, STATE_FIELDS
from kl_kernels.validate.cases import DIFFICULTIES, Case
from kl_kernels.validate.errors import (
    GRADIENT_BUDGET,
    VALUE_BUDGET,
    gradient_error,
    value_error,
)
from kl_kernels.validate.truth import eager

VOCAB_SIZE = 2601
CUTS = (0, 1, 100, 101, 2250, 2601)
PARTS = tuple(slice(*ends) for ends in itertools.pairwise(CUTS))
DTYPES = (torch.float32, torch.bfloat16)


def inputs_of(difficulty, dtype):
    inputs = Case(difficulty, VOCAB_SIZE, dtype).inputs()
    ref_temperature = inputs.ref_temperature or inputs.temperature
    scales = inputs.temperature, ref_temperature, inputs.softcap, inputs.ref_softcap
    return inputs, scales


def local(token_ids, part):
    return local_token_ids(token_ids, part.start, part.stop - part.start)


def merged(inputs, scales, alone):
    states = []
    for part in PARTS:
        ref_logits = None if alone else inputs.ref_logits[..., part]
        ids = local(inputs.token_ids, part)
        logits = inputs.logits[..., part]
        states.append(backend().fold_part(logits, ref_logits, ids, inputs.mask, *scales))
    return finish_parts(merge_parts(states), inputs.mask, torch.float32)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_merged_states_are_true(difficulty, alone):
    for dtype in DTYPES:
        inputs, scales = inputs_of(difficulty, dtype)
        true = eager(inputs, torch.float64)
        got = merged(inputs, scales, alone).outputs
        for name in ("logprob", "entropy") if alone else true:
            error = value_error(name, getattr(got, name), true[name])
            assert error <= VALUE_BUDGET, (dtype, name, error)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_gradients_of_parts_are_those_of_the_whole(difficulty):
    generator = torch.Generator().manual_seed(0)
    kernels = backend()
    for dtype in DTYPES:
        inputs, scales = inputs_of(difficulty, dtype)
        upstream = torch.randn(4, *inputs.token_ids.shape, generator=generator)
        logits, ref_logits = inputs.logits, inputs.ref_logits
        rest = inputs.token_ids, inputs.mask
        true = torch.empty(logits.shape, dtype=torch.float64)
        doubles = logits.double(), ref_logits.double()
        saved = reference.token_kl(*doubles, *rest, *scales)
        of_whole = saved[5], saved[6], saved[2], saved[4]
        reference.token_kl_backward(*upstream, *doubles, *rest, *of_whole, *scales, False, true)

        whole = merged(inputs, scales, alone=False)
        of_whole = whole.policy_state, whole.ref_state, whole.outputs.kl, whole.outputs.entropy
        got = torch.full_like(logits, math.nan)
        for part in PARTS:
            kernels.token_kl_backward(
                *upstream, logits[..., part], ref_logits[..., part],
                local(inputs.token_ids, part), inputs.mask, *of_whole, *scales, True,
                got[..., part],
            )  # fmt: skip
        # The gradient is the difference of terms as large as the KL.
        terms = upstream.abs().sum(0) * saved[2].nan_to_num(1.0, 1.0).clamp_min(1.0)
        error = gradient_error(got, true, terms / inputs.temperature)
        assert error <= GRADIENT_BUDGET, (dtype, error)


def random_rows(vocab_size):
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = 3 * torch.randn(2, 2, 3, vocab_size, generator=g)
    return logits, ref_logits, torch.randint(vocab_size, (2, 3), generator=g)


@pytest.mark.parametrize("vocab_size", [13, 2601])  # one block, two
@pytest.mark.parametrize("alone", [False, True])
def test_special_rows_of_a_part(vocab_size, alone):
    logits, ref_logits, token_ids = random_rows(vocab_size)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    logits[1, 2] = math.nan
    logits[0, 1], ref_logits[0, 1] = -math.inf, -math.inf
    token_ids[0] = ELSEWHERE
    token_ids[1, 0], token_ids[1, 1] = -1, vocab_size
    state = backend().fold_part(
        logits, None if alone else ref_logits, token_ids, mask, 1.0, 1.0, None, None
    )
    fields = dict(zip(STATE_FIELDS, state))
    assert len(fields) == (4 if alone else 9)
    assert (state[:, 1, 2] == 0).all()  # masked
    for name in ("token_tx", "token_ty")[: 1 if alone else 2]:
        token = fields.pop(name)
        assert (token[0] == math.inf).all()
        assert token[1, :2].isnan().all()
    assert torch.stack(list(fields.values())).isfinite().all()
    for name in ("sx", "ex", "sy", "rk", "fk"):
        assert name not in fields or fields[name][0, 1] == 0  # all -inf


def test_a_token_elsewhere_has_no_entry_in_the_gradient():
    """Where logits are not told to be a part, it is a token outside the vocabulary: NaN."""
    logits, _, token_ids = random_rows(70)
    kernels = backend()
    *_, entropy, state = kernels.token_stats(logits, token_ids, None, 1.0, None)
    ones = torch.ones(token_ids.shape)

    def grad(ids, part):
        to = torch.empty_like(logits)
        saved = ids, None, state, entropy, 1.0, None
        kernels.token_stats_backward(ones, None, logits, *saved, part, to)
        return to

    elsewhere = torch.full_like(token_ids, ELSEWHERE)
    p = logits.double().softmax(-1)
    torch.testing.assert_close(grad(elsewhere, True).double(), -p, rtol=2e-6, atol=1e-9)
    assert grad(elsewhere, False).isnan().all()
    assert grad(torch.full_like(token_ids, 70), True).isnan().all()
    own = torch.nn.functional.one_hot(token_ids, 70)
    torch.testing.assert_close(grad(token_ids, True).double(), own - p, rtol=2e-6, atol=2e-7)
