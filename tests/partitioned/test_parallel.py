"""A vocabulary sharded over ranks gives what the whole one gives, on every rank the same bits."""

import os
import time
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import kl_kernels
from kl_kernels.lab.validate.cases import DIFFICULTIES, Case
from kl_kernels.lab.validate.errors import (
    GRADIENT_BUDGET,
    VALUE_BUDGET,
    gradient_error,
    value_error,
)
from kl_kernels.lab.validate.truth import DIFFERENTIABLE, OUTPUTS, eager, gradients
from kl_kernels.partitioned import shards as parallel

V = 76
EQUAL, UNEVEN = (0, 38, 76), (0, 1, 30, 64, 76)  # in padded cases the last shard is -inf
BACKENDS = ("reference", "cpu")


def case(difficulty="random", dtype=torch.float32):
    return Case(difficulty, V, dtype).inputs()


def weights_of(inputs):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(inputs.token_ids.shape, generator=generator) for name in DIFFERENTIABLE
    }


def on_shard(group, inputs, cuts):
    """The arguments of `token_kl` on this rank, with logits that require grad."""
    rank = dist.get_rank(group)
    here = slice(cuts[rank], cuts[rank + 1])
    logits = inputs.logits[..., here].clone().requires_grad_()
    ref_logits = inputs.ref_logits[..., here]
    arguments = vars(inputs) | {"logits": logits, "ref_logits": ref_logits, "group": group}
    return arguments if cuts == EQUAL else arguments | {"vocab_start": cuts[rank]}


def without_reference(arguments):
    return {name: value for name, value in arguments.items() if not name.startswith("ref_")}


def grad_of(outputs, names, weights, logits):
    loss = torch.stack([(weights[name] * outputs[name]).sum() for name in names]).sum()
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def all_quantities(group, difficulties, dtype, cuts, backend):
    found = {}
    for difficulty in difficulties:
        inputs = case(difficulty, dtype)
        weights, arguments = weights_of(inputs), on_shard(group, inputs, cuts)
        result = kl_kernels.token_kl(**arguments, backend=backend)._asdict()
        stats = kl_kernels.token_stats(**without_reference(arguments), backend=backend)._asdict()
        logits = arguments["logits"]
        grads = {name: grad_of(result, (name,), weights, logits) for name in DIFFERENTIABLE}
        grads["stats"] = grad_of(stats, ("logprob", "entropy"), weights, logits)
        outputs = result | {f"stats {name}": value for name, value in stats.items()}
        found[difficulty] = {name: value.detach() for name, value in outputs.items()}, grads
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [EQUAL, UNEVEN])
def test_sharded_rows_are_true(ranks, cuts, dtype, backend):
    shards = ranks(all_quantities, tuple(DIFFICULTIES), dtype, cuts, backend, n=len(cuts) - 1)
    for difficulty in DIFFICULTIES:
        inputs = case(difficulty, dtype)
        outputs, grads = zip(*(shard[difficulty] for shard in shards))
        for name in outputs[0]:
            for other in outputs[1:]:
                torch.testing.assert_close(
                    other[name], outputs[0][name], rtol=0, atol=0, equal_nan=True
                )
        true = eager(inputs, torch.float64)
        for name in (*OUTPUTS, "stats logprob", "stats entropy"):
            expected = true[name.removeprefix("stats ")]
            assert value_error(name, outputs[0][name], expected) <= VALUE_BUDGET, (difficulty, name)
        weights = weights_of(inputs)
        true_grads = gradients(inputs, weights, torch.float64)
        true_grads["stats"] = true_grads["logprob"] + true_grads["entropy"]
        upstream = torch.stack(list(weights.values())).abs().sum(0) / inputs.temperature
        terms = upstream * true["kl"].nan_to_num(1.0, 1.0).clamp_min(1.0)
        for name, expected in true_grads.items():
            got = torch.cat([shard[name] for shard in grads], -1)
            assert gradient_error(got, expected, terms) <= GRADIENT_BUDGET, (difficulty, name)


def padding_shard(group, inputs):
    arguments = on_shard(group, inputs, EQUAL)
    if dist.get_rank(group) == 1:
        arguments["logits"] = torch.full_like(arguments["logits"], -torch.inf).requires_grad_()
        arguments["ref_logits"] = torch.full_like(arguments["ref_logits"], -torch.inf)
    result = kl_kernels.token_kl(**arguments)
    result.kl.sum().backward()
    return [output.detach() for output in result], arguments["logits"].grad


