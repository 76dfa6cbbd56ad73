# Two commands: `make sample` (text to image with the bundled model) and `make test`. Both set up .venv themselves.
# `make test-oldest` tests with the oldest releases that pyproject.toml allows (gigabytes, once).
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
EXTRAS := dev
BIN := $(VENV)/bin
OUT ?=
PROMPT ?= a red star left of a blue heart

ifneq ($(shell command -v uv 2>/dev/null),)
  MAKE_VENV := uv venv --quiet --allow-existing --python $(PYTHON) $(VENV)
  INSTALL := uv pip install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS)
else
  MAKE_VENV := $(PYTHON) -m venv $(VENV)
  INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
endif

.PHONY: sample test slow-test test-oldest lint clean

sample: $(VENV)/.installed
	$(BIN)/nextscale sample "$(PROMPT)" --n 4 --seed 0 $(if $(OUT),--out $(OUT))

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4

slow-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=dev,demo,eval,lora

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "nextscale needs Python 3.11 or newer; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "setting up $(VENV) (once; PyTorch is large)"
	$(MAKE_VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info
