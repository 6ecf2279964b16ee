"""Run the machine code that Triton and nvcc emit, PTX, on the CPU, with every access checked.

A kernel's numbers can be right by luck: the CPU's interpreters of Triton and of CUDA run other
instructions, in another order, and see no race. Here the instructions themselves run, each on numpy
arrays with one value per thread.

| file | purpose | imports |
|---|---|---|
| `parse` | PTX text as functions of instructions | |
| `arithmetic`, `integers` | results of instructions, exact or at their bound | |
| `lower_*`, `lower` | a block of instructions as a Python function on arrays | all above |
| `blocks` | basic blocks, liveness, `Kernel` | `lower` |
| `faults`, `memory`, `races`, `counters` | memory, and all that may go wrong in it | |
| `threads`, `accesses`, `reads` | what threads ask of memory | all above |
| `copies`, `warps`, `barriers`, `machine` | how threads wait for each other | all above |
| `launches`, `triton_launches`, `cuda_launches` | this project's kernels on it | all above |
| `plugin` | `pytest --machine ARCH`: the GPU backends' tests on it | all above |
| `run` | `make machine` | |
| `executed_jobs`, `executed` | `make counters` | |
| `mutations` | PTX with one instruction changed | `parse` |
| `replay` | calls of operators, made again with a changed kernel | `launches` and what it needs |
| `mutants` | `make ptx-mutants` | all above |
| `lint` | faults that can be read from the instructions, without running them | `parse` |

Not modelled: weak memory order (the race detector stands in for it), the order of warps on
hardware, and all that ptxas makes of PTX.

PTX ISA: https://docs.nvidia.com/cuda/parallel-thread-execution/
"""
