# Letheon. `make demo` shows it forget; `make test` runs the tests. Both start from nothing but Python and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned here too: pip would otherwise pick the accelerator build, several GB, before it reads our other requirements.
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow check audit docs format serve clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.stamp ## Make .venv with everything in it (again only when pyproject.toml changes)

$(VENV)/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Letheon needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Say which one to use: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: venv ## Forget one person's reviews, before and after (KEEP=1 leaves the server running)
	$(BIN)/letheon model pull
	$(BIN)/letheon data pull
	$(BIN)/python -m bench.demo $(if $(filter-out 0,$(KEEP)),--keep) $(if $(PERSON),--person "$(PERSON)")

PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

test: venv ## Run the tests, but for the slow ones
	$(PYTEST) -m "not slow"

test-slow: venv ## Run the slow ones: the tutorial, Ray Serve, the benches, a bulk file that is interrupted again and again
	$(PYTEST) -m slow

check: venv ## Lint, format, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: venv ## Look for known vulnerabilities in what is installed; write var/sbom.json
	$(BIN)/python .ci/audit.py

docs: venv ## Make the reference pages of the code, and build the site into var/site
	$(BIN)/python -m docs.generate
	$(BIN)/python -m sphinx -W --keep-going -q -d var/doctrees docs var/site

format: venv ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: venv ## Run API and worker on the embedded defaults
	$(BIN)/letheon model pull
	$(BIN)/letheon data pull
	$(BIN)/letheon serve

clean: ## Remove caches and the environment; var/ (database, keys, model) stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
	find app models worker bench client tests alembic -name __pycache__ -type d -prune -exec rm -rf {} +
