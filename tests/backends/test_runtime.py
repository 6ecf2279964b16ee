"""Calls from threads, processes, copies and torch's modes."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

import kl_kernels

B, T, V, K, D = 2, 3, 40, 3, 4


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g)

    return {
        "logits": normal(B, T, V),
        "ref_logits": normal(B, T, V),
        "scores": normal(B),
        "ids": torch.randint(V, (B, T), generator=g),
        "old": -normal(B, T).abs(),
        "advantages": normal(B, T),
        "mask": torch.rand((B, T), generator=g) < 0.8,
        "topk_ids": torch.rand((B, T, V), generator=g).topk(K).indices,
        "topk_logprobs": normal(B, T, V).log_softmax(-1)[..., :K],
        "weight": normal(V, D),
        "ref_hidden": normal(B, T, D),
    }


# Each from what is differentiated to what is summed; heads take the first logits for hidden states.
OPS = {
    "token_stats": lambda x, a: kl_kernels.token_stats(x, a["ids"]).logprob,
    "token_kl": lambda x, a: kl_kernels.token_kl(x, a["ref_logits"], a["ids"], mask=a["mask"]).kl,
    "token_jsd": lambda x, a: kl_kernels.token_jsd(x, a["ref_logits"]),
    "kl_rewards": lambda x, a: (
        kl_kernels.kl_rewards(x, a["ref_logits"], a["ids"], a["scores"], a["mask"], kl_coef=0.1).kl
    ),
    "selective_log_softmax": lambda x, a: kl_kernels.selective_log_softmax(x, a["topk_ids"]),
    "topk_kl": lambda x, a: kl_kernels.topk_kl(x, a["topk_ids"], a["topk_logprobs"], beta=0.3),
    "fused_policy_loss": lambda x, a: kl_kernels.fused_policy_loss(
        x, a["ids"], a["old"], a["advantages"], a["mask"]
    )[0],
    "linear_token_kl": lambda x, a: (
        kl_kernels.linear_token_kl(
            x[..., :D], a["weight"], a["ref_hidden"], a["weight"], a["ids"]
        ).kl
    ),
    "linear_token_jsd": lambda x, a: kl_kernels.linear_token_jsd(
        x[..., :D], a["weight"], a["ref_hidden"], a["weight"]
    ),
}


def value_and_gradient(name, a):
    x = a["logits"].clone().requires_grad_()
    value = OPS[name](x, a)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


@pytest.mark.parametrize("name", OPS)
def test_eight_threads_give_what_one_does(name):
    cases = [inputs(seed) for seed in range(32)]
    alone = [value_and_gradient(name, a) for a in cases]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda a: value_and_gradient(name, a), cases * 4))
    for (value, gradient), (one, its_gradient) in zip(together, alone * 4, strict=True):
        assert torch.equal(value, one)
        assert torch.equal(gradient, its_gradient)


def threaded_kl(seed):
    """Large enough for the kernels to share rows among threads, too small for torch itself to."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn((8, 7, 512), generator=g) for _ in range(2))
    x.requires_grad_()
    kl = kl_kernels.token_kl(x, y, torch.zeros(8, 7, dtype=torch.long), backend="cpu").kl
    kl.sum().backward()
    return kl.tolist(), x.grad.tolist()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_workers_give_what_their_parent_did(way, two_threads):
    """A forked process has none of OpenMP's threads, and would wait for them for ever."""
    expected = [threaded_kl(seed) for seed in range(3)]
    with mp.get_context(way).Pool(2) as workers:
        assert workers.map_async(threaded_kl, range(3)).get(timeout=300) == expected
    assert threaded_kl(0) == expected[0]


# The parent's own work needs no kernel of ours, and leaves OpenMP's threads behind.
OF_TORCH_ALONE = """
import os, signal, torch, kl_kernels
torch.set_num_threads(2)
torch.randn(3_000_000).exp().sum()
x, ids = torch.randn(8, 7, 512), torch.zeros(8, 7, dtype=torch.long)
if (child := os.fork()) == 0:
    signal.alarm(60)  # it would wait for ever
    kl_kernels.token_stats(x, ids, backend="cpu")
    os._exit(0)
print(os.waitpid(child, 0)[1], kl_kernels.token_stats(x, ids, backend="cpu").logprob.shape)
"""


