# Everything here may be called again at any time; what is ready is not made twice.
#
#   PYTHON=/path/to/python        the Python that the environments are made with (default: the first that fits)
#   VLLM_PYTHON=/path/to/python   a Python that already has a vLLM (a GPU box); nothing in it is changed
#   JOBS=2                        how many test files run at once; one with an engine takes about 4 GB

SHELL := /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS PYTHON
# The tests start hundreds of processes: where this is set, each of them would compile this package once more.
export PYTHONDONTWRITEBYTECODE :=

JOBS ?= 2
# A file is one job, for its tests share servers and engines.  The order is pytest's: xdist's own would start with the
# files that have the most tests, and end with a long wait for one of those that start engines.
PARALLEL = --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

VENV := .venv/bin/python
VENV_READY := .venv/.ready
PYTHONS := 3.10 3.11 3.12 3.13
SOURCES := $(shell find umbp_connectors core vllm_plugin sglang_plugin -name '*.py')

ifeq ($(VLLM_PYTHON),)
  VLLM_READY := .venv-vllm/.ready
  VLLM := .venv-vllm/bin/python
  TEST_VLLM_PYTHON ?= $(CURDIR)/$(VLLM)
else
  OVERLAY := .overlay/$(subst /,_,$(VLLM_PYTHON))
  VLLM_READY := $(OVERLAY)/.ready
  VLLM := PYTHONPATH=$(CURDIR)/$(OVERLAY):$$PYTHONPATH '$(VLLM_PYTHON)'
  TEST_VLLM_PYTHON ?= $(VLLM_PYTHON)
  TEST_VLLM_PYTHONPATH ?= $(CURDIR)/$(OVERLAY)
  # Two engines at once would share one device.
  test-vllm: JOBS = 0
endif

SGLANG_READY := .venv-sglang/.ready
SGLANG := .venv-sglang/bin/python
export TEST_VLLM_PYTHON TEST_VLLM_PYTHONPATH

.PHONY: help venv venv-vllm venv-sglang demo demo-sglang demo-router test test-unit test-vllm test-sglang test-pythons crash soak lint format bench docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VLLM_READY) ## serve a real vLLM with --kv-connector umbp and time cold, DRAM hit, SSD hit after a restart
	$(VLLM) examples/demo_vllm.py

demo-sglang: $(SGLANG_READY) ## serve a real SGLang with --hicache-storage-backend umbp and time cold, L1, DRAM, SSD hits
	$(SGLANG) examples/demo_sglang.py

demo-router: $(VLLM_READY) ## two real vLLMs behind the router: conversations go where their KV is, against round robin
	$(VLLM) examples/demo_router.py

test: lint test-unit test-vllm test-sglang ## everything that must pass: linters, tests without an engine, with real ones

test-unit: $(VENV_READY) ## the tests that need no engine
	$(VENV) -m pytest $(PARALLEL)

test-vllm: $(VLLM_READY) ## the tests that need a vLLM
	$(VLLM) -m pytest $(PARALLEL) tests/vllm tests/gpu

test-sglang: $(SGLANG_READY) $(VLLM_READY) ## the tests that need an SGLang; one of them starts a vLLM too
	$(SGLANG) -m pytest $(PARALLEL) tests/sglang

test-pythons: $(PYTHONS:%=test-python-%) ## the tests that need no engine, with each Python that is promised; test-python-3.13 for one

test-python-%: .venv-python-%/.ready
	.venv-python-$*/bin/python -m pytest $(PARALLEL)

soak: $(VENV_READY) ## use a pool and a daemon under pressure for five minutes each: no wrong byte, nothing that grows
	SOAK_SECONDS=300 $(VENV) -m pytest tests/connectors/pool/test_soak.py tests/connectors/daemon/test_daemon_soak.py

crash: $(VENV_READY) ## kill a writer to the SSD tier a thousand times in each durability mode (some minutes)
	CRASH_KILLS=1000 $(VENV) -m pytest tests/connectors/pool/test_crash.py --timeout 3600

lint: $(VENV_READY) ## ruff, mypy strict, the arrows between the packages, sizes
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy
	.venv/bin/lint-imports --no-cache
	$(VENV) -m pytest -q tests/lint

format: $(VENV_READY) ## ruff's formatter and its safe fixes
	$(VENV) -m ruff format .
	$(VENV) -m ruff check --fix .

bench: $(VENV_READY) $(VLLM_READY) $(SGLANG_READY) ## the benchmarks; JSON and tables go to bench-results/
	$(VENV) benchmarks/pool.py
	$(VENV) benchmarks/daemon.py
	$(VENV) benchmarks/scheduler.py
	$(VENV) benchmarks/index.py
	$(VENV) benchmarks/master.py
	$(VENV) benchmarks/reporting.py
	$(VENV) benchmarks/scaling_sim.py
	$(VLLM) benchmarks/copiers.py
	$(VLLM) benchmarks/leader.py
	$(VLLM) benchmarks/vllm_ttft.py
	$(VLLM) benchmarks/vllm_throughput.py
	$(VLLM) benchmarks/router.py
	$(SGLANG) benchmarks/sglang_hicache.py
	$(SGLANG) benchmarks/reporting_engines.py --sglang $(SGLANG) --vllm $(VLLM)

docs: $(VENV_READY) ## rewrite the generated tables in docs/
	$(VENV) scripts/gen_docs.py

venv: $(VENV_READY) ## .venv: everything that needs no engine

venv-vllm: .venv-vllm/.ready ## .venv-vllm: a CPU vLLM with this package, editable

venv-sglang: $(SGLANG_READY) ## .venv-sglang: an SGLang that runs without a GPU, with this package, editable

clean: ## remove what the targets above made
	rm -rf .venv .venv-vllm .venv-sglang .venv-python-* .overlay .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist bench-results demo-run

$(VENV_READY): pyproject.toml
	@python=$$(sh scripts/find_python.sh "the tests and tools" 3.11 3.12 3.13 3.10) || exit 1; \
	test -x $(VENV) || { echo "making .venv with $$python" && "$$python" -m venv .venv; } && \
	$(VENV) -m pip install --quiet --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.PRECIOUS: .venv-python-%/.ready
.venv-python-%/.ready: pyproject.toml
	@python=$$(sh scripts/find_python.sh "the tests with Python $*" $*) || exit 1; \
	test -x $(@D)/bin/python || { echo "making $(@D) with $$python" && "$$python" -m venv $(@D); } && \
	$(@D)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv-vllm/.ready: pyproject.toml scripts/setup_vllm.py scripts/engine_environment.py
	@python=$$(sh scripts/find_python.sh "vLLM on the CPU" 3.11 3.12 3.13) && "$$python" scripts/setup_vllm.py .venv-vllm
	@touch $@

$(SGLANG_READY): pyproject.toml scripts/setup_sglang.py scripts/engine_environment.py
	@python=$$(sh scripts/find_python.sh "SGLang on the CPU" 3.11 3.12 3.13) && \
	"$$python" scripts/setup_sglang.py .venv-sglang
	@touch $@

.overlay/%/.ready: $(VENV_READY) scripts/overlay.py $(SOURCES)
	@$(VENV) scripts/overlay.py '$(VLLM_PYTHON)' $(@D)
	@touch $@
