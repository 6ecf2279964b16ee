"""A user's first minutes with the installed package; needs nothing but what it installs."""

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

import kl_kernels

B, T, V = 2, 5, 1031


def test_it_is_the_installed_one() -> None:
    site = Path(sysconfig.get_path("purelib")).resolve()
    assert Path(kl_kernels.__file__).resolve().parent == site / "kl_kernels"
    assert (site / "kl_kernels" / "py.typed").exists()


def test_the_cpu_backend_is_there_and_validates() -> None:
    told = run("info")
    assert "[cpu]" in told
    assert "available for cpu tensors" in told, told
    told = run("validate", "--backend", "cpu", "--vocab-size", "37", "1025")
    assert "WORSE" not in told


def test_values_and_gradients_are_those_of_float64() -> None:
    logits, ref_logits, token_ids = batch()
    p, q = (x.detach().double().requires_grad_() for x in (logits, ref_logits))
    logp, logq = p.log_softmax(-1), q.detach().log_softmax(-1)
    expected = {
        "logprob": logp.gather(-1, token_ids[..., None])[..., 0],
        "kl": (logp.exp() * (logp - logq)).sum(-1),
        "forward_kl": (logq.exp() * (logq - logp)).sum(-1),
        "entropy": -(logp.exp() * logp).sum(-1),
    }
    (gradient,) = torch.autograd.grad(sum(expected.values()).sum(), p)
    logits.requires_grad_()
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend="cpu")
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(result, name).double(), value.detach(), rtol=2e-6, atol=1e-6
        )
    sum(getattr(result, name) for name in expected).sum().backward()
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-5, atol=1e-7)

    stats = kl_kernels.token_stats(logits.detach(), token_ids, backend="cpu")
    assert torch.equal(stats.logprob, result.logprob)
    assert torch.equal(stats.entropy, result.entropy)


def test_rewards_are_the_penalty_and_once_the_score() -> None:
    logits, ref_logits, token_ids = batch()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 3:] = False
    scores = torch.tensor([1.5, -0.5])
    result = kl_kernels.kl_rewards(logits, ref_logits, token_ids, scores, mask, kl_coef=0.1)
    expected = torch.where(mask, -0.1 * (result.logprob - result.ref_logprob), 0)
    expected[0, -1] += 1.5
    expected[1, 2] -= 0.5
    torch.testing.assert_close(result.rewards, expected)


def test_a_jump_is_an_alarm_and_the_audit_log_shows_it() -> None:
    g = torch.Generator().manual_seed(0)
    path = Path(tempfile.mkdtemp()) / "audit.jsonl"
    with kl_kernels.AuditLog(path, header={"seed": 0}) as log:
        monitor = kl_kernels.KLMonitor(kl_budget=30.0, sinks=[log])
        for step in range(40):
            per_token = 0.1 + 0.01 * torch.rand(B, T, generator=g) + 2 * (step == 39)
            events = monitor.observe(step, kl=per_token, mask=torch.ones(B, T))
            assert ("kl_jump" in {event.kind for event in events}) == (step == 39), events
    assert '"kl_jump"' in path.read_text()
    assert "each as it was written" in run("audit", "verify", str(path))
    path.write_bytes(path.read_bytes().replace(b'"seed":0', b'"seed":1'))
    assert "edited" in run("audit", "verify", str(path), code=1)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(B, T, V, generator=g)
    return logits, logits + torch.randn(B, T, V, generator=g), torch.randint(V, (B, T), generator=g)


def run(*arguments: str, code: int = 0) -> str:
    """Run `python -m kl_kernels`, and return its output."""
    call = [sys.executable, "-I", "-m", "kl_kernels", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    return done.stdout


if __name__ == "__main__":
    assert sys.flags.isolated
    tests = [test for name, test in list(globals().items()) if name.startswith("test_")]
    for test in tests:
        test()
        print(f"passed: {test.__name__}")
