.PHONY: setup speedrun test check fix smoke long gpu golden
PRESET ?= cpu
ARGS ?=
python := .venv/bin/python

setup:  ## make .venv and install everything; at once when nothing changed
	@scripts/setup.sh
speedrun: setup  ## the whole pipeline into runs/$(PRESET); continues where it stopped
	@$(python) scripts/speedrun.py --preset $(PRESET) $(ARGS)
test: setup check smoke  ## everything that guards the repo; CI calls this
check: setup  ## the quick part, for daily use
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy chatmodel
	$(python) -m pytest
fix: setup
	$(python) -m ruff check --fix .
	$(python) -m ruff format .
smoke: setup  ## the whole pipeline at its smallest, and the checkpoint without this package
	$(python) -m pytest -m slow
long: setup  ## what CI has no time for
	$(python) -m pytest -m long
gpu: setup  ## tests that need a CUDA device
	$(python) -m pytest -m gpu
golden: setup  ## rewrite tests/golden; read the diff before you commit it
	UPDATE_GOLDEN=1 $(python) -m pytest
