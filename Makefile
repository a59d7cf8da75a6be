# Each target makes the environment it needs on first use; Python 3.10+ and make are enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint docs bench gpu torture fuzz lowest audit package release pretrain clean

demo: $(VENV)/.installed
	$(BIN)/dapt demo --output demo

# In a process a core, each computing with one thread: most of the time goes into starting programs.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, into build/site; warnings are errors. Nothing of it is loaded from elsewhere.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Times a training step and an evaluation, the plain way and ours; ARGS='--help' says what else.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks $(ARGS)

# What only a GPU can tell: nothing is installed or fetched, PYTHON is one that has torch with CUDA.
# Begins no check after 8 minutes; the same command goes on from build/gpu.json.
gpu:
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.gpu --json build/gpu.json $(ARGS)

# Kills, full disks, two at once, hostile files: about half an hour; the summary is build/torture.json.
torture: $(VENV)/.installed-test
	$(BIN)/python tests/torture.py --kills 220 --fuzz 2000 --json build/torture.json

# Each kind of file that strangers may send, for two minutes (SECONDS) under atheris, which needs
# CPython 3.11 to 3.13; finds are kept in tests/corpus.
SECONDS ?= 120
fuzz: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --editable '.[fuzz]'
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

# The tests with the lowest versions that pyproject.toml allows, in an environment of their own
# (6 GB on Linux, where torch brings CUDA along).
lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/pip install --quiet uv
	$(VENV)-lowest/bin/uv pip install --python $(VENV)-lowest/bin/python \
	    --resolution lowest-direct --compile-bytecode --editable '.[test]'
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest --numprocesses auto

# Known vulnerabilities of what 'make test' installed; asks PyPI's database.
audit: $(VENV)/.installed-test
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet pip-audit
	$(BIN)/pip freeze --exclude-editable > $(VENV)-audit/installed.txt
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)-audit/installed.txt

# Wheel and sdist: the demo runs from the wheel alone, outside the checkout, and the sdist's tests
# are whole.
package:
	rm -rf build/package && mkdir -p build/package
	$(PYTHON) -m venv build/package/venv
	build/package/venv/bin/pip install --quiet build
	build/package/venv/bin/python -m build --outdir build/package/dist .
	build/package/venv/bin/pip install --quiet "$$(echo build/package/dist/*.whl)[test]"
	place=$$(mktemp -d) && python=$$PWD/build/package/venv/bin/python && \
	    tar -xzf build/package/dist/*.tar.gz --strip-components 1 -C $$place && rm -r $$place/src && \
	    cd $$place && $$python -m dapt.cli demo --epochs 2 --output $$place/demo && \
	    $$python -m pytest --collect-only > collected.txt && wc -l collected.txt && rm -r $$place

# Builds, checks and tests what is uploaded, then uploads it: TWINE_PASSWORD is a token of the index.
release: package
	@test -n "$$TWINE_PASSWORD" || { echo "set TWINE_PASSWORD to a token of the index"; exit 2; }
	build/package/venv/bin/pip install --quiet twine
	build/package/venv/bin/twine check --strict build/package/dist/*
	TWINE_USERNAME=__token__ build/package/venv/bin/twine upload --non-interactive build/package/dist/*

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

# pip makes one thing at a time: after the tests' packages, if both are asked for.
$(VENV)/.installed-docs: pyproject.toml | $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-audit build dist demo
