# `make serve` and `make test` need nothing done before: each makes the environment it uses.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
# Serving has an environment of its own, so that it never holds torch (docs/adr/0004).
SERVE_ENV := .venv-serve
DEV_ENV := .venv
RUN ?= runs/vit_cifar10
PIP_FLAGS := --quiet --disable-pip-version-check
# The lower bound in pyproject.toml, in a folder of its own that Python looks into first: all else is as with the newest one.
OLDEST_UVICORN := 0.38.0
OLDEST_UVICORN_DIR := $(CURDIR)/$(DEV_ENV)/uvicorn-$(OLDEST_UVICORN)
WITH_OLDEST_UVICORN := EXPECTED_UVICORN=$(OLDEST_UVICORN) PYTHONPATH=$(OLDEST_UVICORN_DIR)

.DEFAULT_GOAL := help
.PHONY: help install serve test test-integration lint format bench train container-test clean

help: ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(DEV_ENV)/.installed ## Make the environment for developing: tests, linters, exporters

serve: $(SERVE_ENV)/.installed ## Serve the embedded model: make serve PORT=8000 HOST=127.0.0.1
	@exec $(SERVE_ENV)/bin/fovea serve --host $(HOST) --port $(PORT)

test: $(DEV_ENV)/.installed ## Run the tests
	@$(DEV_ENV)/bin/python -m pytest

test-integration: $(DEV_ENV)/.integration ## Run clients in other languages, and the HTTP tests with the oldest uvicorn
	@$(DEV_ENV)/bin/python -m pytest -m integration -rs tests/integration
	@$(WITH_OLDEST_UVICORN) $(DEV_ENV)/bin/python -c 'import uvicorn; print("Now with uvicorn", uvicorn.__version__)'
	@$(WITH_OLDEST_UVICORN) $(DEV_ENV)/bin/python -m pytest -m 'not container' -rs tests/integration tests/app/http tests/e2e

lint: $(DEV_ENV)/.installed ## Check style and types
	@$(DEV_ENV)/bin/ruff check .
	@$(DEV_ENV)/bin/ruff format --check .
	@$(DEV_ENV)/bin/mypy

format: $(DEV_ENV)/.installed ## Format the code
	@$(DEV_ENV)/bin/ruff check --fix --quiet . || true
	@$(DEV_ENV)/bin/ruff format .

bench: $(DEV_ENV)/.installed ## Measure the service against a plain loop: make bench ARGS="--images DIR"
	@$(DEV_ENV)/bin/python -m tests.bench $(ARGS)

train: $(DEV_ENV)/.installed ## Train the embedded model, or go on: make train DATA=DIR RUN=DIR ARGS="--photos FILE"
	@$(DEV_ENV)/bin/python -m models.training --data $(or $(DATA),$(error say DATA=folder with train.zip and test.zip)) \
		--run-dir $(RUN) $(ARGS)

container-test: $(DEV_ENV)/.installed ## Build and run the containers (needs a container engine, or root and dockerd)
	@$(DEV_ENV)/bin/python -m pytest -m container -rA tests/containers

clean: ## Remove the environments
	rm -rf $(SERVE_ENV) $(DEV_ENV)

$(SERVE_ENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up the serving environment (once)..."
	@$(call make_env,$(SERVE_ENV))
	@$(SERVE_ENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[cpu]'
	@touch $@

$(DEV_ENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up the development environment with torch (once)..."
	@$(call make_env,$(DEV_ENV))
	@$(DEV_ENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[cpu,export,test]'
	@touch $@

$(DEV_ENV)/.integration: $(DEV_ENV)/.installed Makefile
	@echo "Adding what the integration tests need (once)..."
	@$(DEV_ENV)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[integration]'
	@$(DEV_ENV)/bin/pip install $(PIP_FLAGS) --no-deps --upgrade --target $(OLDEST_UVICORN_DIR) uvicorn==$(OLDEST_UVICORN)
	@touch $@

define make_env
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Fovea needs Python 3.11 or newer; name one with PYTHON=..."; exit 1; }; \
$(PYTHON) -m venv --clear $(1) \
	|| { echo "Python cannot make environments here; on Debian: apt-get install python3-venv"; exit 1; }
endef
