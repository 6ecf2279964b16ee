"""TRL's functions on logits, hidden states and output layers, with and without the patch."""

import math

import pytest
import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.server_distillation import server_distillation_trainer
from trl.trainer import distillation_trainer, utils

import kl_kernels
from kl_kernels.integrations import trl

SAME = {"rtol": 2e-6, "atol": 2e-6}


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def both(function, *leaves):
    """Results and gradients of `function`, which looks TRL's functions up, without and with us."""
    results = []
    for patched in (False, True):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        patch = trl.patch() if patched else None
        try:
            outputs = function(*inputs)
        finally:
            if patch is not None:
                patch.undo()
        weights = (torch.linspace(-1, 2, x.numel()).view(x.shape) for x in outputs)
        results.append(
            (outputs, gradients(sum((x * w).sum() for x, w in zip(outputs, weights)), *inputs))
        )
    return results


@pytest.mark.exercises("importing patches nothing; undo restores every module")
def test_undo():
    from trl.experimental.sdpo import loss_utils

    originals = utils.selective_log_softmax, loss_utils.selective_log_softmax
    assert originals[0].__module__ == "trl.trainer.utils"
    patch = trl.patch()
    assert utils.selective_log_softmax is loss_utils.selective_log_softmax
    assert utils.selective_log_softmax is not originals[0]
    patch.undo()
    assert (utils.selective_log_softmax, loss_utils.selective_log_softmax) == originals


@pytest.mark.exercises("selective_log_softmax, one and several tokens, and entropy_from_logits")
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4)])
def test_selective_log_softmax(shape):
    torch.manual_seed(0)
    logits, index = torch.randn(3, 5, 50) * 3, torch.randint(50, shape)
    mask = torch.rand(shape[:2]) > 0.3
    mask = mask if len(shape) == 2 else None

    def values(logits):
        return (
            utils.selective_log_softmax(logits, index, 0.7, mask),
            utils.entropy_from_logits(logits),
        )

    theirs, ours = both(values, logits)
    torch.testing.assert_close(ours, theirs, **SAME)


@pytest.mark.exercises("selective_log_softmax_and_entropy")
@pytest.mark.parametrize("entropy_requires_grad", [False, True])
def test_logprob_and_entropy(entropy_requires_grad):
    torch.manual_seed(0)
    logits, index = torch.randn(3, 5, 50) * 3, torch.randint(50, (3, 5))

    def values(logits):
        logprob, entropy = utils.selective_log_softmax_and_entropy(
            logits, index, entropy_requires_grad, temperature=1.3, row_mask=index % 3 != 0
        )
        assert entropy.requires_grad == entropy_requires_grad
        return logprob, entropy

    theirs, ours = both(values, logits)
    torch.testing.assert_close(ours, theirs, **SAME)


@pytest.mark.exercises("-inf logits: TRL's entropy and gradient are NaN, ours are right")
def test_minus_infinity():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 40)
    logits[..., 30:] = -torch.inf  # a padded vocabulary
    theirs, ours = both(lambda x: (utils.entropy_from_logits(x),), logits)
    assert theirs[0][0].isnan().all()
    assert theirs[1][0].isnan().any()
    without = both(lambda x: (utils.entropy_from_logits(x),), logits[..., :30])[0]
    torch.testing.assert_close(ours[0], without[0], **SAME)
    torch.testing.assert_close(ours[1][0][..., :30], without[1][0], **SAME)
    assert not ours[1][0][..., 30:].any()


@pytest.mark.exercises("bfloat16 logits: log-probabilities in float32, exact to their rounding")
def test_bfloat16():
    torch.manual_seed(0)
    logits, index = (torch.randn(2, 3, 4000) * 3).bfloat16(), torch.randint(4000, (2, 3))
    exact = logits.double().log_softmax(-1).gather(-1, index[..., None])[..., 0]
    theirs = utils.selective_log_softmax(logits, index)
    with trl.patch():
        ours = utils.selective_log_softmax(logits, index)
    assert theirs.dtype == torch.bfloat16
    assert (theirs.double() - exact).abs().max() > 1e-3
    assert (ours.double() - exact).abs().max() < 1e-5


HEAD = {
    "plain": {},
    "softcap": {"final_logit_softcapping": 5.0},
    "scale": {"logit_scale": 0.25},
}


def head(seed, bias=True):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (11, 300))
    return hidden, weight, torch.randn(300, generator=generator) if bias else None


@pytest.mark.exercises("the fused output layer: bias, softcap, logit scale, temperature")
@pytest.mark.parametrize("options", HEAD.values(), ids=HEAD)
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")])
def test_fused_head(options, outputs):
    targets = torch.arange(11) * 7

    def values(*factors):
        found = utils._ChunkedLogProbFunction.apply(
            *factors,
            targets,
            0.8,
            128,
            options.get("final_logit_softcapping"),
            options.get("logit_scale", 1.0),
            outputs,
        )
        assert [x is not None for x in found] == [True, "entropy" in outputs, False, False, False]
        return [x for x in found if x is not None]

    theirs, ours = both(values, *head(0))
    for one, other in zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1])):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.exercises("outputs of the fused output layer that stay TRL's")