def test_a_shard_of_padding_alone_changes_nothing(ranks):
    inputs = case()
    inputs = replace(inputs, token_ids=inputs.token_ids % EQUAL[1])
    (outputs, grad), (_, padding_grad) = ranks(padding_shard, inputs, n=2)
    kept = on_one_rank(
        replace(
            inputs,
            logits=inputs.logits[..., : EQUAL[1]],
            ref_logits=inputs.ref_logits[..., : EQUAL[1]],
        )
    )
    torch.testing.assert_close(outputs, kept[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, kept[1], rtol=1e-5, atol=1e-6)
    assert not padding_grad.any()


def on_one_rank(inputs):
    logits = inputs.logits.clone().requires_grad_()
    result = kl_kernels.token_kl(**vars(inputs) | {"logits": logits})
    result.kl.sum().backward()
    return [output.detach() for output in result], logits.grad


def one_rank(group, inputs):
    arguments = on_shard(group, inputs, (0, V))
    result = kl_kernels.token_kl(**arguments)
    result.kl.sum().backward()
    return [output.detach() for output in result], arguments["logits"].grad


def test_a_group_of_one_rank_is_no_group(ranks):
    inputs = case()
    ((outputs, grad),) = ranks(one_rank, inputs, n=1)
    expected, expected_grad = on_one_rank(inputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


REWARDS = {"kl_coef": 0.3, "kl_clip": 2.0, "score_clip": 1.0}
SCORES, MASK = torch.tensor([0.5, -3.0]), torch.tensor([[True, True], [True, False]])


def rewards(group, inputs, estimator):
    arguments = on_shard(group, inputs, EQUAL) | {"mask": MASK, "scores": SCORES}
    result = kl_kernels.kl_rewards(**arguments, **REWARDS, kl_estimator=estimator)
    (grad,) = torch.autograd.grad((result.kl + result.logprob).sum(), arguments["logits"])
    return [output.detach() for output in result], grad


@pytest.mark.parametrize("estimator", ["exact", "k1"])
def test_sharded_rewards_are_those_of_the_whole(ranks, estimator):
    inputs = case()
    (outputs, grad), (others, other_grad) = ranks(rewards, inputs, estimator, n=2)
    assert all(map(torch.equal, outputs, others))
    logits = inputs.logits.clone().requires_grad_()
    arguments = vars(inputs) | {"logits": logits, "mask": MASK, "scores": SCORES}
    whole = kl_kernels.kl_rewards(**arguments, **REWARDS, kl_estimator=estimator)
    torch.testing.assert_close(outputs, [o.detach() for o in whole], rtol=2e-6, atol=2e-6)
    (expected,) = torch.autograd.grad((whole.kl + whole.logprob).sum(), logits)
    torch.testing.assert_close(torch.cat((grad, other_grad), -1), expected, rtol=1e-5, atol=1e-6)


def in_place(group, inputs):
    arguments = on_shard(group, inputs, UNEVEN)
    (expected,) = torch.autograd.grad(
        kl_kernels.token_kl(**arguments).kl.sum(), arguments["logits"]
    )
    logits = arguments["logits"].detach().clone().requires_grad_()
    result = kl_kernels.token_kl(**arguments | {"logits": logits}, inplace_backward=True)
    result.kl.sum().backward()
    return torch.equal(logits.grad, expected), logits.grad.data_ptr() == logits.data_ptr()


def test_the_gradient_may_go_over_the_logits(ranks):
    assert ranks(in_place, case(), n=4) == [(True, True)] * 4


def traffic(group, inputs):
    sent, gather = [], parallel.all_gather

    def counted(output, sent_tensor, **options):
        sent.append(sent_tensor.numel() * sent_tensor.element_size())
        return gather(output, sent_tensor, **options)

    parallel.all_gather = counted
    try:
        arguments = on_shard(group, inputs, EQUAL)
        counts = []
        for call in (
            lambda: kl_kernels.token_kl(**arguments),
            lambda: kl_kernels.token_stats(**without_reference(arguments)),
        ):
            with CommDebugMode() as forward:
                result = call()
            with CommDebugMode() as backward:
                sum(output.sum() for output in result).backward()
            counts.append((forward.get_total_counts(), backward.get_total_counts()))
    finally:
        parallel.all_gather = gather
    return counts, sent


def test_forward_is_one_collective_of_the_state_and_backward_none(ranks):
    inputs = case()
    rows = inputs.token_ids.numel()
    expected = [(1, 0), (1, 0)], [4 * 9 * rows + 8, 4 * 4 * rows + 8]
    assert ranks(traffic, inputs, n=2) == [expected] * 2


def compiled(group, inputs):
    arguments = on_shard(group, inputs, EQUAL)

    def loss(logits):
        result = kl_kernels.token_kl(**arguments | {"logits": logits})
        return (result.kl + result.logprob).sum()

    whole_graph = torch.compile(loss, backend="aot_eager", fullgraph=True)
    return [
        torch.autograd.grad(f(arguments["logits"]), arguments["logits"])
        for f in (loss, whole_graph)
    ]


def test_torch_compile_sees_one_graph(ranks):
    for eager_grad, compiled_grad in ranks(compiled, case(), n=2):
        torch.testing.assert_close(compiled_grad, eager_grad, rtol=0, atol=0)


def own_loss(group, inputs):
    arguments = on_shard(group, inputs, EQUAL)
    factor = dist.get_rank(group) + 1
    loss = factor * kl_kernels.token_kl(**arguments).kl.sum()
    return torch.autograd.grad(loss, arguments["logits"])[0] / factor


def test_a_rank_gets_the_gradient_of_its_own_loss(ranks):
    inputs = case()
    grads = ranks(own_loss, inputs, n=2)
    torch.testing.assert_close(torch.cat(grads, -1), on_one_rank(inputs)[1], rtol=1e-5, atol=1e-6)


def no_rows(group):
    logits = torch.zeros(2, 0, 5, requires_grad=True)
    ids = torch.zeros(2, 0, dtype=torch.int64)
    result = kl_kernels.token_kl(logits, logits.detach(), ids, group=group)
    result.kl.sum().backward()
    return result.kl.shape, logits.grad.shape


def test_no_rows_are_no_trouble(ranks):
    assert ranks(no_rows, n=2) == [((2, 0), (2, 0, 5))] * 2


def misplaced(group, inputs, cuts, starts, checked):
    arguments = on_shard(group, inputs, cuts)
    del arguments["vocab_start"]
    if starts is not None:
        arguments["vocab_start"] = starts[dist.get_rank(group)]
    checks = parallel._check_shards, parallel._check_held_once
    if not checked:  # as on a GPU
        parallel._check_shards = parallel._check_held_once = lambda *_: None
    try:
        return [output.detach() for output in kl_kernels.token_kl(**arguments)]
    finally:
        parallel._check_shards, parallel._check_held_once = checks


@pytest.mark.parametrize(
    ("cuts", "starts", "message"),
    [
        ((0, 30, 76), None, "token ids 0 to 29, 46 to 91; together"),
        ((0, 40, 76), (0, 39), "token ids 0 to 39, 39 to 74; together"),
        ((0, 40, 76), (1, 41), "token ids 1 to 40, 41 to 76; together"),
    ],
)
def test_shards_that_do_not_tile_are_refused_on_every_rank(ranks, cuts, starts, message):
    with pytest.raises(ValueError, match=message) as error:
        ranks(misplaced, case(), cuts, starts, True, n=2)
    assert [str(e) for e in error.value.errors] == [str(error.value)] * 2
    for outputs in ranks(misplaced, case(), cuts, starts, False, n=2):
        assert all(output.isnan().all() for output in outputs)


@pytest.mark.parametrize("outside", [-1, V])
def test_tokens_on_no_rank_are_refused_on_every_rank(ranks, outside):
    inputs = case()
    inputs.token_ids[0, 1] = outside
    arguments = inputs, (0, 30, 76), (0, 30)
    with pytest.raises(ValueError, match=f"token_ids holds {outside} .* 0 to 75") as error:
        ranks(misplaced, *arguments, True, n=2)
    assert None not in error.value.errors
    for outputs in ranks(misplaced, *arguments, False, n=2):
        for output in outputs:
            assert output.isnan().tolist() == [[False, True], [False, False]]


def test_a_start_without_a_group_is_refused():
    inputs = case()
    with pytest.raises(ValueError, match="vocab_start is 3, but there is no group"):
        kl_kernels.token_stats(inputs.logits, inputs.token_ids, vocab_start=3)


def wrong_starts(group, start):
    inputs = case()
    kl_kernels.token_stats(inputs.logits, inputs.token_ids, group=group, vocab_start=start)


@pytest.mark.parametrize(
    ("start", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("0", TypeError)]
)
def test_a_start_that_is_no_position_is_refused(ranks, start, error):
    with pytest.raises(error, match=f"vocab_start is {start!r}.*must be an integer"):
        ranks(wrong_starts, start, n=1)


def logprobs_from(group, kind):
    inputs, rank = case(), dist.get_rank(group)
    parts = inputs.logits.tensor_split(2, dim=-1)
    start = kind(sum(part.shape[-1] for part in parts[:rank]))
    return kl_kernels.token_stats(
        parts[rank], inputs.token_ids, group=group, vocab_start=start
    ).logprob


@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor])
def test_a_start_may_be_an_integer_of_any_type(ranks, kind):
    plain, other = (ranks(logprobs_from, of, n=2)[0] for of in (int, kind))
    assert torch.equal(plain, other)


