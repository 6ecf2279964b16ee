"""Launches taken to the machine: memory is the tensors' own, results must be complete."""

import ctypes
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from kl_kernels.schemas import OPERATORS, ScaleGradientArgs

from . import cuda_launches, triton_launches
from .blocks import Kernel
from .launches import Launches, is_fresh, summary
from .parse import parse

# Stores its thread's number where `stride` bytes a thread say, in the first n threads.
NUMBER = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry number(.param .u64 to, .param .u32 n, .param .u32 stride)
{
  .reg .pred %p<2>;
  .reg .b32 %r<4>;
  .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [to];
  ld.param.u32 %r1, [n];
  ld.param.u32 %r2, [stride];
  mov.u32 %r3, %tid.x;
  setp.ge.u32 %p1, %r3, %r1;
  @%p1 bra DONE;
  mul.wide.u32 %rd2, %r3, %r2;
  add.s64 %rd3, %rd1, %rd2;
  st.global.u32 [%rd3], %r3;
DONE:
  ret;
}
"""
KERNEL = Kernel(parse(NUMBER)["number"])


def number(launches, to, n, stride=4):
    parameters = ctypes.c_uint64(to.data_ptr()), ctypes.c_uint32(n), ctypes.c_uint32(stride)
    launches.launch(
        KERNEL, [to], grid=(1,), threads=32, parameters=b"".join(map(bytes, parameters))
    )


def test_every_kernel_is_one_whose_threads_agree_on_their_sums():
    body = """mul.f32 %f3, %f1, %f2; shfl.sync.bfly.b32 %f4, %f3, 16, 31, -1;
  fma.rn.f32 %f5, %f2, %f1, {}; ret;"""
    with Launches() as launches:
        for sums in ("%f4", "%f3"):
            kernel = f".entry f() {{ .reg .f32 %f<9>;\n  {body.format(sums)} }}"
            launches.lower(sums, parse(kernel)["f"])
        assert set(launches.lowered) == {"%f4", "%f3"}
        (fault,) = launches.take_faults()
    assert (fault.kind, fault.kernel) == ("asymmetric butterfly", "f")


def backend(launches, **operators):
    refuse = dict.fromkeys(OPERATORS)
    return launches.operators(SimpleNamespace(**(refuse | operators)))


def test_results_are_in_the_tensors_own_memory():
    with Launches() as launches:
        to = torch.full((40,), -1, dtype=torch.int32)
        number(launches, to, 32)
    assert to.tolist() == [*range(32), *[-1] * 8]
    assert launches.take_faults() == []
    assert launches.n_launches == 1


@pytest.mark.parametrize(("n", "kinds"), [(32, []), (31, ["unwritten result"])])
def test_a_result_must_be_complete(n, kinds):
    def gae(arguments):
        result = torch.empty(32, dtype=torch.int32)
        number(launches, result, n)
        return result

    with Launches() as launches:
        backend(launches, gae=gae).gae(())
    faults = launches.take_faults()
    assert [fault.kind for fault in faults] == kinds
    if kinds:
        assert "4 bytes of result 0, of shape (32,)" in summary(faults)
    assert launches.take_faults() == []


def test_a_result_that_no_kernel_touched_is_incomplete():
    with Launches() as launches:
        backend(launches, gae=lambda arguments: (torch.empty(3), torch.zeros(3))).gae(())
    (fault,) = launches.take_faults()
    assert (fault.kind, fault.kernel) == ("unwritten result", "gae")


@pytest.mark.parametrize(("n", "kinds"), [(8, []), (7, ["unwritten result"])])
def test_a_buffer_that_is_written_must_be_complete(n, kinds):
    with Launches() as launches:
        gradient = torch.empty(8, dtype=torch.int32)
        operator = backend(launches, scale_gradient=lambda a: number(launches, a.gradient, n))
        operator.scale_gradient(ScaleGradientArgs(gradient, torch.ones(1)))
    assert [fault.kind for fault in launches.take_faults()] == kinds


@pytest.mark.parametrize(("stride", "kinds"), [(12, []), (4, ["global out of bounds"])])
def test_padding_between_elements_is_out_of_bounds(stride, kinds):
    with Launches() as launches:
        to = torch.zeros(8, 3, dtype=torch.int32)
        number(launches, to[:, 0], 8, stride)
    assert [fault.kind for fault in launches.take_faults()] == kinds
    if not kinds:
        assert to[:, 0].tolist() == list(range(8))


def test_what_torch_wrote_is_not_fresh():
    with Launches():
        empty, like = torch.empty(5), torch.ones(3).new_empty(4)
        assert empty.isnan().all()
        assert is_fresh(empty)
        assert is_fresh(like)
        empty[2] = 0
        assert not is_fresh(empty)
    assert not is_fresh(torch.zeros(2))


def test_memory_of_one_launch_is_known_to_the_next():
    """The second of an operator's launches may still write what the first left out."""

    def gae(arguments):
        result = torch.empty(8, dtype=torch.int32)
        number(launches, result, 3)
        number(launches, result, 8)
        return result

    with Launches() as launches:
        assert backend(launches, gae=gae).gae(()).tolist() == list(range(8))
    assert launches.take_faults() == []


def test_tritons_parameters_are_packed_as_its_ptx_lays_them_out():
    params = {"a": (0, 8, "u64"), "b": (8, 4, "u32"), "c": (12, 4, "f32")}
    params |= {"scratch": (16, 8, "u64"), "profile": (24, 8, "u64")}
    function = SimpleNamespace(params=params, param_bytes=32)
    pointer = torch.zeros(1)
    values = [("*fp32", pointer), ("i32", -2), ("fp32", 0.5)]
    packed = triton_launches.packed(function, values)
    address = pointer.data_ptr().to_bytes(8, "little")
    assert packed == address + b"\xfe\xff\xff\xff" + b"\0\0\0\x3f" + bytes(16)


def test_kernels_of_a_file_are_taken_apart():
    files = '\t.file\t1 "a.cuh"\n\t.section .debug_str\n'
    head, body = NUMBER.split(".visible")
    text = f"{head}.visible{body}.visible{body.replace('number', 'second')}{files}"
    apart = cuda_launches.kernels_apart(text)
    assert list(apart) == ["number", "second"]
    for name, ptx in apart.items():
        assert list(parse(ptx)) == [name]
        assert '.file\t1 "a.cuh"' in ptx


def test_without_nvcc_there_is_an_error_and_no_skip(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(RuntimeError, match="compiled by nvcc: set CUDA_HOME"):
        cuda_launches.nvcc()


def test_kernels_are_compiled_with_the_flags_of_the_build():
    assert "-ftz=true" in cuda_launches.flags()


Fault = namedtuple("Fault", "kind source")


def test_bytes_beside_those_that_are_needed_are_accepted_in_one_place():
    lines = (cuda_launches.ROOT / "csrc/cuda/smem_row.cuh").read_text().splitlines()
    (line,) = [i for i, text in enumerate(lines, 1) if "const uint2 pair = pairs[" in text]
    assert cuda_launches.is_accepted(Fault("shared uninitialised", f"smem_row.cuh:{line}"))
    assert not cuda_launches.is_accepted(Fault("shared uninitialised", f"smem_row.cuh:{line + 1}"))
    assert not cuda_launches.is_accepted(Fault("shared race", f"smem_row.cuh:{line}"))
    assert not cuda_launches.is_accepted(Fault("shared uninitialised", ""))
