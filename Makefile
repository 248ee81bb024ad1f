# Everything a newcomer needs: `make serve` and `make test`. CI calls the same targets.
# `make image` takes docker, nothing else does.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVING := $(VENV)/.serving
EXTRAS ?= dev
TESTING := $(VENV)/.testing-$(EXTRAS)
PRESET ?= tamiyo-v1
ARTIFACT := artifacts/$(PRESET)
HOST ?= 127.0.0.1
PORT ?= 8000
REPLICAS ?=
REHEARSE ?=
TARGET ?= cuda
IMAGE ?= tamiyo-serve:$(TARGET)
DOCKER ?= docker

.PHONY: help install serve cluster test check image test-image test-gpu format lock clean

help:
	@echo "make serve    install, export a default policy if there is none, serve it on $(HOST):$(PORT);"
	@echo "              PRESET=tamiyo-v2: esper-lite's policy of today instead of V1"
	@echo "make cluster  the same on all cores, a service on each behind HAProxy; REPLICAS=2: on two"
	@echo "make test     install, run every check and test; EXTRAS=dev,heavy,ray: with other programs too"
	@echo "make check    formatting, lint and types only"
	@echo "make image    build the image for GPU hosts with docker; TARGET=cpu: the small one without torch"
	@echo "make test-image   run the tests of tests/image against the image TARGET=cpu with docker"
	@echo "make test-gpu     run the tests of tests/gpu on a GPU, or skip them; REHEARSE=1: on the CPU, as far as that goes"
	@echo "make format   rewrite the sources as the formatter wants them"
	@echo "make lock     re-pin constraints.txt from pyproject.toml, in a fresh environment"
	@echo "make clean    remove the environment, the default artifacts and all caches"

# What serving and exporting take, and nothing else: a newcomer's first minute.
$(SERVING): pyproject.toml client/pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tamiyo-serve needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable client --editable '.[torch]'
	@touch $@

$(TESTING): $(SERVING)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[torch,$(EXTRAS)]'
	@touch $@

install: $(SERVING)

$(ARTIFACT)/manifest.json: | $(SERVING)
	$(BIN)/python -m export --preset $(PRESET) --seed 0 --formats onnx --output $(ARTIFACT)

serve: $(SERVING) $(ARTIFACT)/manifest.json
	$(BIN)/python -m service --artifact $(ARTIFACT) --host $(HOST) --port $(PORT)

cluster: $(SERVING) $(ARTIFACT)/manifest.json
	HOST=$(HOST) PORT=$(PORT) REPLICAS=$(REPLICAS) PYTHON=$(BIN)/python deploy/cluster.sh --artifact $(ARTIFACT)

check: $(TESTING)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/hadolint --failure-threshold warning Dockerfile
	$(BIN)/shellcheck .ci/run .ci/image deploy/verify.sh deploy/cluster.sh examples/curl.sh
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml compose.gpu.yaml compose.cluster.yaml
	$(BIN)/kubernetes-validate --strict --quiet deploy/kubernetes/*.yaml

# On as many cores as there are, up to four: a file's tests share servers, and stay together.
test: check
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

image:
	$(DOCKER) build --target $(TARGET) --tag $(IMAGE) \
	  --build-arg REVISION="$$(git rev-parse HEAD 2>/dev/null)" \
	  --build-arg SOURCE="$$(git config --get remote.origin.url 2>/dev/null | sed 's#//[^/@]*@#//#')" .

test-image: $(TESTING)
	IMAGE=tamiyo-serve:cpu ENGINE=$(DOCKER) $(BIN)/python -m pytest -m image tests/image

# Without a GPU they say so and are skipped.
test-gpu: $(TESTING)
	$(BIN)/python -m pytest -m gpu $(if $(REHEARSE),--rehearse) tests/gpu

format: $(TESTING)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Local version labels (torch 2.13.0+cpu) are dropped: which build of torch a machine gets is its
# own pip configuration's choice, and every build pins the CUDA libraries it needs itself.
lock:
	rm -rf .lock && $(PYTHON) -m venv .lock
	.lock/bin/pip install --quiet 'torch==2.13.0' && .lock/bin/pip install --quiet --editable client --editable '.[torch,dev,heavy,ray]'
	{ echo "# Every package of the environment, pinned. Made by 'make lock'."; \
	  .lock/bin/pip freeze --all --exclude-editable --exclude pip | sed 's/+[a-z0-9.]*$$//'; } > constraints.txt
	rm -rf .lock

clean:
	rm -rf $(VENV) artifacts/tamiyo-v1 artifacts/tamiyo-v2 build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
