# make quickstart: the whole path on this machine.  make test: all tests that this machine allows.  make .venv: the environment alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports; of an environment's modules, that is a small part.
INSTALL := -m pip install --quiet --no-compile

# Frameworks whose pins conflict with those of .venv: each has an environment .venv-NAME of its own, requirements-NAME.txt,
# and packages that are installed without what they ask for.
FRAMEWORKS := nemo bridge
ALONE_nemo := nemo_toolkit==2.7.3 megatron-core==0.16.1
ALONE_bridge := megatron-bridge==0.3.1 megatron-core==0.16.1 nvidia-resiliency-ext==0.4.1

.PHONY: quickstart test lint clean

quickstart: $(VENV)
	$(BIN)/python examples/quickstart/run.py runs/quickstart

# Tests of a framework that cannot be installed here are skipped, and say so. Files are spread over WORKERS processes, each of
# them whole, as their tests share models, and in their order: those with the fewest tests are the slowest. More workers need
# about 4 GB of memory each.
WORKERS ?= 2
test: $(VENV)
	-$(MAKE) --keep-going $(FRAMEWORKS:%=.venv-%/.installed)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)
	$(BIN)/ruff check .

# Rebuilt when the dependencies change; the mark is written last, so an interrupted installation is repeated.
$(VENV): $(VENV)/.installed

$(VENV)/.installed: setup.py requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --upgrade pip
	$(BIN)/python $(INSTALL) --requirement requirements.txt
	$(BIN)/python $(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

.venv-%/.installed: setup.py requirements-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(INSTALL) --upgrade pip
	.venv-$*/bin/python $(INSTALL) --requirement requirements-$*.txt
	.venv-$*/bin/python $(INSTALL) --no-deps $(ALONE_$*)
	.venv-$*/bin/python $(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) .venv-* build *.egg-info
