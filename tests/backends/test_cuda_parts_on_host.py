"""A vocabulary in parts, by CUDA's kernels on host threads (see test_cuda_on_host.py).

`fold_part`'s states, merged in float64, against float64 on every hard input; and the gradient of
each part against the whole's. Parts of one logit, of an odd number, and of more than one block.
"""

import itertools
import math

import pytest
import torch
from host.cuda_on_host import backend
from operators import arguments

from kl_kernels.algebra.parts import finish_parts, local_token_ids, merge_parts
from kl_kernels.backends import reference
from kl_kernels.lab.validate.cases import DIFFICULTIES, Case
from kl_kernels.lab.validate.errors import (
    GRADIENT_BUDGET,
    VALUE_BUDGET,
    gradient_error,
    value_error,
)
from kl_kernels.lab.validate.truth import eager
from kl_kernels.schemas import (
    NO_TOKEN,
    STATE_FIELDS,
    FoldPartArgs,
    TokenKLArgs,
    TokenKLBackwardArgs,
)

VOCAB_SIZE = 2601
CUTS = (0, 1, 100, 101, 2250, 2601)
PARTS = tuple(slice(*ends) for ends in itertools.pairwise(CUTS))
DTYPES = (torch.float32, torch.bfloat16)


def inputs_of(difficulty, dtype):
    inputs = Case(difficulty, VOCAB_SIZE, dtype).inputs()
    ref_temperature = inputs.ref_temperature or inputs.temperature
    transforms = {
        "temperature": inputs.temperature,
        "ref_temperature": ref_temperature,
        "softcap": inputs.softcap,
        "ref_softcap": inputs.ref_softcap,
    }
    return inputs, transforms


def local(token_ids, part):
    return local_token_ids(token_ids, part.start, part.stop - part.start)


def merged(inputs, transforms, has_ref):
    states = []
    for part in PARTS:
        args = FoldPartArgs(
            logits=inputs.logits[..., part],
            ref_logits=inputs.ref_logits[..., part] if has_ref else None,
            token_ids=local(inputs.token_ids, part),
            mask=inputs.mask,
            **transforms,
        )
        states.append(backend().fold_part(args))
    return finish_parts(merge_parts(torch.stack(states)), inputs.mask, torch.float32)


@pytest.mark.parametrize("has_ref", [True, False])
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_merged_states_are_true(difficulty, has_ref):
    for dtype in DTYPES:
        inputs, transforms = inputs_of(difficulty, dtype)
        true = eager(inputs, torch.float64)
        got = merged(inputs, transforms, has_ref).outputs
        for name in true if has_ref else ("logprob", "entropy"):
            error = value_error(name, getattr(got, name), true[name])
            assert error <= VALUE_BUDGET, (dtype, name, error)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_gradients_of_parts_are_those_of_the_whole(difficulty):
    generator = torch.Generator().manual_seed(0)
    kernels = backend()
    for dtype in DTYPES:
        inputs, transforms = inputs_of(difficulty, dtype)
        upstream = torch.randn(4, *inputs.token_ids.shape, generator=generator)
        logits, ref_logits = inputs.logits, inputs.ref_logits
        true = torch.empty(logits.shape, dtype=torch.float64)
        args = TokenKLArgs(
            logits.double(), ref_logits.double(), inputs.token_ids, inputs.mask, **transforms
        )
        out = reference.token_kl(args)
        grads = dict(zip(("grad_logprob", "grad_kl", "grad_forward_kl", "grad_entropy"), upstream))
        backward = TokenKLBackwardArgs(
            **args._asdict(),
            **grads,
            policy_state=out.policy_state,
            ref_state=out.ref_state,
            kl=out.kl,
            entropy=out.entropy,
            part=False,
            grad_logits=true,
        )
        reference.token_kl_backward(backward)

        whole = merged(inputs, transforms, has_ref=True)
        got = torch.full_like(logits, math.nan)
        for part in PARTS:
            of_part = backward._replace(
                logits=logits[..., part],
                ref_logits=ref_logits[..., part],
                token_ids=local(inputs.token_ids, part),
                policy_state=whole.policy_state,
                ref_state=whole.ref_state,
                kl=whole.outputs.kl,
                entropy=whole.outputs.entropy,
                part=True,
                grad_logits=got[..., part],
            )
            kernels.token_kl_backward(of_part)
        # The gradient is the difference of terms as large as the KL.
        terms = upstream.abs().sum(0) * out.kl.nan_to_num(1.0, 1.0).clamp_min(1.0)
        error = gradient_error(got, true, terms / inputs.temperature)
        assert error <= GRADIENT_BUDGET, (dtype, error)


def random_rows(vocab_size):
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = 3 * torch.randn(2, 2, 3, vocab_size, generator=g)
    return logits, ref_logits, torch.randint(vocab_size, (2, 3), generator=g)


@pytest.mark.parametrize("vocab_size", [13, 2601])  # one block, two
@pytest.mark.parametrize("has_ref", [True, False])
def test_special_rows_of_a_part(vocab_size, has_ref):
    logits, ref_logits, token_ids = random_rows(vocab_size)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    logits[1, 2] = math.nan
    logits[0, 1], ref_logits[0, 1] = -math.inf, -math.inf
    token_ids[0] = NO_TOKEN
    token_ids[1, 0], token_ids[1, 1] = -1, vocab_size
    args = arguments(
        "fold_part",
        logits=logits,
        ref_logits=ref_logits if has_ref else None,
        token_ids=token_ids,
        mask=mask,
    )
    fields = dict(zip(STATE_FIELDS, state := backend().fold_part(args)))
    assert len(fields) == (9 if has_ref else 4)
    assert (state[:, 1, 2] == 0).all()  # masked
    for name in ("token_tx", "token_ty")[: 2 if has_ref else 1]:
        token = fields.pop(name)
        assert (token[0] == math.inf).all()
        assert token[1, :2].isnan().all()
    assert torch.stack(list(fields.values())).isfinite().all()
    for name in ("sx", "ex", "sy", "rk", "fk"):
        assert name not in fields or fields[name][0, 1] == 0  # all -inf


def test_a_token_elsewhere_has_no_entry_in_the_gradient():
    """The token is NaN, as outside the vocabulary, unless the logits are declared a part."""
    logits, _, token_ids = random_rows(70)
    kernels = backend()
    out = kernels.token_stats(arguments("token_stats", logits=logits, token_ids=token_ids))

    def grad(ids, part):
        to = torch.empty_like(logits)
        args = arguments(
            "token_stats_backward",
            grad_logprob=torch.ones(token_ids.shape),
            logits=logits,
            token_ids=ids,
            policy_state=out.policy_state,
            entropy=out.entropy,
            part=part,
            grad_logits=to,
        )
        kernels.token_stats_backward(args)
        return to

    elsewhere = torch.full_like(token_ids, NO_TOKEN)
    p = logits.double().softmax(-1)
    torch.testing.assert_close(grad(elsewhere, True).double(), -p, rtol=2e-6, atol=1e-9)
    assert grad(elsewhere, False).isnan().all()
    assert grad(torch.full_like(token_ids, 70), True).isnan().all()
    own = torch.nn.functional.one_hot(token_ids, 70)
    torch.testing.assert_close(grad(token_ids, True).double(), own - p, rtol=2e-6, atol=2e-7)
