# The README's two commands are `make ppo` and `make test`; both prepare .venv when it is missing.
PYTHON ?= python3
# Any torch >= 2.11 works; the pin is the version this repository is tested with.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
COUNTED := build/counted
DIST := build/dist
PYTHONS ?=
# Tritons beside the installed one, whose PTX make machine runs: folders that pip unpacks them into.
TRITONS ?= build/tritons/3.6.0 build/tritons/3.7.0 build/tritons/3.8.0
KL_KERNELS_CUDA ?= 0
# The site links to where this clone came from, if that is a page.
REPOSITORY ?= $(shell git remote get-url origin 2>/dev/null | sed -nE 's|^git@([^:]+):|https://\1/|; s|\.git$$||; /^https:/p')
TRAINERS ?= trl-1.16 trl-1.12 trl-0.11 verl-0.9 openrlhf-0.11 liger-kernel-0.8

.PHONY: ppo study test coverage fuzz fuzz-sanitized mutants property-mutants ptx-mutants machine counters integrations validate numerics tools bench bench-cpu bench-traffic bench-study bench-linear bench-monitor bench-offline bench-growth bench-compare gpu dist dist-cuda abi wheel docs lint format clean

ppo: $(READY)
	$(BIN)/python -m kl_kernels study --betas 0,adaptive --seeds 1 --sequences 512 $(ARGS)

study: $(READY)
	$(BIN)/python -m kl_kernels study $(ARGS)

# A worker for each core, of one thread: several would wait for each other, and take twice as long.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Random calls with hostile arguments. ARGS="--seed 7 --calls 1" repeats the one that was found.
fuzz: $(READY)
	$(BIN)/python tests/fuzz/run.py $(ARGS)

# The same on kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch.
fuzz-sanitized: SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
fuzz-sanitized: $(READY)
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" KL_KERNELS_CUDA=0 $(BIN)/python setup.py -q \
	    build --build-base build/sanitized --build-lib build/sanitized/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitized/lib $(BIN)/python tests/fuzz/run.py $(ARGS)

# Which lines of Python and of the CPU's C++ the tests run, into build/coverage.
coverage: MEASURE := --coverage -O1 -fprofile-update=atomic
coverage: TREE := build/coverage/tree
coverage: $(VENV)/dev-ready
	rm -rf build/coverage
	mkdir -p $(TREE)
	git ls-files -z | xargs -0 cp --parents -t $(TREE)
	$(BIN)/python -c "from kl_kernels.versions import commit; print(commit())" > build/coverage/commit
	cd $(TREE) && CFLAGS="$(MEASURE)" CXXFLAGS="$(MEASURE)" LDFLAGS=--coverage KL_KERNELS_CUDA=0 \
	    $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(TREE) && PYTHONPATH=$(abspath $(TREE)) OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m pytest \
	    -n auto --dist worksteal --cov=kl_kernels --cov-report=json:../python.json $(ARGS)
	$(BIN)/gcovr --root $(TREE) --filter $(TREE)/csrc/ --json-summary build/coverage/cpp.json
	$(BIN)/python -m bench.quality.covered
	$(BIN)/python -m bench.readme

# Changes of the core that no test notices. ARGS="'kl_kernels.algebra.row*'" for some of it.
mutants: $(VENV)/dev-ready
	$(BIN)/python -m bench.quality.mutants $(ARGS)
	$(BIN)/python -m bench.readme

# For every property a change that has to make it fail. ARGS=entropy for some.
property-mutants: $(READY)
	$(BIN)/python tests/algebra/property_mutants.py $(ARGS)

# Changes of the kernels' PTX that the machine must notice. ARGS='--only "cuda sm_90"' for some.
ptx-mutants: export PYTHONPATH := tests:tests/backends:tests/gpu:$(PYTHONPATH)
ptx-mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m machine.mutants $(ARGS)
	$(BIN)/python -m bench.readme

# Beside the trainers themselves, each in an environment of its own; TRAINERS="trl-1.16" for some.
# CHECK=--check tells whether the compatibility matrix says what was run, instead of writing it.
integrations: $(TRAINERS:%=integration-%)
	$(BIN)/python tests/trainers/compatibility.py $(CHECK)
	$(BIN)/python -m bench.readme $(CHECK)