# DTensors: the mesh is the world of four ranks, a line of vocabulary shards or rows x vocabulary.


def mesh_of(shape):
    return dist.init_device_mesh("cpu", shape)


def of_dtensors(group, shape, placements, inputs, scores):
    """Results as full tensors, the placements they had, and the whole gradient."""
    mesh = mesh_of(shape)
    rows = [p if p.is_shard() and p.dim < 2 else Replicate() for p in placements]
    logits = distribute_tensor(inputs.logits, mesh, placements).requires_grad_()
    ref_logits = distribute_tensor(inputs.ref_logits, mesh, placements)
    token_ids = distribute_tensor(inputs.token_ids, mesh, rows)
    if scores is None:
        result = kl_kernels.token_kl(logits, ref_logits, token_ids, temperature=0.7)
    else:
        result = kl_kernels.kl_rewards(
            logits,
            ref_logits,
            token_ids,
            distribute_tensor(scores, mesh, rows),
            distribute_tensor(MASK, mesh, rows),
            kl_coef=0.3,
            kl_estimator="exact",
        )
    (result.kl.sum() + (2 * result.logprob).sum()).backward()
    assert logits.grad.placements == logits.placements
    outputs = [output.full_tensor().detach() for output in result]
    return outputs, result.kl.placements == tuple(rows), logits.grad.full_tensor()


