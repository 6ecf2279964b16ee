"""Memory that the system does not give: an error, and a process that goes on."""

import subprocess
import sys

import pytest

LIMITED = """
import resource, torch, kl_kernels
torch.set_num_threads(1)
x = torch.randn(1, 1, 1 << 24).requires_grad_()  # a row of 64 MiB
y, ids = torch.randn(1, 1, 1 << 24), torch.zeros(1, 1, dtype=torch.long)
tiny = torch.randn(1, 1, 9).requires_grad_()  # imports what torch imports in a first backward
kl_kernels.token_kl(tiny, tiny.detach(), ids, backend="cpu").kl.backward(torch.ones(1, 1))
{prepare}
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), resource.RLIM_INFINITY))
try:
    {call}
except (RuntimeError, MemoryError) as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(float(kl_kernels.token_kl(x[..., :9], y[..., :9], ids, backend="cpu").kl) > 0)
"""
CALLS = {
    "a gradient": (
        "kl = kl_kernels.token_kl(x, y, ids, backend='cpu').kl",
        "kl.backward(torch.ones(1, 1))",
    ),
    "a row beside the logits": (
        "kl = kl_kernels.token_kl(x * 1, y, ids, backend='cpu', inplace_backward=True).kl",
        "kl.backward(torch.ones(1, 1))",
    ),
    "a policy loss's gradient": (
        "ones = torch.ones(1, 1)",
        "kl_kernels.fused_policy_loss(x, ids, -ones, ones, ones, backend='cpu')",
    ),
    "a copy of a view": (
        "z = torch.randn(1, 1 << 24, 2).transpose(1, 2)[:, :1]",
        "kl_kernels.token_stats(z, ids, backend='cpu')",
    ),
}


@pytest.mark.parametrize("what", CALLS)
def test_memory_that_is_refused_is_an_error(what):
    prepare, call = CALLS[what]
    script = LIMITED.format(prepare=prepare, call=call)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    error, goes_on = done.stdout.splitlines()
    assert "alloc" in error or error.startswith("MemoryError")
    assert goes_on == "True"
