# make demo: install into .venv and run the demonstration; make test, make check: what CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= kvtool-demo

.PHONY: demo install install-dev test test-long test-gpu test-ray bench-gpu check train-tiny docs clean
.DELETE_ON_ERROR:

demo: install
	$(BIN)/kvtool demo --out $(OUT)

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first and from the constraints: a later resolution would otherwise choose another, larger build.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Bytecode is kept even where the environment forbids it: the suite starts kvtool often. Files in the order of tests/conftest.py.
test: install-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Every policy decodes 2,000 tokens; the suite does that with one of each kind.
test-long: install-dev
	KVTOOL_LONG=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/infer/test_decode.py

# On a machine with CUDA: the kernels against the float64 reference, then the demonstration on the device.
test-gpu: install-dev
	$(BIN)/python -m pytest -m gpu
	$(BIN)/kvtool demo --device cuda --dtype bfloat16 --out $(OUT)-cuda

# Ray itself, and the tests on a cluster of two nodes on this machine.
test-ray: install-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/executors/test_ray.py

# Hours on a machine with CUDA; a stopped run continues.
bench-gpu: install-dev
	PYTHON=$(BIN)/python sh benchmarks/gpu.sh

# The API pages, from the docstrings.
docs:
	$(PYTHON) docs/make_api.py

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types && ln -sfn ../.. build/types/kvtool # mypy does not follow the import hook of an editable install
	$(BIN)/mypy

# TEXT: a large public-domain UTF-8 text (.txt or .txt.gz); OUT_TINY: checkpoints; resumes.
OUT_TINY ?= build/tiny
train-tiny: install
	test -n "$(TEXT)" || { echo "give the training text: make train-tiny TEXT=FILE" >&2; exit 2; }
	$(BIN)/python -m kvtool.data.train_tiny --text $(TEXT) --out $(OUT_TINY)
	$(BIN)/python -m kvtool.data.train_tiny --out $(OUT_TINY) --export $(OUT_TINY)/model
	$(BIN)/python -m kvtool.data.evaluate_tiny --model $(OUT_TINY)/model --out $(OUT_TINY)/figures.json

clean:
	rm -rf $(VENV) build *.egg-info $(OUT)