@pytest.mark.parametrize(
    ("shape", "placements", "scored"),
    [
        ((4,), [Shard(2)], True),
        ((4,), [Shard(0)], True),
        ((2, 2), [Shard(0), Shard(2)], True),
        ((2, 2), [Shard(2), Shard(1)], False),
        ((2, 2), [Replicate(), Shard(2)], False),
    ],
)
def test_dtensors_find_group_and_place_by_themselves(ranks, shape, placements, scored):
    """74 logits over 4 ranks: 19, 19, 19, 17; the batch of 2 over 4: two ranks without a row."""
    inputs = case()
    inputs = replace(inputs, logits=inputs.logits[..., :74], ref_logits=inputs.ref_logits[..., :74])
    inputs = replace(inputs, token_ids=inputs.token_ids % 74)
    scores = SCORES if scored else None
    found = ranks(of_dtensors, shape, placements, inputs, scores, n=4)
    logits = inputs.logits.clone().requires_grad_()
    if scored:
        whole = kl_kernels.kl_rewards(
            logits,
            inputs.ref_logits,
            inputs.token_ids,
            SCORES,
            MASK,
            kl_coef=0.3,
            kl_estimator="exact",
        )
    else:
        whole = kl_kernels.token_kl(logits, inputs.ref_logits, inputs.token_ids, temperature=0.7)
    (whole.kl.sum() + (2 * whole.logprob).sum()).backward()
    for outputs, as_rows, grad in found:
        torch.testing.assert_close(outputs, [o.detach() for o in whole], rtol=2e-6, atol=2e-6)
        assert as_rows
        torch.testing.assert_close(grad, logits.grad, rtol=1e-5, atol=1e-6)


def with_plain_ids(group, inputs):
    logits = distribute_tensor(inputs.logits, mesh_of((4,)), [Shard(2)])
    result = kl_kernels.token_stats(logits, inputs.token_ids)
    return isinstance(result.logprob, DTensor), result.logprob


def test_plain_token_ids_give_plain_outputs(ranks):
    inputs = case()
    expected = kl_kernels.token_stats(inputs.logits, inputs.token_ids).logprob
    for is_dtensor, logprob in ranks(with_plain_ids, inputs, n=4):
        assert not is_dtensor
        torch.testing.assert_close(logprob, expected, rtol=2e-6, atol=2e-6)


