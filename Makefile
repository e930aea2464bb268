# The first three start from a machine with Python 3.10+ and make, nothing else; `make help` says what there is.
#
#   PYTHON=…       the Python that .venv is made from
#   PY=python      use the environment you are in (conda, for example) instead of .venv
#   TORCH_INDEX=…  where torch comes from; see tools/setup.sh
#   WORKERS=…      processes that run tests side by side

PY ?= .venv/bin/python
WORKERS ?= 2
USERS_SETUP := $(if $(filter .venv/bin/python,$(PY)),.venv/.installed)
DEVELOPERS_SETUP := $(if $(filter .venv/bin/python,$(PY)),.venv/.installed-dev)
# Packages are installed uncompiled, so that installing is quick; Python compiles once what it imports and keeps that.
# Images of containers often forbid it to, and then every process takes 9 s of a core to import m2f_lab, not 4.
unexport PYTHONDONTWRITEBYTECODE
# Small models run fastest on one thread each, and one thread adds up in the same order everywhere.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(PY) -m pytest -q
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=120 --nbval-sanitize-with=tests/nbval_sanitize.cfg

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help quickstart scenes test lab notebooks lint unit-tests notebook-tests browser-tests slow-tests install lock clean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*  ## ' Makefile | sed -E 's/^([a-z-]+):.*  ## /  make \1\t/' | expand -t 24

quickstart: $(USERS_SETUP) scenes  ## install, draw scenes, train a tiny model, leave a page with pictures
	@$(PY) tools/run_notebooks.py quickstart

scenes: $(USERS_SETUP)  ## draw the sample scenes into data/scenes, unless they are there
	@echo "Drawing the sample scenes, unless they are there"
	@$(PY) -m m2f_lab.scenes

test: unit-tests notebook-tests browser-tests  ## the three below, one after the other; what CI runs

# Work stealing keeps the tests of a file together, so that the models and runs they share are made once.
unit-tests: $(DEVELOPERS_SETUP)  ## pytest and ruff, without notebooks, browser and slow tests
	@$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow" tests --ignore=tests/browser

notebook-tests: $(DEVELOPERS_SETUP) scenes  ## run every notebook and compare with what is committed
	@$(PYTEST) -n $(WORKERS) --dist loadfile $(NBVAL) notebooks

browser-tests: $(DEVELOPERS_SETUP) scenes  ## run notebooks in a real Chromium
	@$(PYTEST) -n $(WORKERS) --dist loadfile tests/browser

slow-tests: $(DEVELOPERS_SETUP)  ## benchmarks in miniature, memory over time, a long training; not part of `make test`
	@$(PYTEST) -n $(WORKERS) --dist worksteal -m slow tests --ignore=tests/browser

lint: $(DEVELOPERS_SETUP)  ## ruff, notebooks included
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

lab: $(USERS_SETUP)  ## open JupyterLab on notebooks/; ARGS="--no-browser --ip=…" for a server
	@$(PY) -m jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) notebooks

notebooks: $(DEVELOPERS_SETUP) scenes  ## run the notebooks and write them back; NOTEBOOKS=… for some of them
	@$(ONE_THREAD) $(PY) tools/run_notebooks.py execute $(NOTEBOOKS)

install: .venv/.installed-dev  ## create .venv with all that developers need
.venv/.installed: pyproject.toml requirements.lock tools/setup.sh
	@PYTHON="$(PYTHON)" sh tools/setup.sh
	@touch $@
.venv/.installed-dev: pyproject.toml requirements.lock tools/setup.sh
	@PYTHON="$(PYTHON)" sh tools/setup.sh dev
	@touch .venv/.installed $@

lock:  ## renew requirements.lock from pyproject.toml; UPGRADE=--upgrade for the newest versions
	@UPGRADE="$(UPGRADE)" PYTHON="$(PYTHON)" sh tools/lock.sh

clean:  ## remove .venv and caches; data and training runs stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache tests/artefacts runs/quickstart
	find . -name __pycache__ -prune -exec rm -rf {} + -o -name .ipynb_checkpoints -prune -exec rm -rf {} +
