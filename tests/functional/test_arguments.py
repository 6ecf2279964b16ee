"""Every bad argument gets one sentence: its name, its value, what is accepted."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import kl_kernels
from kl_kernels.checks import values_are_at_hand

V = 7
LOGITS = torch.zeros(2, 3, V)
IDS = torch.zeros(2, 3, dtype=torch.long)
MASK = torch.ones(2, 3, dtype=torch.bool)
TOKEN_KL = {"logits": LOGITS, "ref_logits": LOGITS, "token_ids": IDS}
REWARDS = TOKEN_KL | {"scores": torch.zeros(2), "mask": MASK, "kl_coef": 0.1}

BAD_TOKEN_KL = [
    ({"temperature": 0.0}, ValueError, r"temperature is 0.0; .* above 0"),
    ({"temperature": float("nan")}, ValueError, r"temperature is nan"),
    ({"temperature": float("inf")}, ValueError, r"temperature is inf"),
    ({"ref_temperature": -1.0}, ValueError, r"ref_temperature is -1.0"),
    ({"temperature": "1"}, TypeError, r"temperature is '1', a str; .* number"),
    ({"softcap": [30.0]}, TypeError, r"softcap is \[30.0\], a list; .* number"),
    ({"mask": MASK.to(torch.complex64)}, TypeError, r"mask has dtype torch.complex64; .* real"),
    ({"softcap": 0.0}, ValueError, r"softcap is 0.0"),
    ({"ref_softcap": -3.0}, ValueError, r"ref_softcap is -3.0"),
    (
        {"logits": LOGITS.long()},
        TypeError,
        r"logits has dtype torch.int64; accepted: float32, bfloat16, float16, float64$",
    ),
    (
        {"temperature": torch.ones(1)},
        TypeError,
        r"temperature is of shape \(1,\).*, a Tensor; .* number",
    ),
    ({"logits": [1.0]}, TypeError, r"logits is a list"),
    ({"logits": LOGITS[..., :0]}, ValueError, r"logits has shape \(2, 3, 0\)"),
    ({"logits": torch.tensor(1.0)}, ValueError, r"logits has shape \(\)"),
    ({"ref_logits": LOGITS[..., 1:]}, ValueError, r"ref_logits has shape \(2, 3, 6\)"),
    ({"ref_logits": LOGITS.to("meta")}, ValueError, r"ref_logits is on meta, logits are on cpu"),
    ({"ref_logits": LOGITS.clone().requires_grad_()}, ValueError, r"ref_logits requires grad"),
    ({"token_ids": IDS[:, 1:]}, ValueError, r"token_ids has shape \(2, 2\).* need \(2, 3\)"),
    ({"token_ids": IDS.float()}, TypeError, r"token_ids has dtype torch.float32; accepted: int64"),
    ({"token_ids": [[0]]}, TypeError, r"token_ids is a list"),
    ({"token_ids": IDS.to("meta")}, ValueError, r"token_ids is on meta"),
    ({"mask": MASK[:1]}, ValueError, r"mask has shape \(1, 3\)"),
    ({"mask": MASK.to("meta")}, ValueError, r"mask is on meta"),
    ({"backend": "tpu"}, ValueError, r"backend is 'tpu'; accepted: 'triton', 'cuda'"),
]
BAD_REWARDS = [
    ({"kl_estimator": "k4"}, ValueError, r"kl_estimator is 'k4'; accepted: 'k1', 'exact'"),
    ({"kl_estimator": "k3"}, ValueError, r"kl_estimator is 'k3'.*biased=True"),
    ({"kl_coef": float("nan")}, ValueError, r"kl_coef is nan"),
    ({"kl_coef": float("inf")}, ValueError, r"kl_coef is inf"),
    ({"kl_coef": -float("inf")}, ValueError, r"kl_coef is -inf"),
    ({"kl_clip": 0.0}, ValueError, r"kl_clip is 0.0"),
    ({"score_clip": -1.0}, ValueError, r"score_clip is -1.0"),
    ({"score_position": "first"}, ValueError, r"score_position is 'first'; accepted: 'last_token'"),
    (
        {"score_position": torch.zeros(3, dtype=torch.long)},
        ValueError,
        r"score_position has shape \(3,\)",
    ),
    ({"score_position": torch.tensor([0, 3])}, ValueError, r"score_position holds 3"),
    ({"scores": torch.zeros(3)}, ValueError, r"scores has shape \(3,\)"),
    ({"scores": 1.0}, TypeError, r"scores is a float"),
    ({"mask": None}, TypeError, r"mask is a NoneType"),
    ({"logits": LOGITS[0], "ref_logits": LOGITS[0]}, ValueError, r"logits has shape \(3, 7\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_TOKEN_KL)
def test_token_kl(change, error, message):
    with pytest.raises(error, match=message):
        kl_kernels.token_kl(**(TOKEN_KL | change))


@pytest.mark.parametrize(("change", "error", "message"), BAD_TOKEN_KL + BAD_REWARDS)
def test_kl_rewards(change, error, message):
    if "token_ids" in change or "logits" not in change or "ref_logits" in change:
        with pytest.raises(error, match=message):
            kl_kernels.kl_rewards(**(REWARDS | change))


@pytest.mark.parametrize(
    ("change", "error", "message"), [b for b in BAD_TOKEN_KL if "ref_" not in next(iter(b[0]))]
)
def test_token_stats(change, error, message):
    arguments = {k: v for k, v in TOKEN_KL.items() if k != "ref_logits"}
    with pytest.raises(error, match=message):
        kl_kernels.token_stats(**(arguments | change))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("bad", [-1, V, 10**12])
def test_token_ids_out_of_range(backend, bad):
    token_ids = IDS.clone()
    token_ids[1, 2] = bad
    with pytest.raises(ValueError, match=rf"token_ids holds {bad} .*accepted: 0 to {V - 1}"):
        kl_kernels.token_kl(LOGITS, LOGITS, token_ids, backend=backend)
    mask = MASK.clone()
    mask[1, 2] = False
    result = kl_kernels.token_kl(LOGITS, LOGITS, token_ids, mask=mask, backend=backend)
    assert result.logprob[1, 2] == 0


def test_an_impossible_backend_lists_the_possible_ones_and_the_reasons():
    with pytest.raises(ValueError, match="backend 'cuda' cannot run here") as caught:
        kl_kernels.token_kl(**TOKEN_KL, backend="cuda")
    assert "possible: 'triton', 'cpu', 'reference'" in str(caught.value)
    with pytest.raises(ValueError, match="'cpu' takes float32, bfloat16 and float16"):
        kl_kernels.token_kl(LOGITS.double(), LOGITS, IDS, backend="cpu")


def test_a_reference_that_requires_grad_is_fine_without_grad_mode():
    ref_logits = LOGITS.clone().requires_grad_()
    with torch.no_grad():
        kl_kernels.token_kl(LOGITS, ref_logits, IDS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, r"^logits is a list"),
        ({"index": 3}, TypeError, r"^index is a int"),
        ({"index": IDS.to("meta")}, ValueError, r"^index is on meta"),
        ({"index": IDS[..., None].to("meta")}, ValueError, r"^index is on meta"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"index": IDS[..., None], "backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"index": IDS + V}, ValueError, rf"index holds {V} at an unmasked position"),
        ({"row_mask": "all"}, TypeError, r"row_mask is a str"),
        ({"row_mask": MASK[:1]}, ValueError, r"row_mask has shape \(1, 3\)"),
        ({"index": IDS - 1}, ValueError, r"index holds -1 at an unmasked position"),
        ({"index": IDS.float()}, TypeError, r"index has dtype torch.float32"),
        ({"index": IDS[0]}, ValueError, r"index has shape \(3,\)"),
    ],
)
def test_selective_log_softmax_names_its_own_arguments(change, error, message):
    with pytest.raises(error, match=message):
        kl_kernels.selective_log_softmax(**({"logits": LOGITS, "index": IDS} | change))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("masked_mean", {"x": 3, "mask": MASK}, "x is a int"),
        ("kl_penalty", {"logprobs": None, "ref_logprobs": MASK}, "logprobs is a NoneType"),
        ("overlong_penalty", {"lengths": [1], "max_length": 2, "buffer": 1}, "lengths is a list"),
    ],
)
def test_what_is_no_tensor_is_named(function, arguments, message):
    with pytest.raises(TypeError, match=message):
        getattr(kl_kernels, function)(**arguments)


@pytest.mark.parametrize("wrong", [None, b"k1", ["k1"]])
def test_kl_penalty_refuses_what_is_no_name(wrong):
    logprobs = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"kl_penalty is .*accepted: 'k1'"):
        kl_kernels.kl_penalty(logprobs, logprobs, wrong)


def test_importance_weights_refuse_a_bound_that_is_no_number():
    logprobs = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="high is '2', a str"):
        kl_kernels.importance_weights(logprobs, logprobs, MASK, high="2")


PER_TOKEN = torch.zeros(2, 3)
LOSS = {"logits": LOGITS, "token_ids": IDS, "old_logprobs": PER_TOKEN, "advantages": PER_TOKEN}
HEAD = {"hidden": torch.zeros(2, 3, 5), "weight": torch.zeros(V, 5), "token_ids": IDS}
HEADS = HEAD | {"ref_hidden": HEAD["hidden"], "ref_weight": HEAD["weight"]}
SHORT = {"logits": LOGITS[:, 1:], "hidden": HEAD["hidden"][:, 1:], "ref_logits": LOGITS[:, 1:]}
SHORT |= {"ref_hidden": SHORT["hidden"]}


@pytest.mark.parametrize(
    ("function", "arguments", "rows", "per_token"),
    [
        ("token_stats", {"logits": LOGITS, "token_ids": IDS}, "logits", "token_ids"),
        ("token_kl", TOKEN_KL, "logits", "token_ids"),
        ("token_kl", TOKEN_KL | {"mask": MASK}, None, "mask"),
        ("kl_rewards", REWARDS, "logits", "token_ids"),
        ("kl_rewards", REWARDS, None, "mask"),
        ("fused_policy_loss", LOSS | {"mask": MASK}, "logits", "token_ids"),
        ("fused_policy_loss", LOSS | {"mask": MASK}, None, "old_logprobs"),
        ("fused_policy_loss", LOSS | {"mask": MASK}, None, "advantages"),
        ("fused_policy_loss", LOSS | {"mask": MASK}, None, "mask"),
        ("selective_log_softmax", {"logits": LOGITS, "index": IDS}, "logits", "index"),
        ("token_jsd", {"logits": LOGITS, "ref_logits": LOGITS, "mask": MASK}, None, "mask"),
        ("linear_token_stats", HEAD, "hidden", "token_ids"),
        ("linear_token_stats", HEAD | {"mask": MASK}, None, "mask"),
        ("linear_token_kl", HEADS, "hidden", "token_ids"),
        (
            "linear_token_jsd",
            {k: v for k, v in HEADS.items() if k != "token_ids"} | {"mask": MASK},
            None,
            "mask",
        ),
    ],
)
def test_one_row_more_or_less_than_tokens_is_answered_with_the_slice(
    function, arguments, rows, per_token
):
    """A model has one row per input token: what is passed whole is off by one."""
    function = getattr(kl_kernels, function)
    heads = "hidden" if "hidden" in arguments else "logits"
    kept = arguments[per_token]
    short = {per_token: kept[:, 1:]}
    with pytest.raises(ValueError, match=rf"^{per_token} has .* pass {heads}\[:, :-1\]$"):
        function(**(arguments | short))
    long = {per_token: torch.cat([kept, kept[:, :1]], 1)}
    with pytest.raises(ValueError, match=rf"^{per_token} has .* pass {per_token}\[:, 1:\]$"):
        function(**(arguments | long))
    if rows:  # the same from the other side
        shorter = {name: x for name, x in SHORT.items() if name in arguments}
        with pytest.raises(ValueError, match=rf"^{per_token} has .* pass {per_token}\[:, 1:\]$"):
            function(**(arguments | shorter))


def test_the_slice_is_named_for_any_number_of_dimensions_and_only_where_one_row_differs():
    row, ids = torch.zeros(5, V), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"pass logits\[:-1\]$"):
        kl_kernels.token_stats(row, ids)
    with pytest.raises(ValueError, match=r"pass logits\[:, :, :-1\]$"):
        kl_kernels.token_stats(row.expand(2, 3, 5, V), ids.expand(2, 3, 4))
    several = torch.zeros(2, 2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"index has .* pass logits\[:, :-1\]$"):
        kl_kernels.selective_log_softmax(LOGITS, several)
    with pytest.raises(ValueError, match=r"topk_ids has .* pass logits\[:, :-1\]$"):
        kl_kernels.topk_kl(LOGITS, several, topk_logprobs=-several.float())
    for other in (torch.zeros(2, 5), torch.zeros(1, 2), torch.zeros(2), torch.zeros(())):
        with pytest.raises(ValueError, match=r"need \(2, 3\)$"):
            kl_kernels.token_stats(LOGITS, other.long())


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 0)])
def test_operators_of_the_cpu_refuse_an_empty_vocabulary(shape):
    """Work is divided by its size: a process would end here."""
    logits, mask = torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.bool)
    options = 1.0, 1.0, None, None
    with pytest.raises(ValueError, match="logits must hold at least one logit"):
        torch.ops.kl_kernels.token_jsd(logits, logits, mask, 0.5, *options, False, "cpu")
    with pytest.raises(ValueError, match="logits must hold at least one logit"):
        torch.ops.kl_kernels.fold_part(logits, None, mask.long(), mask, *options, "cpu")
    with pytest.raises(ValueError, match="gradient must hold at least one logit"):
        torch.ops.kl_kernels.scale_gradient(logits, torch.tensor(2.0), "cpu")


@pytest.mark.parametrize("number", [torch.tensor(0.5), Fraction(1, 2), np.float32(0.5)])
def test_numbers_may_be_of_any_type(number):
    expected = kl_kernels.token_kl(**TOKEN_KL, temperature=0.5)
    assert torch.equal(kl_kernels.token_kl(**TOKEN_KL, temperature=number).kl, expected.kl)


def test_values_are_looked_at_where_that_costs_nothing():
    assert values_are_at_hand(IDS)
    assert not values_are_at_hand(IDS.to("meta"))
    seen = []
    torch.func.vmap(lambda x: seen.append(values_are_at_hand(x)) or x)(IDS)
    assert seen == [False]


def test_compute_gae_names_a_backend_that_is_none():
    rewards = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="backend is 'tpu'"):
        kl_kernels.compute_gae(rewards, rewards, MASK, backend="tpu")