def refused_dtensors(group, kind, inputs):
    mesh = mesh_of((2, 2))
    logits = distribute_tensor(inputs.logits, mesh, [Shard(0), Shard(2)])
    ids = inputs.token_ids
    if kind == "plain":
        kl_kernels.token_stats(logits, ids)
    elif kind == "group":
        kl_kernels.token_stats(logits, ids, group=group)
    elif kind == "placements":
        kl_kernels.token_stats(logits, distribute_tensor(ids, mesh, [Shard(1), Replicate()]))
    elif kind == "partial":
        logits = DTensor.from_local(inputs.logits, mesh, [Partial(), Replicate()])
        kl_kernels.token_stats(logits, ids)
    elif kind == "few":
        kl_kernels.token_stats(
            distribute_tensor(inputs.logits[..., :5], mesh_of((4,)), [Shard(2)]), ids
        )
    else:
        rows = [Shard(1), Replicate()]
        logits = distribute_tensor(inputs.logits, mesh, [Shard(1), Shard(2)])
        ids, mask = (distribute_tensor(t, mesh, rows) for t in (ids, MASK))
        kl_kernels.kl_rewards(logits, logits, ids, SCORES, mask, kl_coef=0.1)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("plain", TypeError, "token_ids is a Tensor, but logits is a DTensor"),
        ("group", ValueError, "group and vocab_start are for plain tensors"),
        ("placements", ValueError, "token_ids has placements"),
        ("partial", ValueError, "accepted on each mesh dimension"),
        ("few", ValueError, "vocabulary of 5 over 4 ranks"),
        ("sequences", ValueError, "which split sequences, but scores"),
    ],
)
def test_other_dtensors_are_refused(ranks, kind, error, message):
    with pytest.raises(error, match=message) as found:
        ranks(refused_dtensors, kind, case(), n=4)
    assert None not in found.value.errors


def die_or_wait(group, inputs):
    if dist.get_rank(group) == 1:
        os._exit(1)
    kl_kernels.token_kl(**on_shard(group, inputs, EQUAL))


def test_a_rank_that_dies_ends_the_others_with_an_error():
    timeout = timedelta(seconds=20)
    ranks = Ranks(2, timeout)
    try:
        ranks(no_rows, n=2)  # both are there
        for pipe in ranks.pipes:
            pipe.send((die_or_wait, (case(),), 2))
        started = time.monotonic()
        error, result = ranks.pipes[0].recv()
        assert time.monotonic() - started < timeout.total_seconds() + 5
    finally:
        ranks.close()
    assert isinstance(error, RuntimeError)
    assert result is None


def linear_inputs(bias=True):
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    hidden, ref_hidden = torch.randn(2, 3, 12, generator=g), torch.randn(2, 3, 7, generator=g)
    hidden[~mask] = torch.nan
    heads = [torch.randn(V, d, generator=g) for d in (12, 7)]
    biases = [torch.randn(V, generator=g) for _ in range(2)] if bias else [None, None]
    ids = torch.randint(V, (2, 3), generator=g)
    return hidden, ref_hidden, heads, biases, ids, mask


def linear_head(group, cuts, backend, with_reference):
    """Outputs, and the gradients of hidden states, weight and bias, of this rank's rows."""
    hidden, ref_hidden, heads, biases, ids, mask = linear_inputs()
    rows = slice(None)
    where = {}
    if group is not None:
        rank = dist.get_rank(group)
        rows = slice(cuts[rank], cuts[rank + 1])
        where = {"group": group, "vocab_start": cuts[rank]}
    needs = [t.clone().requires_grad_() for t in (hidden, heads[0][rows], biases[0][rows])]
    options = {"bias": needs[2], "mask": mask, "temperature": 0.8, "softcap": 5.0, **where}
    options |= {"memory_budget": 4000, "backend": backend}  # a few rows of a tile
    if with_reference:
        outputs = kl_kernels.linear_token_kl(
            *needs[:2], ref_hidden, heads[1][rows], ids, ref_bias=biases[1][rows], **options
        )._asdict()
    else:
        outputs = kl_kernels.linear_token_stats(*needs[:2], ids, **options)._asdict()
    loss = sum((i + 1) * outputs[n].sum() for i, n in enumerate(DIFFERENTIABLE) if n in outputs)
    grads = torch.autograd.grad(loss, needs)
    return {name: value.detach() for name, value in outputs.items()}, grads


@pytest.mark.parametrize("cuts", [EQUAL, UNEVEN])
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_may_be_sharded(ranks, cuts, with_reference, backend):
    expected, expected_grads = linear_head(None, None, backend, with_reference)
    found = ranks(linear_head, cuts, backend, with_reference, n=len(cuts) - 1)
    for outputs, _ in found:
        for name, value in outputs.items():
            assert torch.equal(value, found[0][0][name]), name
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    hidden, *columns = zip(*(grads for _, grads in found))
    for grad in hidden:
        assert torch.equal(grad, hidden[0])
        torch.testing.assert_close(grad, expected_grads[0], rtol=1e-5, atol=1e-5)
    for grads, true in zip(columns, expected_grads[1:]):
        torch.testing.assert_close(torch.cat(grads), true, rtol=1e-5, atol=1e-5)
