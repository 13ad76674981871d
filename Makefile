# make quickstart: the whole path on this machine.  make test: all tests that this machine allows.  make .venv: the environment alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint clean

quickstart: $(VENV)
	$(BIN)/python examples/quickstart/run.py runs/quickstart

test: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests

lint: $(VENV)
	$(BIN)/ruff check .

# Rebuilt when the dependencies change; the mark is written last, so an interrupted installation is repeated.
$(VENV): $(VENV)/.installed

$(VENV)/.installed: setup.py requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
