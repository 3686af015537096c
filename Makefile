# make demo       export the shipped model, let it write, time it
# make runner     build the native runner of ExecuTorch packages
# make test       lint, types and the other tests, ONNX packages of the shipped and the test models among them
# make test-devices    the tests of ExecuTorch and Core ML packages, of the runner, and of every architecture's packages
# make quick      the tests that need no export and no exporter: a minute
# make nightly    the tests that say again of other models what these two say of some
# make test-arm   the tests of the runner on ARM
# make benchmarks times looped models beside llama.cpp on a dense one; an hour or more
# make gpu        on a machine with a GPU: what no other machine runs, tests and times, as one report
# make docs       the documents and the API as a site, in build/site; links that lead nowhere are refused
#
# All set up .venv on first use, from the first Python 3.11 to 3.13 found. Choose another:  make test PYTHON=/path/to/python
# On Linux the default torch brings CUDA. For the smaller CPU build give the address of an index of CPU wheels, once:
#   make demo TORCH_INDEX=<address>

PYTHON ?=
TORCH_INDEX ?=
EXTRAS ?= onnx,executorch,coreml,train,hf,knowledge,lancedb,serve,eval,optimum,docs,dev

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
BIN := .venv/bin
STAMP := .venv/installed
MODEL := models/rmse-shakespeare
PACKAGE := build/rmse-shakespeare-onnx.rmse

# The ExecuTorch runner: for this machine, and for 64-bit ARM with a cross compiler and the wheel of that platform.
EXECUTORCH = $(shell $(BIN)/python -c 'import importlib.util as u; print(u.find_spec("executorch").submodule_search_locations[0])')
VERSION = $(shell sed -n 's/^executorch==//p' constraints.txt)
RUNNER := build/native/rmse-runner
ARM := build/native-aarch64
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_WHEEL = $(ARM)/executorch-$(VERSION)

# Marks of tests (pyproject.toml) that make packages for devices, or of every architecture, or build the runner.
DEVICES := packages or executorch or coreml or native or arm or android

# The Android app, and the package inside it: int4 without rounded activations, since the phone's engine does not know that of experts.
APK := build/android/rmse-edge.apk
APK_MODEL := build/android/rmse-shakespeare.rmse.zip

.PHONY: help setup demo runner runner-aarch64 arm-wheel arm-tools apk test test-devices quick nightly test-arm fuzz benchmarks gpu gpu-dry-run docs lint style types clean

help:
	@echo "make demo    export $(MODEL) to ONNX, write some text, time it"
	@echo "make runner  build $(RUNNER), which runs ExecuTorch packages without Python"
	@echo "make runner-aarch64    the same for 64-bit ARM, with $(ARM_CXX)"
	@echo "make apk     build $(APK) with the shipped model in int4; see android_demo/README.md"
	@echo "make test    lint + the tests without packages of ExecuTorch and Core ML"
	@echo "make test-devices    the tests of those, of the runner, and of packages of every architecture"
	@echo "make quick   the tests that need no export and no exporter: a minute"
	@echo "make nightly the tests that both leave out"
	@echo "make test-arm    the runner's tests on 64-bit ARM; fetches the cross compiler and the emulator where it can"
	@echo "make fuzz    thousands of well-sealed but wrong files; hours"
	@echo "make benchmarks  looped models beside llama.cpp on a dense one; an hour or more"
	@echo "make gpu     on a machine with a GPU: its tests and its benchmark, as build/gpu/report.md"
	@echo "make docs    build/site: the documents and the API as pages"
	@echo "make lint    ruff, ruff format --check, mypy"
	@echo "make clean   remove what was built; .venv stays"

setup: $(STAMP)

IN_RANGE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)

$(STAMP): pyproject.toml constraints.txt
	@rm -f $@; python=; \
	for candidate in $(CANDIDATES); do \
	    if $$candidate -c '$(IN_RANGE)' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11 to 3.13 with venv found (tried: $(CANDIDATES)); use make PYTHON=/path/to/python" >&2; \
	    exit 1; \
	fi; \
	if ! { $(BIN)/python -c '$(IN_RANGE)' && $(BIN)/python -m pip --version; } >/dev/null 2>&1; then \
	    echo "Creating .venv with $$python ($$($$python --version)); the first install takes some minutes"; \
	    $$python -m venv --clear .venv; \
	fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -c constraints.txt \
	    $(if $(wildcard .venv/lib/python3*/site-packages/torch),--quiet) \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	@echo "== 1/3  rmse-export: the checkpoint becomes an ONNX package and must say what the PyTorch model says"
	@rm -rf $(PACKAGE); mkdir -p build
	$(BIN)/rmse-export --target onnx -m $(MODEL) -o $(PACKAGE)
	@echo; echo "== 2/3  rmse-run: the package writes"
	$(BIN)/rmse-run $(PACKAGE) --prompt "ROMEO:" --max-new-tokens 240 --seed 1
	@echo; echo "== 3/3  rmse-bench: what stopping early saves"
	$(BIN)/rmse-bench $(PACKAGE)

