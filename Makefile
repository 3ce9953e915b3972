# Two commands: `make quickstart` and `make test`. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait by spinning slow a busy machine down several times.
export OMP_WAIT_POLICY ?= PASSIVE
STAMP := .venv/.installed
# What `make setup` installs, by version and hash. `make setup LOCK=` takes what pip finds: for another build of PyTorch.
LOCK ?= requirements.lock
# that run tests side by side
PROCESSES ?= 2
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Tests of `make test-fast` and `make coverage`: what needs one process and little time.
FAST := -m "not slow and not slurm and not processes" $(addprefix tests/,config data data_tools generation images \
	models objective reports teachers tokenizer weights pretrain/test_parts.py runtime/test_failures.py \
	evaluation/test_formulas.py test_foundations.py test_layers.py test_log.py test_public_api.py)

# The images of `make toy-study` and `make ablation`, in MNIST's format (Debian and Ubuntu: apt-get install
# dataset-fashion-mnist).
FASHION ?= /usr/share/datasets/fashion-mnist
TOY := data/fashion-32
TWELVE := data/fashion-12k
ABLATION := runs/ablation/fashion
# Further words for `mepa ablate`.
ABLATE ?=

.PHONY: setup lock licences quickstart toy-study ablation test test-fast lint types coverage mutants docs reference clean-quickstart

# pip comes first: one older than 25.3 cannot hold what packages are built with (setuptools, for DeepSpeed) to hashes.
setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@echo "installing into .venv (PyTorch and all: some minutes, about 6 GB)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: %s is Python %d.%d, but 3.10 or newer is needed; name another one: make PYTHON=python3.12" % (sys.executable, *sys.version_info[:2]))'
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if [ -z "$(LOCK)" ] || ! $(BIN)/python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then \
		echo "without hashes: $(if $(LOCK),$(LOCK) is for Python 3.10 to 3.13,LOCK is empty); pip takes the newest that fits"; \
		$(PIP) install --editable '.[dev]'; \
	else \
		echo "by version and hash: $(LOCK) (make setup LOCK= for another build of PyTorch)"; \
		awk '/^pip==/ {on = 1} on; on && !/\\$$/ {exit}' $(LOCK) > .venv/pip.lock && \
		$(PIP) install --require-hashes --requirement .venv/pip.lock && \
		PIP_BUILD_CONSTRAINT=$(LOCK) $(PIP) install --require-hashes --requirement $(LOCK) && \
		$(PIP) install --no-deps --no-build-isolation --no-index --editable .; \
	fi
	touch $(STAMP)

# requirements.lock anew: the newest releases that pyproject.toml allows, for all Pythons and systems that it is for.
lock: setup
	$(PIP) install '.[lock]'
	rm -f requirements.lock
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
		--no-annotate --no-emit-index-url --no-emit-find-links --extra dev --group build \
		--output-file requirements.lock pyproject.toml

# The licences of what is installed: docs/licences.md.
licences: setup
	$(BIN)/python docs/tools/licences.py

quickstart: setup
	$(BIN)/mepa quickstart

# A scaling study on two cores (docs/scaling.md). Stopped and started again, it goes on.
toy-study: setup
	@test -d $(FASHION) || { echo "error: no $(FASHION); install dataset-fashion-mnist, or name its directory: make toy-study FASHION=DIR"; exit 1; }
	$(BIN)/python -m mepa_ds.data_tools.build_shards idx --out $(TOY)/train \
		--images $(FASHION)/train-images-idx3-ubyte.gz --labels $(FASHION)/train-labels-idx1-ubyte.gz
	$(BIN)/python -m mepa_ds.data_tools.build_shards idx --out $(TOY)/heldout \
		--images $(FASHION)/t10k-images-idx3-ubyte.gz --labels $(FASHION)/t10k-labels-idx1-ubyte.gz
	$(BIN)/mepa train-tokenizer recipes/studies/toy_tokenizer.yaml
	$(BIN)/python -m mepa_ds.data_tools.precompute tokens $(TOY)/train --tokenizer runs/studies/toy/tokenizer
	$(BIN)/python -m mepa_ds.data_tools.precompute tokens $(TOY)/heldout --tokenizer runs/studies/toy/tokenizer
	$(BIN)/mepa scale run recipes/studies/toy.yaml --jobs 2
	$(BIN)/mepa scale report recipes/studies/toy.yaml

# What each part of MEPA is worth, on two cores within an hour (docs/ablation.md). Stopped and started again, it goes on.
ablation: setup
	@test -d $(FASHION) || { echo "error: no $(FASHION); install dataset-fashion-mnist, or name its directory: make ablation FASHION=DIR"; exit 1; }
	$(BIN)/python -m mepa_ds.data_tools.build_shards idx --first 12000 --out $(TWELVE)/train \
		--images $(FASHION)/train-images-idx3-ubyte.gz --labels $(FASHION)/train-labels-idx1-ubyte.gz
	$(BIN)/python -m mepa_ds.data_tools.build_shards idx --first 2000 --out $(TWELVE)/heldout \
		--images $(FASHION)/t10k-images-idx3-ubyte.gz --labels $(FASHION)/t10k-labels-idx1-ubyte.gz
	$(BIN)/mepa train-tokenizer recipes/ablation/fashion_tokenizer.yaml
	$(BIN)/python -m mepa_ds.data_tools.precompute tokens $(TWELVE)/train --tokenizer $(ABLATION)/tokenizer
	$(BIN)/python -m mepa_ds.data_tools.precompute tokens $(TWELVE)/heldout --tokenizer $(ABLATION)/tokenizer
	$(BIN)/python -m mepa_ds.data_tools.precompute fit-teacher contrastive $(TWELVE)/train --out $(ABLATION)/contrastive \
		--grid-side 8 --pixels-per-cell 4 --max-images 12000
	$(BIN)/python -m mepa_ds.data_tools.precompute features $(TWELVE)/train --teacher contrastive \
		--weights $(ABLATION)/contrastive
	$(BIN)/python -m mepa_ds.data_tools.precompute fit-teacher patch-pca $(TWELVE)/train --out $(ABLATION)/patch-pca \
		--grid-side 8 --pixels-per-cell 4 --window 8
	$(BIN)/mepa evaluate --fit-classifier $(TWELVE)/train --heldout $(TWELVE)/heldout --out $(ABLATION)/classifier
	$(BIN)/mepa ablate recipes/ablation/fashion.yaml --jobs 2 $(ABLATE)

test: setup lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES)

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) $(FAST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# The documentation as a site, in build/site; a link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The pages that are written from the code: commands and recipe keys.
reference: setup
	$(BIN)/python docs/tools/reference.py

# Lines of the package that the fast tests do not reach.
coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --cov --cov-report=term-missing:skip-covered $(FAST)

# Alters core modules, one expression at a time, in a copy (mutants/), and counts what their tests notice.
mutants: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mutants]'
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(PROCESSES)
	$(BIN)/mutmut results

clean-quickstart:
	rm -rf runs/quickstart data/digits-32 data/digits-32.*
