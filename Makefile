# setup | native | check | test | test-arm | test-sanitize | wheel | bench | demo | clean. Needs Python >= 3.10 (PYTHON=...) and a C++20 compiler; nothing else.
# A plain `pip install torch` may bring a CUDA build of several GB: the CPU build is taken where the index offers one.

PYTHON ?= python3
# Processes that run tests at a time, with one thread each (a test that is about threads asks for more); about 1.5 GB each.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
TORCH := torch==2.13.0
BUILD_TOOLS := scikit-build-core cmake ninja
SOURCES := $(wildcard csrc/*) CMakeLists.txt
LIBRARY_STAMP := $(VENV)/.native
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup native check test test-arm test-sanitize wheel bench demo clean

# The virtual environment with torch and the build tools; torch first, so that nothing else chooses its version.
$(VENV)/.tools:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) $(BUILD_TOOLS)
	touch $@

# The package, editable, with the extras that the tests and the demo need; builds the native library too.
$(VENV)/.package: $(VENV)/.tools pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP_INSTALL) --no-build-isolation -e '.[dev,demo,hf,onnx]'
	touch $@ $(LIBRARY_STAMP)

$(VENV)/.demo: $(VENV)/.tools pyproject.toml
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP_INSTALL) --no-build-isolation -e '.[demo]'
	touch $@ $(LIBRARY_STAMP)

# Rebuilds the library inside the tree when a source is newer than the last build.
$(LIBRARY_STAMP): $(SOURCES) | $(VENV)/.tools
	$(BIN)/cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/ninja -C build/native
	touch $@

setup: $(VENV)/.package

native: $(LIBRARY_STAMP)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup native
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

# The Arm kernels, cross-compiled and under user-mode emulation; says which Debian packages are missing.
test-arm: $(VENV)/.tools
	$(BIN)/python tests/native/run.py arm

# This machine's kernels under the address and undefined-behaviour sanitizers.
test-sanitize: $(VENV)/.tools
	$(BIN)/python tests/native/run.py sanitize

# One wheel for every Python >= 3.10 and torch >= 2.10 on this platform, in dist/.
wheel: $(VENV)/.tools
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps --wheel-dir dist .

# The peers that benchmarks time narrowcast against; ggml is used where NARROWCAST_GGML names a build of it.
$(VENV)/.bench: $(VENV)/.package
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP_INSTALL) --no-build-isolation -e '.[bench]'
	touch $@ $(LIBRARY_STAMP)

# The peers of the low-bits table, in an environment of their own; the constraint keeps each of them from replacing torch.
$(PEERS)/.peers: pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	echo '$(TORCH)' > $(PEERS)/constraints.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(BUILD_TOOLS)
	PATH="$(CURDIR)/$(PEERS)/bin:$$PATH" $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint $(PEERS)/constraints.txt --no-build-isolation -e '.[peers,demo,hf]'
	touch $@

bench: $(VENV)/.bench $(PEERS)/.peers native
	NARROWCAST_PEERS_PYTHON=$(CURDIR)/$(PEERS)/bin/python $(BIN)/python -m benchmarks

demo: $(VENV)/.demo native
	$(BIN)/narrowcast demo

clean:
	rm -rf build dist $(VENV)/.package $(VENV)/.demo $(VENV)/.bench $(PEERS)/.peers $(LIBRARY_STAMP)
	rm -f src/narrowcast/kernels/*.so src/narrowcast/kernels/*.dll