integration-%: build/trainers/%/ready
	build/trainers/$*/bin/python -m pytest tests/trainers/$* $(ARGS)

# The GPU backends' tests on the PTX of every Triton, run on the CPU (tests/machine).
# ARGS='--only "cuda sm_90"' for some of it, ARGS=--list for their names; TRITONS= for no other Triton.
machine: $(READY) $(TRITONS:%=%/triton)
	$(BIN)/python tests/machine/run.py --tritons $(TRITONS) $(ARGS)

# What the kernels execute and ask of memory while the machine runs them, counted exactly.
# ARGS='--only "cuda sm_90"' shows some of it, ARGS=--check compares a few with the results.
counters: $(READY)
	PYTHONPATH=tests:tests/backends $(BIN)/python -m machine.executed $(ARGS)
	$(BIN)/python -m bench.readme

build/tritons/%/triton: | $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target build/tritons/$* triton==$*

validate: $(READY)
	$(BIN)/python -m kl_kernels validate $(ARGS)

# How far every backend and torch eager are from float64. ARGS="--resume DIR" publishes a report.
numerics: $(READY)
	$(BIN)/python -m bench.quality.numerics $(ARGS)
	$(BIN)/python -m bench.readme

# ARGS="--threads 1 --clock thread" where others use the machine.
bench-cpu: $(READY)
	$(BIN)/python -m bench.cpu.side_by_side $(ARGS)
	$(BIN)/python -m bench.readme

bench-traffic: $(READY)
	$(BIN)/python -m bench.cpu.traffic
	$(BIN)/python -m bench.readme

# ARGS="--resume DIR" publishes a study that make study has run.
bench-study: $(READY)
	$(BIN)/python -m bench.quality.study $(ARGS)
	$(BIN)/python -m bench.readme

# Linear heads beside other packages'.
bench-linear: $(VENV)/bench-ready
	$(BIN)/python -m bench.cpu.linear $(ARGS)
	$(BIN)/python -m bench.readme

bench-monitor: $(READY)
	$(BIN)/python -m bench.quality.monitor_rates $(ARGS)
	$(BIN)/python -m bench.quality.sampling_gap_rates
	$(BIN)/python -m bench.readme

# Instructions of this package's kernels and of other libraries', and operations of linear heads,
# counted without a GPU.
bench-offline: $(VENV)/bench-ready $(COUNTED)/ready
	PYTHONPATH=$(COUNTED) $(BIN)/python -m bench.offline.measure $(ARGS)
	$(BIN)/python -m bench.offline.heads
	$(BIN)/python -m bench.readme

bench-growth: $(READY)
	$(BIN)/python -m bench.cpu.growth $(ARGS)

# Against BASE, any git revision: exit code 1 if an op has become slower.
bench-compare: $(READY)
	$(BIN)/python -m bench.quality.revisions --base "$(BASE)" $(ARGS)

# Beside other packages. ARGS=--save publishes the results, ARGS=--full takes all sizes.
bench: $(VENV)/bench-ready
	$(BIN)/python -m kl_kernels bench $(ARGS)
	$(BIN)/python -m bench.readme

# On a machine with a GPU: its own python and torch, nothing installed. ARGS=DIR for the results, and
# ARGS="--parts counters sweep peers" for what ncu counts, other sizes of work, and other packages.
gpu:
	$(PYTHON) -m bench.gpu.make_gpu $(ARGS)

