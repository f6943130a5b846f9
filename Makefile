# Everything needs only Python >= 3.11, a C++20 compiler and make. Each target sets up what it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt
STAMPS := .stamps

# The authors' outputs and the real cells, where they lie beside the checkout; tests that need them skip without.
export SCFM_GOLDENS ?= $(wildcard $(CURDIR)/../shared/goldens)
export SCFM_DATA    ?= $(wildcard $(CURDIR)/../shared/data)

NATIVE := $(shell find csrc -type f) CMakeLists.txt pyproject.toml

.PHONY: help build demo test bench test-gpu bench-gpu lint format sanitize clean
help:
	@echo "make demo | test | bench | test-gpu | bench-gpu | lint | format | sanitize | clean"

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit("scfm needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch first and alone: it decides which triton fits it.
$(STAMPS)/base: $(STAMPS)/venv constraints.txt
	$(PIP) torch==2.13.0
	$(PIP) "scikit-build-core>=0.11" "pybind11>=3.0" cmake ninja
	@touch $@

$(STAMPS)/build: $(STAMPS)/base $(NATIVE)
	$(PIP) --no-build-isolation -Cbuild-dir=build/editable -e .
	@touch $@

$(STAMPS)/%: $(STAMPS)/build
	$(PIP) --no-build-isolation -Cbuild-dir=build/editable -e ".[$*]"
	@touch $@

build: $(STAMPS)/build

demo: $(STAMPS)/demo
	$(BIN)/scfm demo

test: $(STAMPS)/test
	$(BIN)/python -m pytest $(ARGS)

bench: $(STAMPS)/bench
	@mkdir -p benches/results
	$(BIN)/python -m pytest benches --benchmark-json=benches/results/latest.json -s $(ARGS)

# On a machine with a GPU, by the Python at hand (torch >= 2.11, triton >= 3.6, numpy): nothing is installed.
test-gpu:
	$(PYTHON) benches/gpu/check.py $(ARGS)

bench-gpu:
	$(PYTHON) benches/gpu/bench.py $(ARGS)

lint: $(STAMPS)/test $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/cuda/emulation -type f | xargs $(BIN)/clang-format --dry-run --Werror

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	find csrc tests/cuda/emulation -type f | xargs $(BIN)/clang-format -i

# The native tests under AddressSanitizer and UBSan. Masked AVX-512 accesses are invisible to ASan, so the
# narrower instruction sets are the ones forced here; guard pages cover AVX-512 in the ordinary tests.
sanitize: $(STAMPS)/test
	$(BIN)/pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps --target build/sanitized \
	  --upgrade -Cbuild-dir=build/sanitize -Ccmake.define.SCFM_SANITIZE="address;undefined" .
	for isa in generic avx2; do \
	  SCFM_ISA=$$isa PYTHONPATH=build/sanitized ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  $(BIN)/python -m pytest tests/native || exit 1; \
	done

clean:
	rm -rf build $(STAMPS) $(VENV)
