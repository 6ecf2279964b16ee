"""Estimators of the KL against enumeration: every answer as often as it is likely."""

import itertools

import numpy as np
import pytest
import torch

from kl_kernels.lab.study.cost import CONTENDERS, measure_cost
from kl_kernels.lab.study.estimators import compare, sequence_sums
from kl_kernels.lab.study.tree import compare_forms

# Answers of two tokens; the second is drawn after the first from another row. In sixteenths.
POLICY = torch.tensor([[8, 4, 4], [1, 7, 8], [12, 2, 2], [4, 8, 4]]).double() / 16
REFERENCE = torch.tensor([[4, 4, 8], [8, 4, 4], [4, 4, 8], [2, 6, 8]]).double() / 16


@pytest.fixture(scope="module")
def population():
    """The 256 equally likely answers of the policy, as rows of logits."""
    answers = [
        answer
        for answer in itertools.product(range(3), repeat=2)
        for _ in range(round(float(256 * POLICY[0, answer[0]] * POLICY[1 + answer[0], answer[1]])))
    ]
    assert len(answers) == 256
    tokens = torch.tensor(answers)
    states = torch.stack([torch.zeros(256, dtype=torch.long), 1 + tokens[:, 0]], 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return POLICY.log()[states], REFERENCE.log()[states], tokens, mask


def by_hand():
    """Each estimator's value for each answer, with its probability."""
    rows = []
    for a, b in itertools.product(range(3), repeat=2):
        d = [float((POLICY[s, t] / REFERENCE[s, t]).log()) for s, t in ((0, a), (1 + a, b))]
        kl = [float((POLICY[s] * (POLICY[s] / REFERENCE[s]).log()).sum()) for s in (0, 1 + a)]
        probability = float(POLICY[0, a] * POLICY[1 + a, b])
        values = {
            "exact": sum(kl),
            "k1": sum(d),
            "k2": sum(x * x / 2 for x in d),
            "k3": sum(np.exp(-x) - 1 + x for x in d),
        }
        rows.append((probability, values))
    return rows


def moments(name):
    rows = by_hand()
    mean = sum(p * values[name] for p, values in rows)
    return mean, sum(p * (values[name] - mean) ** 2 for p, values in rows)


def test_bias_and_variance_are_those_of_the_enumeration(population):
    sums = {name: kl.numpy() for name, kl in sequence_sums(*population).items()}
    found = compare(sums)
    mean, variance = moments("exact")
    assert found["kl"]["mean"] == pytest.approx(mean, rel=1e-12)
    assert found["sd_exact"] == pytest.approx((variance * 256 / 255) ** 0.5, rel=1e-9)
    for name in ("k1", "k2", "k3"):
        of_estimator, its_variance = moments(name)
        estimator = found["estimators"][name]
        assert estimator["bias"]["mean"] == pytest.approx(of_estimator - mean, abs=1e-12)
        assert estimator["variance_ratio"]["mean"] == pytest.approx(its_variance / variance)
    assert moments("k1")[0] == pytest.approx(mean, abs=1e-12), "k1 has no bias"
    assert moments("k3")[0] == pytest.approx(mean, abs=1e-12), "k3 has none either"
    assert abs(moments("k2")[0] - mean) > 0.01, "k2 has"


def test_masked_tokens_count_for_nothing(population):
    logits, ref_logits, tokens, mask = population
    short = mask.clone()
    short[:, 1] = False
    sums = sequence_sums(
        torch.where(short[..., None], logits, torch.nan), ref_logits, tokens, short
    )
    first = sequence_sums(logits[:, :1], ref_logits[:, :1], tokens[:, :1], mask[:, :1])
    for name, expected in first.items():
        torch.testing.assert_close(sums[name], expected, rtol=0, atol=0)


def test_what_is_timed_is_the_same_number():
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    tokens = torch.randint(11, (2, 5), generator=generator)
    found = {name: f(logits, ref_logits, tokens) for name, f in CONTENDERS.items()}
    exact = [kl for name, kl in found.items() if name.startswith("exact")]
    sampled = [kl for name, kl in found.items() if not name.startswith("exact")]
    torch.testing.assert_close(*exact)
    torch.testing.assert_close(*sampled)
    assert not torch.allclose(exact[0], sampled[0])


def test_the_cost_has_every_contender_beside_the_first():
    cost = measure_cost(2, 3, 17)
    assert cost["contenders"].keys() == CONTENDERS.keys()
    assert next(iter(cost["contenders"].values()))["ratio"] == 1.0
    assert cost["mb_of_logits"] == 2 * 2 * 3 * 17 * 4 / 1e6


def test_three_forms_have_the_gradient_of_the_objective_and_exact_alone_has_not():
    forms = compare_forms()
    right = [name for name, form in forms.items() if form["relative_error"] < 1e-13]
    assert right == [
        "k1 in the reward",
        "exact in the reward, advantage_correction",
        "exact in the reward, differentiable KL in the loss",
    ]
    assert forms["exact in the reward, alone"]["cosine"] < 0.9
