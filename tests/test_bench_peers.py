"""The comparison with peers in tiny sizes: who is asked, who is refused, what is reported."""

import dataclasses
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
TINY = {"logits": (8, 301, 0), "head": (6, 301, 16), "gae": (2048, 0, 0)}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def tiny_case(name, dtype=torch.float32):
    from compare import Case
    from operations import OPERATIONS, Size

    operation = OPERATIONS[name]
    kind = "gae" if name == "GAE" else "head" if "hidden" in operation.sources else "logits"
    return Case(operation, Size(*TINY[kind]), dtype)


def test_every_operation_is_compared_with_several(bench):
    from operations import OPERATIONS
    from peers import FAMILIES, OURS, REGISTRY, contenders

    for operation in OPERATIONS:
        names = [c.name for c in contenders(operation)]
        assert names[0] == OURS  # the one that others are ratios of
        assert len(names) == len(set(names)) >= 3
    assert {c.family for c in REGISTRY} == set(FAMILIES)
    offered = {c.operation: set() for c in REGISTRY}
    for c in REGISTRY:
        offered[c.operation].add(c.family)
    assert offered["policy loss"] >= {"trl", "verl", "liger"}
    assert offered["linear exact KL"] >= {"trl", "liger", "fla"}
    assert offered["linear logprob + entropy"] >= {"trl", "verl", "liger", "cce", "quack"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whoever_runs_here_is_right_and_whoever_does_not_says_why(bench, dtype):
    from compare import check
    from operations import OPERATIONS
    from peers import Unavailable, contenders

    ran, reasons = set(), []
    for operation in OPERATIONS:
        case = tiny_case(operation, torch.float32 if operation == "GAE" else dtype)
        for contender in contenders(operation):
            try:
                call = contender.ready()
            except (ImportError, Unavailable) as error:
                reasons.append(str(error))
                continue
            with torch.compiler.set_stance("force_eager"):  # the formulas, without the compiler
                errors = check(case, contender, call)
            assert ("gradient_error" in errors) == bool(OPERATIONS[operation].sources)
            ran.add((operation, contender.family))
    assert all(reasons)
    assert ran >= {(name, family) for name in OPERATIONS for family in ("ours", "plain")}


@pytest.mark.parametrize("name", ["exact KL", "exact KL + gradient", "GAE", "PPO step"])
def test_a_wrong_contender_is_not_timed(bench, name):
    from compare import Wrong, check
    from peers import contenders

    case = tiny_case(name)
    right = contenders(name)[0]

    def but(of, how):
        def call(x):
            results = right.ready()(x)
            return results | {of: how(results[of].detach().clone())}

        return call

    first = {"exact KL": "kl", "exact KL + gradient": "gradient", "GAE": "returns"}
    of = first.get(name, "rewards")

    def one_part_in_a_hundred(t):
        t.view(-1, t.shape[-1])[-1] *= 1.01
        return t

    check(case, right, but(of, lambda t: t))
    for how in (one_part_in_a_hundred, lambda t: t.fill_(torch.nan), lambda t: t[..., :-1]):
        with pytest.raises(Wrong, match=f"not timed: {of}"):
            check(case, right, but(of, how))


def test_a_peer_may_round_like_its_logits_only_if_it_says_so(bench):
    from compare import Wrong, check
    from peers import contenders

    case = tiny_case("token logprob", torch.bfloat16)
    exact = contenders("token logprob")[1]

    def in_bfloat16(x):
        log_p = x.logits.detach().log_softmax(-1)
        return {"logprob": log_p.gather(-1, x.token_ids[..., None]).squeeze(-1).float()}

    check(case, dataclasses.replace(exact, rounds=True), in_bfloat16)
    with pytest.raises(Wrong):
        check(case, exact, in_bfloat16)


def test_what_cannot_fit_is_left_out_with_its_size(bench):
    from compare import too_large
    from operations import Size

    assert too_large(Size(64, 131072), 1 << 34) == ""
    assert "34 GB" in too_large(Size(8192, 131072), 1 << 34)


def test_the_checked_part_of_large_inputs_is_the_beginning(bench, monkeypatch):
    import operations

    x = operations.make_inputs(operations.Size(64, 100), torch.float32, "cpu")
    monkeypatch.setattr(operations, "LOGITS_CHECKED", 1600)
    part = x.head()
    assert part.logits.shape == (4, 4, 100)
    assert part.logits.requires_grad
    for name in ("logits", "ref_logits", "token_ids", "old_logprobs", "values", "mask"):
        assert torch.equal(getattr(part, name), getattr(x, name)[:, :4])
    monkeypatch.setattr(operations, "LOGITS_CHECKED", 100)
    assert x.head().logits.shape == (1, 1, 100)