runner: $(STAMP)
	@$(MAKE) --no-print-directory -j2 -C runtimes/native EXECUTORCH=$(EXECUTORCH) BUILD=$(CURDIR)/build/native

runner-aarch64: $(STAMP)
	@command -v $(ARM_CXX) >/dev/null || { echo "error: no $(ARM_CXX); apt install g++-aarch64-linux-gnu, or set ARM_CXX" >&2; exit 1; }
	@$(MAKE) --no-print-directory arm-wheel
	@$(MAKE) --no-print-directory -C runtimes/native EXECUTORCH=$(CURDIR)/$(ARM_WHEEL)/executorch \
	    BUILD=$(CURDIR)/$(ARM) CXX=$(ARM_CXX)

# The wheel of the other platform: the runner is linked with its libraries and runs with them.
arm-wheel: $(STAMP)
	@test -d $(ARM_WHEEL) || { rm -rf $(ARM)/new && mkdir -p $(ARM)/new && \
	    $(BIN)/python -m pip download --quiet --disable-pip-version-check --retries 1 --no-deps --only-binary :all: \
	        --platform manylinux_2_28_aarch64 --python-version 311 --dest $(ARM)/new executorch==$(VERSION) && \
	    $(BIN)/python -m zipfile -e $(ARM)/new/executorch-$(VERSION)-*.whl $(ARM)/new/unpacked && \
	    mv $(ARM)/new/unpacked $(ARM_WHEEL) && rm -r $(ARM)/new; }

apk: $(STAMP) $(APK_MODEL)
	@PYTHON=$(BIN)/python android_demo/build_apk.sh -m $(APK_MODEL) -o $(APK)

$(APK_MODEL): $(MODEL)/model.safetensors $(MODEL)/config.json | $(STAMP)
	@mkdir -p $(@D)
	$(BIN)/rmse-export --target onnx -m $(MODEL) --quant int4 --accuracy-level 0 --calibrate $(MODEL)/sample.txt \
	    --archive --force -o $@

arm-tools: $(STAMP)
	@.ci/arm-tools

# Two processes at a time. tests/conftest.py says which tests stay together, since they share exports, and which come first.
test: lint
	$(BIN)/pytest -n 2 -m "not nightly and not ($(DEVICES))"

# More than half of the time of all: lowering a model of a few thousand weights takes half a minute.
test-devices: $(STAMP)
	$(BIN)/pytest -n 2 -m "not nightly and ($(DEVICES))"

# What is said again of other models: packages of the suite that those two leave out.
nightly: $(STAMP)
	$(BIN)/pytest -n 2 -m nightly

# What is marked slow is left out, and files of nothing else are not even imported (tests/conftest.py).
quick: $(STAMP)
	$(BIN)/pytest -n 2 -m "not slow"

test-arm: arm-tools
	$(BIN)/pytest -m arm

# Hours: docs/robustness.md. One subject alone: make fuzz FUZZ="onnx -n 200 --seed 7"
fuzz: runner
	$(BIN)/python -m tests.fuzz $(FUZZ)

# An hour or more, most of it once: docs/benchmarks.md. One model alone: make benchmarks BENCHMARKS="--models dense -t 1"
benchmarks: runner
	$(BIN)/python -m benchmarks $(BENCHMARKS)

# A GPU's tests and its benchmark: docs/cuda.md. A failed test does not keep the benchmark from running; the report says so.
GPU_MODELS ?= models/rmse-shakespeare models/ouro-shakespeare
GPU_FLAGS ?= --config docs/benchmarks/d768.json
gpu: $(STAMP)
	@mkdir -p build/gpu
	-$(BIN)/pytest -m gpu --junitxml build/gpu/tests.xml
	$(BIN)/python -m benchmarks.gpu $(GPU_MODELS) $(GPU_FLAGS) --tests build/gpu/tests.xml \
	    --json build/gpu/report.json --markdown build/gpu/report.md

# Every recording of these models, built from shapes alone: on any machine.
gpu-dry-run: $(STAMP)
	$(BIN)/python -m benchmarks.gpu --dry-run $(GPU_MODELS)

# The API is read from the package as it is installed, in build/site-lib, since its folders are mapped.
docs: $(STAMP)
	@$(BIN)/python docs/site/gather.py
	@rm -rf build/lib build/bdist.* build/site-lib
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --target build/site-lib .
	@rm -rf build/lib build/bdist.*
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -f docs/site/mkdocs.yml

lint: style types

style: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy sees the package as it is installed, in build/types; its messages are turned back to the source folders.
types: $(STAMP)
	@rm -rf build/lib build/bdist.* build/types
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --target build/types .
	@rm -rf build/lib build/bdist.*
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p rmse_edge \
	    | sed -E 's,^rmse_edge/(export|runtimes|quantize)/,\1/,'

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find rmse_edge export runtimes quantize benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
