# One command for each thing; every one of them installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install browser demo coverage test test-all sanitize lint format clean
help:            ## list the commands
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install: $(INSTALLED)   ## create .venv and install the pinned dependencies
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The report's page is tested in a browser. Continuous integration installs one; elsewhere `make browser` does,
# and without one those tests are skipped.
BROWSER := $(if $(CI),browser)
browser:         ## install Chromium from Debian's packages, for the tests of the html report
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	|| { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } \
	|| echo 'no Chromium: the tests of the html report are skipped'

demo: $(INSTALLED)      ## RigL beside static and dense training on real handwritten digits
	$(BIN)/python tools/demo.py

coverage: $(INSTALLED)  ## which models are captured and masked, over torchvision, timm, transformers and the zoo
	$(BIN)/python tools/coverage.py --write docs/coverage.md

bench-sparse: $(INSTALLED)  ## sparse kernels beside PyTorch, ONNX Runtime, OpenVINO and SparseProp; goes on where stopped
	$(BIN)/python tools/bench.py sparse --resume --write docs/bench/sparse.md

bench-train: $(INSTALLED)   ## masked training beside dense, rigl-torch and sparsimony; goes on where stopped
	$(BIN)/python tools/bench.py train --resume --write docs/bench/train.md

test: $(INSTALLED) $(BROWSER)      ## the tests, without the long ones
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(INSTALLED) $(BROWSER)  ## the tests, the long ones too
	$(BIN)/python -m pytest -n 2

sanitize: $(INSTALLED)  ## the sparse kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python -m pytest tests/kernels/test_machines.py -k sanitizers

lint: $(INSTALLED)      ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)    ## let ruff lay the code out
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:                  ## remove .venv, .peers and caches
	rm -rf $(VENV) .peers build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
