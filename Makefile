# The targets of isopod. `make help` lists them from the comments behind their names.
#
#   JOBS=1      build with one job, for small machines
#   PKG=net     only the tests of one package: make test PKG=runtime
#   ARGS=...    more arguments for pytest: make test-unit ARGS="-k addresses"
#   SUITE=...   arguments for the suites: make test-stress SUITE="--repeat 20"
#
# Everything that is built lies in .venv/, build/ and rust/*/target/; `make clean` removes it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
export HYPOTHESIS_STORAGE_DIRECTORY := build/hypothesis
ifdef JOBS
export CARGO_BUILD_JOBS := $(JOBS)
endif

.PHONY: help setup setup-tests setup-vm core run stop test test-unit test-host test-rust test-v2 test-simulation test-failpoints test-all test-ci test-stress test-verbose lint format rows docs bench-run bench-runtime bench-journal bench-raft bench-microvm bench-pulse test-images soak-runtime validate clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing: Debian packages, the virtual environment, the Rust core, the launcher
	@scripts/setup.sh

setup-tests: ## Set up, and install what only tests use (curl, a headless browser, virtual machines)
	@scripts/setup.sh --tests
	@scripts/guest.sh

setup-vm: setup ## Install what virtual machines need: QEMU, a kernel for guests, their agent
	@scripts/guest.sh

core: ## Build the Rust core again if its sources changed
	@scripts/setup.sh

run: setup ## Start a node if none answers, run a first container on it, say what to type next
	@scripts/run.sh

stop: ## Stop the node that `make run` started
	@scripts/stop.sh

test: setup-tests test-rust ## Run all tests, or with PKG=net those of one package
	@$(PYTEST) $(if $(PKG),tests/$(PKG)) $(ARGS)

test-unit: setup-tests ## Run the tests that need neither root nor the kernel's features, without the slow ones
	@$(PYTEST) -m "not host and not slow" $(ARGS)

test-host: setup-tests ## Run the tests that need root and the real kernel
	@$(PYTEST) -m host $(ARGS)

test-rust: setup ## Run the own tests of the Rust crates
	@scripts/cargo.sh test --quiet
	@CRATE=guest scripts/cargo.sh test --quiet

test-v2: setup ## Run a part of them in a virtual machine with cgroup v2 only (fetches QEMU and a kernel; takes minutes)
	@scripts/vm.sh
	@$(PYTEST) tests/vm -m vm $(ARGS)

test-images: setup-tests ## Build both images of the metrics agent with podman on a base from debootstrap, run them (takes minutes)
	@ISOPOD_IMAGES=1 $(PYTEST) tests/pulse/test_images_built.py $(ARGS)

test-simulation: setup ## Run the simulation's suite: scenarios under faults, determinism, deliberate mutations
	@$(PYTHON) -m scripts.suites simulation $(SUITE) -- $(ARGS)

test-failpoints: setup ## Run the tests in which named places of the code fail
	@$(PYTHON) -m scripts.suites failpoints $(SUITE) -- $(ARGS)

test-all: setup-tests test-rust ## Run all tests, suite by suite, with JUnit reports in build/junit
	@$(PYTHON) -m scripts.suites all --jobs 2 $(SUITE) -- $(ARGS)

test-ci: setup-tests test-rust ## The same as a build server wants it: everything runs, limits stretched, the slowest shown
	@$(PYTHON) -m scripts.suites all --profile ci --jobs 2 $(SUITE) -- $(ARGS)

test-stress: setup-tests ## Repeat all tests with other seeds, and print how often each failed; SUITE="--repeat 20"
	@$(PYTHON) -m scripts.suites all --profile stress $(SUITE) -- $(ARGS)

test-verbose: setup-tests ## Run all tests and name each
	@$(PYTEST) -vv $(ARGS)

lint: setup ## Check format, style, types, floors, stubs, rows and generated files
	@scripts/lint.sh

format: setup ## Format the sources
	@.venv/bin/ruff format . && .venv/bin/ruff check --select I --fix --quiet .
	@scripts/cargo.sh fmt
	@CRATE=guest scripts/cargo.sh fmt

rows: setup ## Print the promises and the tests that keep them; fail if a claimed one has none
	@$(PYTHON) -m scripts.rows

docs: setup ## Write the generated documents again, and the API reference to build/reference
	@$(PYTHON) -m scripts.docs
	@$(PYTHON) -m scripts.reference

bench-run: setup ## Measure run, exec and ps beside podman, docker and crun (installs them)
	@$(PYTHON) -m benchmarks.run $(ARGS)

bench-runtime: setup ## Measure the runtime, HTTP, RPC and shards beside their peers (installs them); ARGS="--quick http" for a part
	@$(PYTHON) -m benchmarks.runtime $(ARGS)

bench-journal: setup ## Measure the journal beside a bare write and fdatasync
	@$(PYTHON) -m benchmarks.journal $(ARGS)

bench-raft: setup ## Measure three nodes beside three of etcd (installs it): writes, reads, fail-over, memory, the simulation's speed
	@$(PYTHON) -m benchmarks.raft $(ARGS)

bench-microvm: setup-vm ## Measure virtual machines beside bare QEMU: start, template, exec, stop, memory
	@$(PYTHON) -m benchmarks.microvm $(ARGS)

bench-pulse: setup ## Measure the metrics agent with a thousand sandboxes, beside a program of kata-monitor's shape
	@$(PYTHON) -m benchmarks.pulse $(ARGS)

soak-runtime: setup ## Ten minutes at full load with clients that die, stall and misbehave; fail if anything leaks
	@$(PYTHON) -m benchmarks.soak $(ARGS)

validate: setup ## Build, test, check and measure everything, and fail if any part fails
	@$(PYTHON) -m scripts.validate $(ARGS)

clean: stop ## Remove everything that was built, the virtual environment too
	@rm -rf .venv build rust/target rust/*/target .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find src tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +
	@rm -f src/isopod/_core*.so src/isopod/faces/grpc/*.binpb src/isopod/pulse/*.binpb