def test_a_worker_does_not_wait_for_threads_that_torch_alone_had_used():
    command = [sys.executable, "-c", OF_TORCH_ALONE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "0 torch.Size([8, 7])\n", done.stderr


FIRST_CALLS = """
import sys, threading, torch, kl_kernels
sys.setswitchinterval(1e-6)
x, ids = torch.randn(1, 1, 9), torch.zeros(1, 1, dtype=torch.long)
start, results = threading.Barrier(8), []
def call():
    start.wait()
    results.append(kl_kernels.token_stats(x, ids, backend="cpu").logprob.item())
threads = [threading.Thread(target=call) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(results), len(set(results)))
"""


def test_the_first_calls_may_come_from_several_threads_at_once():
    """Each would load the library, which torch takes once."""
    for _ in range(3):  # more often than not it went wrong
        command = [sys.executable, "-c", FIRST_CALLS]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.stdout == "8 1\n", done.stderr


CONTROLLERS = {
    "FixedKLController": lambda: kl_kernels.FixedKLController(0.1),
    "AdaptiveKLController": lambda: kl_kernels.AdaptiveKLController(
        0.1, 6.0, 1000, unit="sequence_sum"
    ),
    "PIKLController": lambda: kl_kernels.PIKLController(0.1, 6.0, unit="sequence_sum"),
    "ThresholdKLController": lambda: kl_kernels.ThresholdKLController(
        0.1, 6.0, unit="sequence_sum"
    ),
}
COPIES = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", CONTROLLERS)
def test_copies_of_controllers_go_on_alike_and_apart(name, way):
    kls = [3.0, 9.0, 20.0, float("nan"), 1.0, 12.0, 6.0, 40.0]
    one = CONTROLLERS[name]()
    for kl in kls:
        one.update(kl, 64)
    other = COPIES[way](one)
    value = one.value
    seen = [other.update(kl, 64)[1:3] for kl in kls]
    assert one.value == value
    assert [one.update(kl, 64)[1:3] for kl in kls] == seen


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_an_early_stop_decide_alike_and_apart(way):
    one = kl_kernels.KLEarlyStop(0.02, when="after_epoch")
    one.before_step(0.5)
    other = COPIES[way](one)
    assert other.after_epoch()
    one.before_step(0.001)
    assert not one.after_epoch()
    assert other.after_epoch()


def test_a_deep_copy_of_a_monitor_tells_what_the_original_does():
    one, told = kl_kernels.KLMonitor(6.0), []
    for step in range(1, 40):
        one.observe(step, kl=2.0 + step % 3, entropy=2.0)
    other = copy.deepcopy(one)
    for monitor in (other, one):
        told.append([e for s in range(40, 80) for e in monitor.observe(s, kl=s / 4, entropy=0.5)])
    assert told[0] == told[1]
    assert {"kl_budget", "entropy_collapse"} <= {event.kind for event in told[0]}


LOGITS_OPS = [
    name for name in OPS if not name.startswith("linear_")
]  # test_linear.py has the others


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", LOGITS_OPS)
def test_activation_checkpointing(name, use_reentrant):
    a = inputs()
    value, gradient = value_and_gradient(name, a)
    x = a["logits"].clone().requires_grad_()
    recomputed = checkpoint(OPS[name], x, a, use_reentrant=use_reentrant)
    recomputed.sum().backward()
    assert torch.equal(recomputed, value)
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("name", LOGITS_OPS)
def test_autocast_changes_nothing(name):
    a = inputs()
    value, gradient = value_and_gradient(name, a)
    with torch.autocast("cpu", torch.bfloat16):
        cast, its_gradient = value_and_gradient(name, a)
    assert torch.equal(cast, value)
    assert torch.equal(its_gradient, gradient)


@pytest.mark.parametrize("name", OPS)
def test_nothing_is_refused_or_changed_by_deterministic_algorithms(name):
    a = inputs()
    expected = value_and_gradient(name, a)  # under them: conftest.py turns them on
    torch.use_deterministic_algorithms(False)
    for got, right in zip(value_and_gradient(name, a), expected):
        assert torch.equal(got, right)
