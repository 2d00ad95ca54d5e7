# Everything a person or a machine runs. Each target installs first, once, into a .venv of its own.
#
#   make distill    the main job on the small world: prepare, distil, baseline, evaluate
#   make serve      the student of `make distill` over HTTP, on this machine, until Ctrl-C
#   make test       the tests, but for the long     make test-long  those
#   make check      format, lint, types, layers     make bench      ratios to bare loops
#   make clean      all that these commands made

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

# Ray's workers look up `python` on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Two processes with a pool of threads each are slower than two with one thread each.
export OMP_NUM_THREADS ?= 1
# Ray, W&B and the hub speak to nobody.
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_OFFLINE ?= 1

.PHONY: install distill serve test test-unit test-cluster test-long check format bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("raydistill needs Python >= 3.11: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 --editable '.[dev]'
	touch $@

distill: install
	python jobs/prepare.py --config jobs/tiny/prepare.yaml
	python jobs/distill.py --config jobs/tiny/distill.yaml
	python jobs/distill.py --config jobs/tiny/single.yaml
	python jobs/evaluate.py --config jobs/tiny/evaluate.yaml

# Without a student there, one is distilled first.
serve: install
	test -f runs/tiny/dual/student/student.json || { python jobs/prepare.py --config jobs/tiny/prepare.yaml && \
		python jobs/distill.py --config jobs/tiny/distill.yaml; }
	python jobs/export.py --config jobs/tiny/export.yaml
	sh serve/tiny.sh

test: test-unit test-cluster

test-unit: install
	python -m pytest -n 2 --dist loadfile tests/unit tests/property

# Two files at a time, the longest first: each test starts processes of its own, and waits for them half of its time.
CLUSTER := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10 \
	$(wildcard tests/e2e/test_main_job.py tests/e2e tests/distributed tests/device)

test-cluster: install
	$(CLUSTER) -m "not long"

test-long: install
	$(CLUSTER) -m long

check: install
	ruff format --check --diff --quiet .
	ruff check .
	pyright --warnings
	lint-imports --no-logo

format: install
	ruff format .
	ruff check --fix .

bench: install
	for file in tests/bench/bench_*.py; do python $$file || exit 1; done

clean:
	rm -rf build dist runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
