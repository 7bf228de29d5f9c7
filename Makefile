# From nothing but make and Python to a trained model: `make demo`. Needs a POSIX shell (Linux, macOS, WSL).
# Works in a path with spaces: every path is quoted, and no target is a file.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
VERSIONS ?= 5.19.0 newest

# The environment is ours alone: nothing from the user's site-packages or PYTHONPATH is seen in it.
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME

# Given on the command line or in the environment, PYTHON is obeyed even if it means to make the environment anew.
CHOSEN := $(if $(filter file default undefined,$(origin PYTHON)),,--python-chosen)
ENVIRONMENT = @command -v "$(PYTHON)" >/dev/null || { \
	echo "There is no '$(PYTHON)' here. Install Python 3.10 or later, or name yours: make $@ PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	MAKE_TARGET=$@ "$(PYTHON)" -I scripts/bootstrap.py --venv "$(VENV)" $(CHOSEN)
RUN = "$(VENV)/bin/python"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv demo test test-slow test-versions style format clean distclean

help:
	@echo "make demo       train and evaluate a small model on the embedded data"
	@echo "make test       style and tests, without those marked slow (ARGS='-k packing' is passed to pytest)"
	@echo "make test-slow  the tests marked slow; they take minutes, and some need the network"
	@echo "make test-versions  the model's tests on the oldest and the newest transformers (VERSIONS='$(VERSIONS)')"
	@echo "make style      ruff check and ruff format --check"
	@echo "make format     let ruff repair what it can"
	@echo "make venv       only make the environment"
	@echo "make clean      remove caches and build leftovers; make distclean: the environment, too"
	@echo
	@echo "All of them work in a virtual environment of their own, made on the first call."
	@echo "  PYTHON=python3.12   the Python to make it with (3.10 or later; now: $(PYTHON))"
	@echo "  VENV=/disk/env      where to make it (now: $(VENV))"
	@echo "  PIP_INDEX_URL=..., PIP_EXTRA_INDEX_URL=..., PIP_CACHE_DIR=..., TMPDIR=...   are read by pip"
	@echo
	@echo "On Linux, PyPI's torch is the CUDA build: 2.7 GB of downloads. Without a GPU take the CPU build:"
	@echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"

venv:
	$(ENVIRONMENT)

demo:
	$(ENVIRONMENT)
	@$(RUN) -m scripts.demo $(ARGS)

test:
	$(ENVIRONMENT) --extras test,data
	@$(RUN) -m pytest $(ARGS)

test-slow:
	$(ENVIRONMENT) --extras test,data
	@$(RUN) -m pytest -m slow $(ARGS)

# Each version has a light environment inside ours, which it sees through a .pth file: only what differs is installed.
test-versions:
	$(ENVIRONMENT) --extras test,data
	@set -e; where="import sysconfig; print(sysconfig.get_path('purelib'))"; \
	for version in $(VERSIONS); do \
		light="$(VENV)/versions/$$version"; wanted="transformers==$$version"; \
		if [ "$$version" = newest ]; then wanted="transformers<6"; fi; \
		$(RUN) -m venv --clear "$$light"; \
		$(RUN) -c "$$where" > "$$("$$light/bin/python" -c "$$where")/base.pth"; \
		"$$light/bin/python" -m pip install --quiet --upgrade "$$wanted"; \
		"$$light/bin/python" -c "import transformers; print('$$version: transformers', transformers.__version__, flush=True)"; \
		"$$light/bin/python" -m pytest tests/test_versions.py tests/test_generation.py tests/test_loading.py $(ARGS); \
	done

style:
	$(ENVIRONMENT) --extras test,data
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format:
	$(ENVIRONMENT) --extras test,data
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

clean:
	@find . -name .git -prune -o -path "./$(VENV)" -prune -o -type d \
		\( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache -o -name .hypothesis -o -name '*.egg-info' \) \
		-prune -exec rm -rf {} +
	@rm -rf build dist

distclean: clean
	@if [ -f "$(VENV)/minivlm-stamp.json" ] || [ -f "$(VENV)/minivlm-unfinished" ]; then rm -rf "$(VENV)"; fi
	@rm -rf "$(VENV).lock" "$(VENV).old"
