# Two commands do everything on a fresh machine: `make serve` and `make test`.
#
# On a machine with a GPU, install your own torch into the environment and say `CONSTRAINTS=`:
# the constraints file pins the versions tried together without one.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
DEMO ?= .demo
DATA ?=
AUDIT_FLAGS ?=
# Processes that share the tests: one a core, four at most. Each takes up to 2 GB.
TEST_WORKERS ?= logical
# Of `make load`: the server, the kind of load (open, closed, steps), and flags beside.
LOAD_URL ?= http://127.0.0.1:8000
LOAD ?= open
LOAD_FLAGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# More threads than free cores make torch many times slower; the tests need only one.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help serve demo test test-ray check audit format chaos soak load bench docs image lock \
	test-deploy clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; $(PYTHON) is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-server: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[server]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[server,triton,dev]'
	@touch $@ $(VENV)/.installed-server

$(VENV)/.installed-deploy: $(VENV)/.installed-dev
	$(PIP_INSTALL) --editable '.[deploy]'
	@touch $@

serve: $(VENV)/.installed-server ## build the demo once and serve it on 127.0.0.1:8000
	$(BIN)/python -m server demo --out $(DEMO) $(if $(DATA),--data $(DATA)) --serve

demo: $(VENV)/.installed-server ## build the demo, measure it through HTTP, stop
	$(BIN)/python -m server demo --out $(DEMO) $(if $(DATA),--data $(DATA)) --evaluate

# A test that hangs shows where, and fails by its name.
test: $(VENV)/.installed-dev ## the whole suite
	$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) --maxprocesses 4 --dist worksteal \
		-o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	$(PIP_INSTALL) --editable '.[ray]'
	@touch $@

test-ray: $(VENV)/.installed-ray ## a Ray cluster on this machine: replicas killed, scaled, swapped
	RAY_TESTS=1 $(TEST_ENV) $(BIN)/python -m pytest tests/deploy/test_ray.py -q

check: $(VENV)/.installed-dev ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(VENV)/.installed-dev ## known weaknesses of the packages installed; skipped without an advisory database
	$(BIN)/python .ci/audit.py $(AUDIT_FLAGS)

format: $(VENV)/.installed-dev ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: $(VENV)/.installed-dev ## half an hour of mixed traffic; every answer checked, memory flat
	SOAK_SECONDS=1800 $(TEST_ENV) $(BIN)/python -m pytest tests/server/test_soak.py -q

load: $(VENV)/.installed-dev ## load a running server (LOAD=open, closed or steps); report in load-report/
	$(BIN)/locust --config loadtest/$(LOAD).conf --host $(LOAD_URL) $(LOAD_FLAGS)

chaos: $(VENV)/.installed-dev ## tests at length: writers killed, payloads fuzzed, swaps under load
	CHAOS_ROUNDS=50 FUZZ_EXAMPLES=10000 API_FUZZ_EXAMPLES=300 RANDOM_REQUESTS=10000 \
		IDLE_CONNECTIONS=10000 RAW_REQUESTS=2000 HYPOTHESIS_PROFILE=explore $(TEST_ENV) \
		$(BIN)/python -m pytest -q tests/rectokens/artifacts tests/rectokens/prompt_embeds \
		tests/server/offline tests/server/jobs tests/server/test_random_requests.py \
		tests/server/test_swap_under_load.py tests/server/test_hostile_network.py \
		tests/server/api/test_fuzz.py tests/server/proxy/test_fuzz.py

bench: $(VENV)/.installed-server ## the engine against Hugging Face generate, on this machine
	$(BIN)/python -m server demo --out $(DEMO) $(if $(DATA),--data $(DATA)) --no-serve
	$(BIN)/python -m examples.scripts.benchmark.benchmark_recommend_cpu \
		--release "$$(ls -td $(DEMO)/releases/*/ | head -1)" $(if $(DATA),--data $(DATA))

docs: $(VENV)/.installed-server ## rewrite the pages that are generated from the program
	$(BIN)/python -m server settings-doc > docs/settings.md

image: $(BIN)/python ## build the CPU image, or with TARGET=cuda the other one
	$(BIN)/python deploy/build_image.py $(or $(TARGET),cpu)

test-deploy: $(VENV)/.installed-deploy ## build the CPU image and start the compose file, without Docker
	PYTHON=$(BIN)/python $(TEST_ENV) sh deploy/test.sh

lock: ## pin what the images install; needs uv
	sh deploy/lock.sh

clean: ## remove what the targets above made, the environment too
	rm -rf $(VENV) $(DEMO) load-report .pytest_cache .mypy_cache .ruff_cache .hypothesis
