# What a change is made and checked with. `make run` and `make test` need nothing but Python 3.11 or newer.

PYTHON = .venv/bin/python

run: .venv/installed        # serve http://127.0.0.1:8000, and restart when a file changes
	$(PYTHON) main.py --reload

test: .venv/installed       # the specification
	$(PYTHON) -m pytest

test-all: .venv/installed   # that and all other tests, some of which need programs that .ci/run names
	$(PYTHON) -m pytest .

lint: .venv/installed       # style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy .

bench: .venv/installed      # new figures in bench/results.md: Linux with wrk, and nothing else to do
	$(PYTHON) bench/run.py

fuzz: .venv/installed       # random statements, a minute with other numbers each time
	FUZZ_SECONDS=60 $(PYTHON) -m pytest -s pgpipeline/tests/test_fuzz.py

faults: .venv/installed     # break the code on purpose: each fault has to fail its test
	$(PYTHON) tests/faults/run.py

constraints:                # the newest versions of all packages that fit requirements*.txt
	sed -i.old '/^[^#]/d' constraints.txt && rm constraints.txt.old
	python3 -m venv --clear .venv/new && .venv/new/bin/pip install -q -r requirements-ci.txt
	.venv/new/bin/pip freeze >> constraints.txt && rm -r .venv/new

.venv/installed: $(wildcard requirements*.txt) constraints.txt
	python3 -m venv .venv && .venv/bin/pip install -q -r requirements-ci.txt
	touch $@

.PHONY: run test test-all lint bench fuzz faults constraints
