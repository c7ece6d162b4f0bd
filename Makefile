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

.PHONY: setup demo test bench bench-gpu lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja
	$(PIP) --no-build-isolation -e '.[dev]'
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
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info lozo_kernels/lib .pytest_cache .mypy_cache .ruff_cache
