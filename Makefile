# Every target makes its own virtual environment from the pinned versions; nothing has to be installed before.
#   make PYTHON=/path/to/python3.12 test     another interpreter for the environment
#   make demo DEMO_FLAGS="--guests 4"        flags for run_demo.py; each target has its own: TEST_FLAGS, STRESS_FLAGS ...

PYTHON ?= python3
DEMO_FLAGS ?=
TEST_FLAGS ?=
STRESS_FLAGS ?=
SOAK_FLAGS ?=
BENCH_FLAGS ?=
EXPLORE_FLAGS ?=
CHAOS_FLAGS ?=
FUZZ_FLAGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready
FUZZ_READY := $(VENV)/.fuzz

# One more worker than there are processors, since many tests wait (tests/conftest.py has the number, and which tests
# share a worker). A worker that dies, as it does at a test's time limit, ends the run. TEST_FLAGS="-n 0": one process.
SPREAD := -n auto --dist loadscope --no-loadscope-reorder --max-worker-restart 0
# The allocator's tests once more without the compiler (its code then runs as plain Python, which checks every index) and,
# in `make stress`, with bounds checks. Compiled unsigned arithmetic wraps silently, NumPy scalars warn when they do.
ALLOCATOR_TESTS := tests/allocator
WITHOUT_JIT := NUMBA_DISABLE_JIT=1 HYPOTHESIS_PROFILE=quick
WITH_BOUNDSCHECK := NUMBA_BOUNDSCHECK=1 HYPOTHESIS_PROFILE=quick
WRAPS := -W "ignore:overflow encountered:RuntimeWarning"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-compiled test-allocator stress chaos explore fuzz soak lint bench clean

help: ## this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## one host and two guests on real memory, a live view and a picture
	$(RUN) run_demo.py $(DEMO_FLAGS)

test: $(READY) ## every test but the long ones, and the allocator's once more without the compiler
	@$(MAKE) --no-print-directory --jobs=2 test-compiled test-allocator

# With nothing compiled yet, one processor compiles the kernels that processes start with, once, before the workers need
# them, while the other one runs what needs no compiler. Their output would mix: that of the second half is kept and shown
# when it has ended.
test-compiled: $(READY)
	$(RUN) -m guest --warm-up
	$(RUN) -m pytest $(SPREAD) $(TEST_FLAGS)

test-allocator: $(READY)
	@log=$$(mktemp); ( set -x; \
	  $(WITHOUT_JIT) $(RUN) -m pytest $(WRAPS) $(ALLOCATOR_TESTS) ) >$$log 2>&1; \
	  code=$$?; cat $$log; rm -f $$log; exit $$code

stress: $(READY) ## the long concurrency tests, and the allocator's with bounds checks
	$(RUN) -m pytest -m stress $(STRESS_FLAGS)
	$(WITH_BOUNDSCHECK) $(RUN) -m pytest $(ALLOCATOR_TESTS)

chaos: $(READY) ## a thousand processes killed at random moments, and what is lost by it
	$(RUN) -m lab chaos $(CHAOS_FLAGS)

explore: $(READY) ## every interleaving on a small zone: each policy for five minutes
	$(RUN) -m lab explore --policy all $(EXPLORE_FLAGS)

fuzz: $(FUZZ_READY) ## decoder, host and guest under coverage-guided fuzzing, then a million wrong messages
	$(RUN) -m tests.fuzz $(FUZZ_FLAGS)

soak: $(READY) ## an hour of everything at once, memory of every process looked at (SOAK_FLAGS="--for 10m": less)
	$(RUN) -m lab soak $(SOAK_FLAGS)

lint: $(READY) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(READY) ## the benchmark table
	$(RUN) -m benchmarks $(BENCH_FLAGS)

clean: ## remove the environment and caches; results and pictures stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(LOCKED): requirements/locked.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: $(PYTHON) not found; install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 3; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 3; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) lacks the venv module; install it (Debian, Ubuntu: apt install python3-venv) and try again" >&2; exit 3; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements/locked.txt
	@touch $@

# Apart from the rest: nothing else needs it, and there is not one for every Python.
$(FUZZ_READY): requirements/fuzz.txt $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements/fuzz.txt
	@touch $@

$(READY): $(LOCKED) pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
