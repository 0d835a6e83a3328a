# make demo: the whole system on tiny models.
# make check: lint and unit tests.  make test: all tests but the long trials of make soak.
# make bench: training, generation, scoring, pairing and serving against other code, a simulated
# cluster, into benchmarks/.
# make docs: the documentation as a site in build/site, with every link checked.
# They install what they need into .venv; a second call installs nothing.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
# pip compiles on one core; files for other versions of Python are no fault
COMPILE := $(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true
OUT ?= out/demo

.PHONY: demo check test lint audit format docs soak bench clean
.DELETE_ON_ERROR:

demo: .venv/.cpu
	@$(BIN)/wrpo zoo .cache/zoo
	@$(BIN)/wrpo fuse jobs/demo.yaml --set output=$(OUT)

AUDIT := $(BIN)/pip-audit --disable-pip --no-deps -r requirements-cpu.txt -r requirements-dev.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: lint
	@$(PYTEST) -m "not soak" tests/unit --durations=5

test: lint
	@$(PYTEST) -m "not soak" --durations=10

lint: .venv/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/bandit --quiet --recursive --configfile pyproject.toml wrpo_ray docs cluster 2>/dev/null
	@$(AUDIT) --dry-run >/dev/null 2>&1 || $(AUDIT) --dry-run

# Known holes of the pinned packages, by PyPI's database, which it asks over the network. What works
# without one is in `lint`: every line of the requirements is a pin that it can audit.
audit: .venv/.dev
	@$(AUDIT)

format: .venv/.dev
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: .venv/.dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

soak: .venv/.dev
	@$(BIN)/python -m pytest -m soak

bench: .venv/.dev
	@$(BIN)/python -W ignore benchmarks/train.py
	@$(BIN)/python -W ignore benchmarks/sharing.py
	@$(BIN)/python -W ignore benchmarks/kernels.py
	@$(BIN)/python -W ignore benchmarks/data.py
	@$(BIN)/python -W ignore benchmarks/score.py
	@$(BIN)/python -W ignore benchmarks/pairing.py
	@$(BIN)/python -W ignore benchmarks/serve.py
	@$(BIN)/python benchmarks/simulate.py
	@$(BIN)/python -W ignore benchmarks/on_ray.py

clean:
	rm -rf .venv .cache out

.venv/.dev: requirements-dev.txt .venv/.cpu
	@echo "installing test tools ..."
	@$(PIP) -r requirements-dev.txt
	@$(COMPILE)
	@touch $@

.venv/.cpu: requirements-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "error: CPython 3.11 is needed and '$(PYTHON)' is not it; install it, or name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "installing into .venv (about 2 minutes, 3 GB) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -r requirements-cpu.txt
	@$(PIP) --no-build-isolation -e .
	@$(COMPILE)
	@touch $@