# The sdist, the wheel that comes of it, and the SBOM: what is in them, and what the wheel does, alone
# in an environment outside of the tree. PYTHONS: further ones, with its dependencies and pytest.
# And README's installation, in a clone and outside of it.
dist: wheel
	$(BIN)/twine check --strict $(DIST)/*
	$(BIN)/python tests/installed/contents.py $(DIST)
	$(BIN)/python tests/installed/run.py --sbom $(DIST)/sbom.cdx.json $(DIST)/*.whl
	set -e; for python in $(PYTHONS); do \
	    $(BIN)/python tests/installed/run.py --python $$python $(DIST)/*.whl; \
	done
	KL_KERNELS_CUDA=0 $(BIN)/python tests/installed/clone.py

# The same with the cuda backend, where nvcc is.
dist-cuda: $(VENV)/dist-ready
	$(MAKE) abi dist DIST=build/dist-cuda KL_KERNELS_CUDA=1

# Whether the wheel keeps to the stable ABIs: Python's, as its tag promises, and torch's.
abi: wheel
	$(BIN)/abi3audit --strict --verbose $(DIST)/*.whl
	rm -rf build/unpacked
	$(BIN)/python -m zipfile -e $(DIST)/*.whl build/unpacked
	$(BIN)/torch-abi-audit --verbose --check both build/unpacked/kl_kernels

# Tagged with the oldest glibc that it runs with, which indexes ask for. What torch brings along
# stays torch's.
wheel: $(VENV)/dist-ready
	rm -rf $(DIST)
	KL_KERNELS_CUDA=0 $(BIN)/python -m build --quiet --no-isolation --sdist --outdir $(DIST)
	KL_KERNELS_CUDA=$(KL_KERNELS_CUDA) $(BIN)/python -m pip wheel --quiet --no-cache-dir \
	    --no-build-isolation --no-deps -w $(DIST)/built $(DIST)/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
	    --exclude 'libcudart*' -w $(DIST) $(DIST)/built/*.whl
	rm -r $(DIST)/built

# The site, into build/site. (Otherwise every build would announce Material's successor.)
docs: $(VENV)/docs-ready
	REPOSITORY="$(REPOSITORY)" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

lint: $(VENV)/dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/typing/mypy.ini
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/dev-ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

# The libraries' own files and nothing that they depend on. flash-attention's kernels are taken from
# its sources, for an installation would build CUDA code.
$(COUNTED)/ready: bench/offline/peers.txt $(READY)
	$(BIN)/python -m pip install --no-deps --target $(COUNTED) -r $<
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(BIN)/python -m pip download --no-deps --no-build-isolation \
	    --no-binary :all: --dest $(COUNTED) flash-attn==2.8.3.post2
	mkdir -p $(COUNTED)/sources
	tar xzf $(COUNTED)/flash_attn-*.tar.gz --directory $(COUNTED)/sources --strip-components 1
	touch $@

# A trainer's packages before those of .venv, which thus serve it where it has no others. A file's
# first line may say how pip is to install the rest.
build/trainers/%/ready: tests/trainers/environments/%.txt $(READY)
	$(PYTHON) -m venv --clear --without-pip build/trainers/$*
	$(BIN)/python tests/trainers/overlay.py build/trainers/$*
	$(BIN)/python -m pip --python build/trainers/$*/bin/python install $$(sed -n 's/^# pip install //p' $<) -r $<
	touch $@

.PRECIOUS: build/trainers/%/ready

clean:
	rm -rf build kl_kernels/*.so

# What lint, docs and dist need, for those that run at the same time.
tools: $(VENV)/dev-ready $(VENV)/docs-ready $(VENV)/dist-ready

# Torch goes in first: the extension compiles against the torch it will run with, so the build is not isolated.
$(VENV)/torch-ready:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "setuptools>=77" wheel "$(TORCH)"
	touch $@

$(READY): $(VENV)/torch-ready pyproject.toml setup.py $(shell find csrc -type f)
	$(BIN)/python -m pip install --no-build-isolation -e ".[test]"
	touch $@

# Packages that cannot be installed here are left out of the comparison, whose page says so.
$(VENV)/bench-ready: $(READY)
	$(BIN)/python -m pip install --no-build-isolation -e ".[bench]"
	touch $@

$(VENV)/dev-ready: $(READY)
	$(BIN)/python -m pip install --no-build-isolation -e ".[dev]"
	touch $@

$(VENV)/dist-ready: $(READY)
	$(BIN)/python -m pip install --no-build-isolation -e ".[dist]"
	touch $@

$(VENV)/docs-ready: $(READY)
	$(BIN)/python -m pip install --no-build-isolation -e ".[docs]"
	touch $@
