# `make demo` and `make test` need nothing but Python 3.11: each creates .venv and installs pinned versions into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# MNIST beside the checkout, where it exists; TACIT_DATA from the environment goes first.
ifneq ($(wildcard ../shared/data/MNIST),)
TACIT_DATA ?= $(abspath ../shared/data)
endif
export TACIT_DATA
# What is installed has no bytecode yet: it is written when a module is imported first, which takes a third of the time.
export PYTHONDONTWRITEBYTECODE :=

# A strict editable install links every file: it is renewed when a file appears or disappears.
SOURCES := $(sort $(wildcard compiler/*.py compiler/peers/*.py ir/*.py ir/ops/*.py ir/view/*.py ir/view/*.css ir/view/*.js passes/*.py runtime/*.py runtime/net/*.py))
NAMES := $(VENV)/names-$(shell printf '%s' '$(SOURCES)' | cksum | cut -d' ' -f1)

.PHONY: demo test kernels lint mutants peers clean

demo: $(NAMES)
	$(BIN)/python examples/demo.py

# Three processes on two cores, because tests of networked parties wait.
test: $(NAMES)
	$(MAKE) --no-print-directory -j 2 lint kernels
	$(BIN)/python -m pytest -n 3 --dist loadfile --ignore tests/test_ops.py

# These tests compile the kernels. Alone, beside the type checker, they do it once; the other processes then find them.
kernels: $(NAMES)
	$(BIN)/python -m pytest tests/test_ops.py

lint: $(NAMES)
	$(BIN)/ruff check .
	$(BIN)/mypy

# One condition of the security taken away at a time: the suite has to notice. MUTANTS names some, or gives options.
mutants: $(NAMES)
	PYTHONPATH=tests $(BIN)/python -m mutants $(MUTANTS)

$(NAMES): pyproject.toml constraints.txt setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[examples,test,dev]'
	rm -f $(VENV)/names-*
	touch $@

# CrypTen and SPU for `tacit bench peers`, each in an environment of its own: they agree neither with us nor with each other.
PEERS := .peers

peers: $(PEERS)/crypten/installed $(PEERS)/spu/installed

$(PEERS)/%/installed: compiler/peers/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	test $* != crypten || $(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps crypten==0.4.1
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
