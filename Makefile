# Two commands for a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= data
RUN ?= runs/shapes
PIP_INSTALL := $(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable

# TensorFlow reads data here; what it says of absent GPUs helps nobody.
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: quickstart digits test lint test-slow test-interop clean

quickstart: $(VENV)/.installed ## Data, three stages of training, the table and report.html
	$(BIN)/python -m clipa_t5x.data.build shapes --output_dir=$(DATA)/shapes
	$(BIN)/python -m clipa_t5x.schedule --gin_file=gin/shapes.gin --gin.MODEL_DIR="'$(RUN)'"
	$(BIN)/python -m clipa_t5x.report --model_dir=$(RUN)

digits: $(VENV)/.installed-test ## The same on real handwriting
	$(BIN)/python -m clipa_t5x.data.build digits --output_dir=$(DATA)/digits
	$(BIN)/python -m clipa_t5x.schedule --gin_file=gin/digits.gin --gin.MODEL_DIR="'runs/digits'"
	$(BIN)/python -m clipa_t5x.report --model_dir=runs/digits

test: lint ## Linter, formatter, types and the default tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test-slow: $(VENV)/.installed-test ## The tests that take minutes
	$(BIN)/python -m pytest -m slow

test-interop: $(VENV)/.installed-interop ## Against the real OpenCLIP and Hugging Face's tokenizer
	$(BIN)/python -m pytest tests/interop

clean: ## Removes the environment; data and runs stay
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || \
	  { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) '.[report]'
	touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) '.[test,digits]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-interop: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) '.[test,digits,interop]'
	touch $@ $(VENV)/.installed-test $(VENV)/.installed
