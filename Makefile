# `make` lists the targets. Each one makes .venv first when it has to, with the
# exact versions in the lock of DEVICE: cpu, tpu or cuda. It stays what it was
# at first, until another is asked for. PYTHON=/path/to/python picks the Python.
#
# All paths are relative, so that a folder with spaces in its name works.

.PHONY: help setup train test lint format lock clean FORCE
.DELETE_ON_ERROR:

# Large pages for what malloc takes from the system: a step on a CPU takes its
# buffers anew each time (docs/performance.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

VENV_PYTHON = .venv/bin/python
STAMP = .venv/.installed
CHOICE = .venv/.device

CHOSEN := $(or $(shell cat $(CHOICE) 2> /dev/null),cpu)
ifeq ($(DEVICE),)
DEVICE := $(CHOSEN)
endif
LOCK_cpu = requirements.lock
LOCK_tpu = requirements-tpu.lock
LOCK_cuda = requirements-cuda.lock
LOCK := $(LOCK_$(DEVICE))

# The stamp holds the folder that was installed from. Not only its date counts:
# a moved or copied tree would import from the old place, and an upgrade of the
# system can take away the Python below .venv.
SETUP_AGAIN := $(shell \
  { test "$(LOCK)" = "$(LOCK_$(CHOSEN))" && test -x $(VENV_PYTHON) \
  && test "$$(cat $(STAMP))" = "$$(pwd -P)"; } 2> /dev/null || echo FORCE)

help:
	@echo 'make setup    make .venv, or update it (the others do so by themselves)'
	@echo '              DEVICE=tpu or cuda: with the JAX for it; DEVICE=cpu: back'
	@echo 'make train    train with ConAdv on the embedded digits data'
	@echo "make test     run the tests, e.g. make test PYTEST_ARGS='-k mesh'"
	@echo 'make lint     check style and formatting'
	@echo 'make format   format the code, fix what can be fixed'
	@echo 'make lock     remake the three locks (LOCK_ARGS=--upgrade: newest)'
	@echo 'make clean    delete .venv, builds and caches; runs/ stays'

setup: $(STAMP)

# The stamp goes first and comes back last: an interrupted install starts again,
# for the same device. For another device .venv is emptied first, as what only the
# old one needs, such as libtpu, would stay.
#
# uv installs in seconds what takes pip a minute; pip is the way out where uv
# has no build or does not know the package index that pip is set up for. As pip
# does, it compiles to bytecode: where Python may not write that itself, every
# process would compile again what it imports, for seconds.
$(STAMP): $(LOCK) setup.py $(SETUP_AGAIN)
	$(if $(LOCK),,$(error DEVICE=$(DEVICE): must be cpu, tpu or cuda))
	@echo 'Setting up .venv with the versions in $(LOCK) ...'
	@$(if $(filter $(DEVICE),$(CHOSEN)),rm -f $(STAMP), \
	  $(VENV_PYTHON) -m venv --clear .venv 2> /dev/null || rm -rf .venv)
	@$(VENV_PYTHON) -c \
	  'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  2> /dev/null \
	|| { python=$$(sh scripts/find_python.sh) && rm -rf .venv \
	  && "$$python" -m venv .venv; }
	@echo $(DEVICE) > $(CHOICE)
	@$(VENV_PYTHON) -m pip --version > /dev/null 2>&1 \
	|| $(VENV_PYTHON) -m ensurepip > /dev/null
	@uv=$$(sed -n 's/^\(uv==[^ ;]*\).*/\1/p' $(LOCK)); \
	{ $(VENV_PYTHON) -m pip install -qq "$$uv" && $(VENV_PYTHON) -m uv \
	  pip install -q --compile-bytecode --python $(VENV_PYTHON) -r $(LOCK); } \
	|| { echo 'uv could not install; trying pip (a few minutes) ...'; \
	  $(VENV_PYTHON) -m pip install -q -r $(LOCK); }
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
# part of the result (-q, LOCK_ARGS) in places where uv leaves them out. What the
# locks share has one version: that of requirements.lock.
COMPILE = $(VENV_PYTHON) -m uv pip compile -q --universal --python-version 3.11 \
  --extra dev

lock: $(STAMP)
	@echo 'Remaking the locks ...'
	@$(COMPILE) setup.py -o $(LOCK_cpu) $(LOCK_ARGS) > /dev/null
	@for device in tpu cuda; do \
	  $(COMPILE) --extra $$device -c $(LOCK_cpu) setup.py \
	    -o requirements-$$device.lock $(LOCK_ARGS) > /dev/null || exit; \
	done

clean:
	@echo 'Deleting .venv, builds and caches ...'
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
