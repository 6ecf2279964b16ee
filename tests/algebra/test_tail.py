"""`fold_tail`: the state of rows without some of their tokens, on every backend against float64."""

import itertools
import math

import pytest
import torch
from host.cuda_on_host import backend as cuda_on_host
from operators import arguments

from kl_kernels.backends import dispatch
from kl_kernels.lab.validate.cases import DIFFICULTIES, Case
from kl_kernels.schemas import NO_TOKEN

BACKENDS = ("reference", "cpu", "triton", "cuda on host")


def kernels(name, logits):
    return cuda_on_host() if name == "cuda on host" else dispatch.choose(name, [logits])


def tail(logits, skipped, backend, **options):
    """Return the natural logarithm of each tail's weight, [B, T], and the state."""
    given = {"token_ids": torch.full(logits.shape[:-1], NO_TOKEN)} | options
    args = arguments("fold_tail", logits=logits, skipped_ids=skipped.sort(-1).values, **given)
    state = kernels(backend, logits).fold_tail(args)
    return state[0].double() * math.log(2) + state[1].double().log(), state


def truth(logits, skipped, temperature=1.0, softcap=None):
    x = logits.double()
    x = x if softcap is None else torch.where(x.isinf(), x, softcap * torch.tanh(x / softcap))
    x = torch.nn.functional.pad(x / temperature, (0, 1))
    left = x.scatter(-1, skipped.clamp_max(x.shape[-1] - 1), -torch.inf)[..., :-1].logsumexp(-1)
    return torch.where(left < -3e38, -torch.inf, left)  # padded by the least number there is


def likeliest(logits, k):
    return logits.nan_to_num(-torch.inf).float().topk(k).indices


def assert_close(found, expected, rtol=3e-6):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=3e-6, equal_nan=True)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_likeliest_tokens_leave_the_others(backend, difficulty):
    for vocab_size, dtype in ((5, torch.float32), (5001, torch.bfloat16), (2304, torch.float32)):
        inputs = Case(difficulty, vocab_size, dtype).inputs()
        skipped = likeliest(inputs.logits, 4)
        found, _ = tail(inputs.logits, skipped, backend, mask=inputs.mask)
        expected = truth(inputs.logits, skipped)
        kept = slice(None) if inputs.mask is None else inputs.mask
        assert_close(found[kept], expected[kept])


@pytest.mark.parametrize("above", [3.0, 28.0, 90.0, 1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_keeps_its_digits_however_little_it_is(backend, above):
    """At 28 nats the others have 1e-12 of the row: no sum of all of it has digits for them."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4099, generator=g)
    skipped = torch.rand(2, 3, 4099, generator=g).topk(9).indices
    expected = truth(logits, skipped)
    rise = above + torch.rand(2, 3, 9, generator=g)
    found, _ = tail(logits.scatter_add(-1, skipped, rise), skipped, backend)
    assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_wherever_they_are(backend):
    """Neighbours, few and many, the ends of the row and of what a thread, tile or block reads."""
    g = torch.Generator().manual_seed(1)
    n = 4609
    logits = torch.randn(1, 6, n, generator=g)
    edges = [i for size in (512, 2048, 4096) for i in (size - 1, size)]
    rows = ([0, n - 1], range(8), range(0, n, 200), edges, range(n - 24, n), ())
    ids = torch.full((1, 6, 24), n + 3)  # behind the vocabulary
    for row, chosen in enumerate(rows):
        ids[0, row, : len(chosen)] = torch.tensor(chosen)
    logits.scatter_add_(-1, ids.clamp_max(n - 1), torch.full(ids.shape, 40.0))
    found, _ = tail(logits, ids, backend)
    assert_close(found, truth(logits, ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_on_both_sides_of_a_split(backend):
    n = 32768 + 515  # a row is more than one program's
    logits = torch.zeros(1, 2, n)
    ids = torch.tensor([[[5, 32766, 32767, n], [32768, 32769, n - 1, n]]])
    logits.scatter_(-1, ids.clamp_max(n - 2), 40.0)
    found, _ = tail(logits, ids, backend)
    assert_close(found, truth(logits, ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left_of_what_is_skipped(backend):
    logits = torch.zeros(1, 4, 33)
    logits[0, 1, 7:] = -torch.inf  # nothing but what is skipped
    logits[0, 2, 30:] = torch.nan
    ids = torch.arange(33).expand(1, 4, 33).clone()
    ids[0, 1, 7:], ids[0, 2, :30], ids[0, 3, 5:] = 33, 33, 33
    _, (_, total, *_) = tail(logits, ids, backend)
    assert total[0, :2].tolist() == [0, 0]
    assert_close(*(x[0, 2:] for x in (tail(logits, ids, backend)[0], truth(logits, ids))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_and_the_tokens_position(backend):
    """The token is told from the anchor whether it is skipped or not."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 1030, generator=g) * 9
    skipped = likeliest(logits, 5)
    tokens = skipped[..., 0].clone()
    tokens[1] = torch.arange(3)
    for temperature, softcap in itertools.product((1.0, 0.7), (None, 8.0)):
        options = {"temperature": temperature, "softcap": softcap}
        found, state = tail(logits, skipped, backend, token_ids=tokens, **options)
        assert_close(found, truth(logits, skipped, **options))
        x = logits.double().gather(-1, tokens[..., None])[..., 0]
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        assert_close((state[0].double() + state[3].double()) * math.log(2), x / temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_for_itself_and_a_mask_skips_it(backend):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 2, 4611, generator=g)[:, :, 2:] * 4
    skipped = likeliest(logits, 6)
    _, together = tail(logits, skipped, backend)
    for b in range(3):
        _, alone = tail(logits[b : b + 1], skipped[b : b + 1], backend)
        assert torch.equal(alone, together[:, b : b + 1])
    logits[1], mask = torch.nan, torch.tensor([True, False, True])[:, None].expand(3, 2)
    _, masked = tail(logits, skipped, backend, mask=mask.contiguous())
    assert torch.equal(masked[:, ::2], together[:, ::2])
    assert not masked[:, 1].any()
