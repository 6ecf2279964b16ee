"""Log-probabilities, entropy and whitening."""

import pytest
import torch
import verl.utils.torch_functional as verl_F
from batches import KINDS, gradient, mask_of
from verl.utils.torch_functional import (
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    logprobs_from_logits,
    masked_whiten,
)

import kl_kernels
from kl_kernels.integrations import verl


@pytest.fixture(autouse=True, scope="module")
def patched():
    with verl.patch() as patch:
        yield patch


def logits_and_labels(shape, vocabulary=65, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(*shape, vocabulary, generator=generator)
    return logits.to(dtype), torch.randint(0, vocabulary, shape, generator=generator)


@pytest.mark.exercises("logprobs_from_logits: value and gradient")
@pytest.mark.parametrize("shape", [(3, 7), (21,)])
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_log_probabilities_are_verls(shape, inplace_backward):
    logits, labels = logits_and_labels(shape)

    def ours(x):
        # Pass a copy, as a trainer's logits are no leaves: in place, the gradient replaces it.
        return verl_F.logprobs_from_logits(x * 1, labels, inplace_backward=inplace_backward)

    value, grad = gradient(ours, logits)
    their_value, their_grad = gradient(lambda x: logprobs_from_logits(x, labels), logits)
    torch.testing.assert_close(value, their_value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, their_grad, atol=1e-6, rtol=1e-5)


@pytest.mark.exercises("logprobs_from_logits: inplace_backward")
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_the_gradient_takes_the_place_of_the_logits_where_verl_says_so(inplace_backward):
    logits, labels = logits_and_labels((3, 7))
    leaf = logits.clone().requires_grad_()
    given = leaf * 1
    verl_F.logprobs_from_logits(given, labels, inplace_backward=inplace_backward).sum().backward()
    assert torch.equal(given.detach(), leaf.grad if inplace_backward else logits)


@pytest.mark.exercises("logprobs_from_logits: bfloat16")
def test_log_probabilities_of_bfloat16_are_not_rounded():
    """Theirs: 8 bits of a log-probability. Ours: float32's 24, of the same logits."""
    logits, labels = logits_and_labels((3, 7), dtype=torch.bfloat16)
    exact = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    ours, theirs = (f(logits, labels) for f in (verl_F.logprobs_from_logits, logprobs_from_logits))
    assert (ours.dtype, theirs.dtype) == (torch.float32, torch.bfloat16)
    assert (ours - exact).abs().max() < 1e-5
    assert (theirs - exact).abs().max() > 1e-3


@pytest.mark.exercises("entropy_from_logits, whole, chunked and compiled: value and gradient")
@pytest.mark.parametrize(
    "name", ["entropy_from_logits", "entropy_from_logits_with_chunking", "compiled"]
)
def test_entropy_is_verls(name):
    logits, _ = logits_and_labels((21,))
    if name == "compiled":  # as verl's engines do with what they find when they are made
        ours, theirs = torch.compile(verl_F.entropy_from_logits, dynamic=True), entropy_from_logits
    elif name == "entropy_from_logits":
        ours, theirs = verl_F.entropy_from_logits, entropy_from_logits
    else:
        ours, theirs = (
            lambda x: verl_F.entropy_from_logits_with_chunking(x, chunk_size=4),
            lambda x: entropy_from_logits_with_chunking(x, chunk_size=4),
        )
    value, grad = gradient(ours, logits)
    their_value, their_grad = gradient(theirs, logits)
    torch.testing.assert_close(value, their_value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, their_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.exercises("entropy_from_logits: -inf logits")
def test_ruled_out_tokens_do_not_make_entropy_nan():
    """Theirs: 0 * -inf. Ours: the entropy of the other tokens."""
    logits, _ = logits_and_labels((21,))
    logits[:, 40:] = -torch.inf
    assert entropy_from_logits(logits).isnan().all()
    others = entropy_from_logits(logits[:, :40])
    torch.testing.assert_close(verl_F.entropy_from_logits(logits), others, atol=1e-5, rtol=1e-5)


@pytest.mark.exercises("masked_whiten")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_verls_where_there_are_tokens(kind, shift_mean):
    mask = mask_of(kind)
    values = 3 + 2 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    theirs = masked_whiten(values, mask, shift_mean)
    for whiten in (verl_F.masked_whiten, kl_kernels.masked_whiten):
        ours = whiten(values, mask, shift_mean=shift_mean)
        torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-6, rtol=1e-5)
        assert (ours[~mask] == 0).all()


@pytest.mark.exercises("masked_whiten: one position, or none")
@pytest.mark.parametrize("n_tokens", [0, 1])
def test_whitening_almost_nothing(n_tokens):
    """Theirs: ValueError. Ours: 0, there is no advantage over oneself."""
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask.view(-1)[:n_tokens] = True
    with pytest.raises(ValueError, match=r"mask"):
        masked_whiten(torch.ones(2, 3), mask)
    assert (verl_F.masked_whiten(torch.ones(2, 3), mask) == 0).all()