def test_other_outputs_stay_theirs():
    factors, targets = head(0), torch.arange(11)
    arguments = (*factors, targets, 1.0, 128, None, 1.0, ("log_probs", "is_top1"))
    theirs = utils._ChunkedLogProbFunction.apply(*arguments)
    with trl.patch():
        ours = utils._ChunkedLogProbFunction.apply(*arguments)
    assert ours[4].equal(theirs[4])
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)


@pytest.mark.exercises("a batch without any valid token")
def test_no_token():
    hidden, weight, _ = head(0)
    hidden = hidden[:0].requires_grad_()
    with trl.patch():
        logprob, *_ = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, torch.zeros(0, dtype=torch.long), 1.0, 128, None, 1.0, ()
        )
    assert logprob.shape == (0,)
    logprob.sum().backward()
    assert hidden.grad.shape == (0, 16)


@pytest.mark.exercises("divergence of two output layers: forward KL, JSD, reverse KL")
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("options", HEAD.values(), ids=HEAD)
def test_divergence(beta, options):
    teacher_hidden, teacher_weight, teacher_bias = head(1)
    of_both = (
        options.get("logit_scale", 1.0),
        options.get("final_logit_softcapping"),
        options.get("logit_scale", 1.0),
        options.get("final_logit_softcapping"),
    )
    entropies = []

    def values(*student):
        divergence, entropy = distillation_trainer.ChunkedDivergenceFunction.apply(
            *student,
            teacher_hidden,
            teacher_weight.requires_grad_(),
            teacher_bias,
            beta,
            1.5,
            *of_both,
        )
        assert not entropy.requires_grad
        entropies.append(entropy)
        return (divergence,)

    theirs, ours = both(values, *head(0))
    assert theirs[0][0].min() > 0.01
    torch.testing.assert_close(ours[0][0], theirs[0][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(ours[1], theirs[1]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*entropies, rtol=1e-5, atol=1e-5)


@pytest.mark.exercises("GKDTrainer.generalized_jsd_loss")
@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"num_items_in_batch": 17},
        {"reduction": "none"},
        {"num_items_in_batch": 5, "reduction": "none"},
        {"temperature": 2.0, "labels": None},
    ],
    ids=str,
)
def test_generalized_jsd_loss(beta, options):
    torch.manual_seed(0)
    teacher = torch.randn(2, 4, 30)
    labels = torch.tensor([[1, -100, 3, 4], [-100, 2, 2, -100]])
    options = {"labels": labels, "beta": beta} | options

    def values(student):
        return (GKDTrainer.generalized_jsd_loss(student, teacher, **options),)

    theirs, ours = both(values, torch.randn(2, 4, 30))
    assert theirs[0][0].abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, **SAME)


@pytest.mark.exercises("a student that rules out tokens: TRL's JSD is NaN, ours is finite")
def test_jsd_of_a_smaller_vocabulary():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 2, 30), torch.randn(1, 2, 30)
    student[..., 20:] = teacher[..., 25:] = -torch.inf
    theirs, ours = both(lambda x: (GKDTrainer.generalized_jsd_loss(x, teacher),), student)
    assert theirs[0][0].isnan()
    assert theirs[1][0].isnan().any()
    assert 0 < ours[0][0] < 2 * math.log(2)
    assert ours[1][0].isfinite().all()


@pytest.mark.exercises("server distillation's top-k loss with a tail: topk_kl")
@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_top_k_with_a_tail(beta):
    torch.manual_seed(0)
    student = torch.randn(4, 60, requires_grad=True)
    logprobs, ids = torch.randn(4, 60).log_softmax(-1).topk(5)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, 3:] = False  # a server may answer with fewer

    def with_tail(values):
        values = values.masked_fill(~valid, -1e9)
        return server_distillation_trainer._add_tail_bucket(values, valid)

    of_student, support = with_tail(student.log_softmax(-1).gather(-1, ids))
    of_teacher, _ = with_tail(logprobs)
    terms = server_distillation_trainer._jsd_divergence(of_student, of_teacher, beta, support)
    expected = terms.sum(-1)
    found = kl_kernels.topk_kl(student, ids, logprobs.masked_fill(~valid, -torch.inf), beta=beta)
    assert expected.min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *gradients(found.sum(), student), *gradients(expected.sum(), student), rtol=1e-4, atol=1e-6
    )


@pytest.mark.exercises("a sure student: the tail is lost in TRL's loss, not in topk_kl")
def test_a_tail_that_rounding_hides():
    student = torch.zeros(1, 60)
    student[0, 0] = 24.0  # leaves 2e-9 to all others
    exact = student.double().log_softmax(-1)[0]
    ids = torch.tensor([[0, 1]])
    logprobs = torch.tensor([[0.9, 0.05]]).log()
    tail = exact[2:].logsumexp(0)
    expected = (
        0.9 * (math.log(0.9) - exact[0])
        + 0.05 * (math.log(0.05) - exact[1])
        + 0.05 * (math.log(0.05) - tail)
    )
    valid = torch.ones_like(ids, dtype=torch.bool)
    of_student, of_teacher = (
        server_distillation_trainer._add_tail_bucket(x, valid)[0]
        for x in (student.log_softmax(-1)[:, :2], logprobs)
    )
    theirs = server_distillation_trainer._jsd_divergence(
        of_student, of_teacher, 0, torch.ones_like(of_student, dtype=torch.bool)
    ).sum()
    assert (theirs - expected).abs() > 0.1
    ours = kl_kernels.topk_kl(student, ids, logprobs)
    assert (ours - expected).abs() < 1e-5
