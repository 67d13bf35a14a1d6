# `make` lists the targets. Each one makes .venv first when it has to, with the
# exact versions in requirements.lock. PYTHON=/path/to/python picks the Python.
#
# All paths are relative, so that a folder with spaces in its name works.

.PHONY: help setup train test lint format lock clean FORCE
.DELETE_ON_ERROR:

# Large pages for what malloc takes from the system: a step on a CPU takes its
# buffers anew each time (docs/performance.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

VENV_PYTHON = .venv/bin/python
STAMP = .venv/.installed

# The stamp holds the folder that was installed from. Not only its date counts:
# a moved or copied tree would import from the old place, and an upgrade of the
# system can take away the Python below .venv.
SETUP_AGAIN := $(shell \
  { test -x $(VENV_PYTHON) && test "$$(cat $(STAMP))" = "$$(pwd -P)"; } \
  2> /dev/null || echo FORCE)

help:
	@echo 'make setup    make .venv, or update it (the others do so by themselves)'
	@echo 'make train    train with ConAdv on the embedded digits data'
	@echo "make test     run the tests, e.g. make test PYTEST_ARGS='-k mesh'"
	@echo 'make lint     check style and formatting'
	@echo 'make format   format the code, fix what can be fixed'
	@echo 'make lock     remake requirements.lock (LOCK_ARGS=--upgrade: newest)'
	@echo 'make clean    delete .venv, builds and caches; runs/ stays'

setup: $(STAMP)

# The stamp goes first and comes back last: an interrupted install starts again.
# uv installs in seconds what takes pip a minute; pip is the way out where uv
# has no build or does not know the package index that pip is set up for. As pip
# does, it compiles to bytecode: where Python may not write that itself, every
# process would compile again what it imports, for seconds.
$(STAMP): requirements.lock setup.py $(SETUP_AGAIN)
	@echo 'Setting up .venv with the versions in requirements.lock ...'
	@rm -f $(STAMP)
	@$(VENV_PYTHON) -c \
	  'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  2> /dev/null \
	|| { python=$$(sh scripts/find_python.sh) && rm -rf .venv \
	  && "$$python" -m venv .venv; }
	@$(VENV_PYTHON) -m pip --version > /dev/null 2>&1 \
	|| $(VENV_PYTHON) -m ensurepip > /dev/null
	@uv=$$(sed -n 's/^\(uv==[^ ;]*\).*/\1/p' requirements.lock); \
	{ $(VENV_PYTHON) -m pip install -qq "$$uv" && $(VENV_PYTHON) -m uv \
	  pip install -q --compile-bytecode --python $(VENV_PYTHON) \
	  -r requirements.lock; } \
	|| { echo 'uv could not install; trying pip (a few minutes) ...'; \
	  $(VENV_PYTHON) -m pip install -q -r requirements.lock; }
	@$(VENV_PYTHON) -m pip install -qq --no-deps --no-build-isolation -e .
	@pwd -P > $(STAMP)

train: $(STAMP)
	@echo 'Training on the digits data ...'
	@$(VENV_PYTHON) scripts/quickstart.py $(TRAIN_ARGS)

test: $(STAMP)
	@echo 'Running the tests ...'
	@$(VENV_PYTHON) -m pytest -n auto --maxprocesses=8 --dist=loadfile \
	  $(PYTEST_ARGS)

lint: $(STAMP)
	@echo 'Checking style and formatting ...'
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .

format: $(STAMP)
	@echo 'Formatting ...'
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

# The command's text ends up in the lock's header: keep options that are not
# part of the result (-q, LOCK_ARGS) in places where uv leaves them out.
lock: $(STAMP)
	@echo 'Remaking requirements.lock ...'
	@$(VENV_PYTHON) -m uv pip compile -q --universal --python-version 3.11 \
	  --extra dev setup.py -o requirements.lock $(LOCK_ARGS) > /dev/null

clean:
	@echo 'Deleting .venv, builds and caches ...'
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
