# Each target makes the environment it needs on first use; Python 3.10+ and make are enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint torture lowest pretrain clean

demo: $(VENV)/.installed
	$(BIN)/dapt demo --output demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Kills, full disks, two at once, hostile files: about half an hour; the summary is build/torture.json.
torture: $(VENV)/.installed-test
	$(BIN)/python tests/torture.py --kills 220 --fuzz 2000 --json build/torture.json

# The tests with the lowest versions that pyproject.toml allows, in an environment of their own.
lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet uv
	$(VENV)-lowest/bin/uv pip install --python $(VENV)-lowest/bin/python \
	    --resolution lowest-direct --editable '.[tensorboard]' 'hypothesis>=6.100' 'pytest>=8.0' \
	    'pytest-timeout>=2.3'
	$(VENV)-lowest/bin/python -m pytest

# Trains the bundled backbone anew, about 65 minutes on two cores; needs npm, see pretrain/README.md.
pretrain: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[pretrain]'
	$(BIN)/python pretrain/run.py --out build/pretrain --install

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist demo
