# Two commands: `make quickstart` and `make test`. Each makes $(VENV) and installs what it needs on first use.
#   PYTHON=/path/to/python  which interpreter (3.11 or newer) makes the environment
#   VENV=.venv              where it goes
#   JOBS=2                  how many processes run the tests
SHELL := /bin/sh
VENV ?= .venv
PY := $(VENV)/bin/python
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
PYTEST := JAX_PLATFORMS=cpu $(PY) -m pytest -q -n $(JOBS) --dist worksteal

# The environment is up to date when a stamp named after the content of these files stands in it.
RUN_FILES := requirements.txt constraints-3.11.txt constraints-3.12.txt
DEV_FILES := $(RUN_FILES) pyproject.toml
RUN_STAMP := $(VENV)/.run-$(shell cat $(RUN_FILES) | cksum | tr ' ' '-')
DEV_STAMP := $(VENV)/.dev-$(shell cat $(DEV_FILES) | cksum | tr ' ' '-')
DOCS_STAMP := $(VENV)/.docs-$(shell cat $(DEV_FILES) | cksum | tr ' ' '-')

# What CI runs a second time with the newer Python: the parts that touch jax and flax most.
FAST_TESTS ?= tests/tree tests/models tests/inference tests/huggingface

.DEFAULT_GOAL := help
.PHONY: help quickstart convert-demo test test-full test-fast lint docs kernels wheel requirements clean venv venv-dev

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(RUN_STAMP) ## compare dense, narrow and the recommended layer on this machine (8 minutes, 2 cores)
	$(PY) -m experiments.quickstart

test: $(DEV_STAMP) ## run the test suite (under 8 minutes on 2 cores)
	$(PYTEST)

test-full: $(DEV_STAMP) ## run the slow tests as well, and all of them compiled as users' programs are
	XLA_FLAGS= $(PYTEST) -m ""

test-fast: $(DEV_STAMP) ## run the tests of the layer and the models only
	$(PYTEST) $(FAST_TESTS)

lint: $(DEV_STAMP) ## ruff, pyright, and whether requirements.txt is what pyproject.toml says
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) .ci/requirements.py --check

# DEMO_CONFIG and what follows are words of the programs' command lines: docs/guides/converting.md.
DEMO ?= runs/convert_demo
DEMO_SEEDS ?= 1
DEMO_CONFIG ?= --config=configs/quickstart.py:kind=dense
DEMO_TREES ?= --n_trees=3
DEMO_STEPS ?= 300
DEMO_METHODS := cluster_leaf cluster cluster_spent random_leaf
DEMO_STARTS = $(foreach seed,$(shell seq 0 $$(($(DEMO_SEEDS) - 1))),$(DEMO_METHODS:%=$(DEMO)/seed$(seed)/%/config.json))
CONVERT = rm -rf $(@D) && $(PY) -m experiments.convert --workdir=$(DEMO)/seed$*/dense --seed=$* \
	--results=$(DEMO)/conversion.jsonl --to=$(@D)

convert-demo: $(RUN_STAMP) $(DEMO_STARTS) ## train a dense model, convert it by several methods, fine-tune each
	$(PY) -m experiments.ablate --sweep=configs/sweeps/conversion.py:runs=$(DEMO),steps=$(DEMO_STEPS),seeds=$(DEMO_SEEDS) \
		--tune --workdir=$(DEMO)/tuned --results=$(DEMO)/conversion.jsonl $(DEMO_SWEEP)
	$(PY) -m experiments.tables --results='$(DEMO)/*.jsonl'

.SECONDARY: # what make would remove after it is used
$(DEMO)/seed%/dense/done: | $(RUN_STAMP)
	$(PY) -m experiments.train $(DEMO_CONFIG) --config.seed=$* --workdir=$(@D)
	touch $@
$(DEMO)/seed%/cluster_leaf/config.json: $(DEMO)/seed%/dense/done
	$(CONVERT) --method=cluster $(DEMO_LEAVES)
$(DEMO)/seed%/random_leaf/config.json: $(DEMO)/seed%/dense/done
	$(CONVERT) --method=random $(DEMO_LEAVES)
$(DEMO)/seed%/cluster/config.json: $(DEMO)/seed%/dense/done
	$(CONVERT) --kind=tree --method=cluster $(DEMO_TREES)
$(DEMO)/seed%/cluster_spent/config.json: $(DEMO)/seed%/dense/done
	$(CONVERT) --kind=tree --method=cluster --router=spent --drop $(DEMO_TREES)

docs: $(DOCS_STAMP) ## make the site, build/docs/index.html
	rm -rf docs/modules
	$(PY) -m sphinx -W --keep-going -q -d build/doctrees docs build/docs

kernels: $(RUN_STAMP) ## compile the C++ part for this machine's CPU and, with nvcc, the CUDA parts: layers get faster (optional)
	$(PY) -m tree_ffn.tree.kernels

# A wheel of what git has, with the compiled parts beside their sources. Build it with the oldest jax: newer ones take it.
CAPABILITY ?=
wheel: $(RUN_STAMP) ## dist/*.whl for machines like this, with compiled kernels in it (CAPABILITY=9.0: for such GPUs)
	rm -rf build/wheel && mkdir -p build/wheel dist
	git ls-files -z LICENSE README.md pyproject.toml configs experiments tree_ffn | xargs -0 cp --parents -t build/wheel
	echo 'include tree_ffn/tree/kernels/*.so' >build/wheel/MANIFEST.in
	cd build/wheel && TREE_FFN_KERNELS= $(abspath $(PY)) -m tree_ffn.tree.kernels $(CAPABILITY:%=--capability=%)
	$(PY) -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir dist build/wheel \
		--config-settings=--build-option=--plat-name=$$($(PY) -c 'import sysconfig; print(sysconfig.get_platform())')
	rm -rf build/wheel

requirements: $(RUN_STAMP) ## make requirements.txt from pyproject.toml
	$(PY) .ci/requirements.py

clean: ## remove the environment and every cache made here (runs/ stays)
	rm -rf $(VENV) .venv-* .pytest_cache .ruff_cache .jax_cache *.egg-info build dist docs/modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(RUN_STAMP)
venv-dev: $(DEV_STAMP)

# The constraints of the environment's own Python; a version newer than any tested takes the newest tested set.
INSTALL = v=$$($(PY) -c 'import sys; print("3.11" if sys.version_info < (3, 12) else "3.12")') && \
	echo "installing $(1) with constraints-$$v.txt (about a minute the first time)" && \
	$(PY) -m pip install -q --disable-pip-version-check $(1) -c constraints-$$v.txt

$(RUN_STAMP): $(VENV)/bin/python
	@$(call INSTALL,-r requirements.txt)
	@rm -f $(VENV)/.run-* && touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@$(call INSTALL,-e .[dev])
	@rm -f $(VENV)/.dev-* && touch $@

$(DOCS_STAMP): $(RUN_STAMP)
	@$(call INSTALL,-e .[docs])
	@rm -f $(VENV)/.docs-* && touch $@

# The first interpreter that really runs (a version manager's shim may exist and fail), is new enough and can make
# an environment with pip in it (Debian ships that part as python3-venv).
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3 python3.13 python)

$(VENV)/bin/python:
	@for p in $(CANDIDATES); do \
	  if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$("$$p" -V)"; exec "$$p" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.11 or newer with venv and pip was found (tried: $(CANDIDATES)):" \
	  "install one (on Debian or Ubuntu also python3-venv), or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; \
	exit 1
