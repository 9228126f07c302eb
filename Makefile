# Everything runs in .venv, which `make setup` makes; nothing needs activation. pip's own configuration (PIP_INDEX_URL and the
# like) is honoured. Stamps under .stamps say what is done already.

CONSTRAINTS := constraints.txt
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# Where pip does not know of the small CPU build of torch, name the index that has it: make setup TORCH_INDEX=URL. Without it
# pip may take the CUDA build, which is gigabytes.
TORCH_INDEX ?=
# One thread per process: tests and daemons share the cores, and thread counts must not decide about bits.
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-quick bench-codecs bench-bytes bench-algorithms bench-label-skew bench-poisoned bench-variates bench-feedback bench-privacy proto clean
.DELETE_ON_ERROR:

help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .stamps/setup ## Make .venv with everything that the other targets need

demo: .stamps/setup ## A coordinator and three clients train the digits, with live progress (under 2 minutes)
	@$(ONE_THREAD) .venv/bin/python -m examples.digits.demo $(ARGS)

test: .stamps/setup ## Run the tests; ARGS='-k upload' chooses
	@$(ONE_THREAD) .venv/bin/pytest -n 2 --dist loadgroup $(ARGS)

check: .stamps/setup .stamps/proto ## Format, lint, types, import arrows, the contract and its stubs, the compose file
	.venv/bin/ruff format --check --quiet .
	.venv/bin/ruff check --quiet .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-logo
	.venv/bin/buf lint
	.venv/bin/buf format --diff --exit-code
	.venv-proto/bin/python .ci/stubs.py --check
	.venv/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml

bench: .stamps/setup ## Measure rounds without training against their floors (docs/benchmarks.md says how to read it)
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.echo_rounds $(ARGS)

bench-quick: .stamps/setup ## The same for two sizes, in two minutes
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.echo_rounds --quick $(ARGS)

bench-codecs: .stamps/setup ## Measure what codecs cost and lose, on synthetic vectors and on updates of real clients
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.codecs $(ARGS)

bench-bytes: .stamps/setup ## Measure the bytes that accuracy costs, both ways: MNIST with 100 sites (hours for all rows)
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.bytes_to_accuracy $(ARGS)

bench-algorithms: .stamps/setup ## Compare algorithms with federated averaging on uneven data (hours for all rows; ARGS=--tune first)
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.algorithms $(ARGS)

bench-label-skew: .stamps/setup ## Train where every site has one label (minutes)
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.label_skew $(ARGS)

bench-poisoned: .stamps/setup ## Measure the robust rules under six attacks (an hour for all rows)
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.poisoned $(ARGS)

bench-variates: .stamps/setup ## Measure SCAFFOLD when updates lose something (hours for all rows)
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.variates $(ARGS)

bench-feedback: .stamps/setup ## Measure error feedback, EF21 and CAFe on coarse codecs (an hour for all rows)
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.feedback $(ARGS)

bench-privacy: .stamps/setup ## Measure what privacy costs in accuracy (an hour for all rows; ARGS=--tune first)
	@$(ONE_THREAD) .venv/bin/python -m benchmarks.privacy $(ARGS)

proto: .stamps/setup .stamps/proto ## Format the contract and write its stubs anew
	.venv/bin/buf format --write
	.venv-proto/bin/python .ci/stubs.py

clean: ## Remove the environments, stamps, caches and what demos and builds left
	rm -rf .venv .venv-proto .stamps .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is worth nothing when the environment itself was taken away.
.stamps/venv: $(if $(wildcard .venv/bin/python),,missing)
	@test -n "$(PYTHON)" || { echo "Fedstream needs Python 3.11 or newer, and found none: install it, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Fedstream needs Python 3.11 or newer, and $(PYTHON) is not: say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@mkdir -p .stamps
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --upgrade pip
	@touch $@

# torch first and by itself: within one resolution a newer torch, or the CUDA build, can win.
.stamps/torch: .stamps/venv $(CONSTRAINTS)
	.venv/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

.stamps/setup: .stamps/torch pyproject.toml $(CONSTRAINTS)
	.venv/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --build-constraint $(CONSTRAINTS) --editable '.[server,privacy,examples]' --group dev
	@touch $@

.stamps/proto: .stamps/venv .ci/proto-constraints.txt $(if $(wildcard .venv-proto/bin/python),,missing)
	$(PYTHON) -m venv --clear .venv-proto
	.venv-proto/bin/python -m pip install --quiet --constraint .ci/proto-constraints.txt --upgrade pip
	.venv-proto/bin/python -m pip install --quiet --constraint .ci/proto-constraints.txt --group proto
	@touch $@

.PHONY: missing
missing:
