PYTHON ?= python3
PY := .venv/bin/python
.DEFAULT_GOAL := help

.PHONY: help demo test lint clean

help:
	@echo "make demo   distil a student on the handwritten digits and test it (under four minutes on two cores)"
	@echo "make test   run all tests (about nine minutes on two cores)"
	@echo "make lint   check style and formatting"

.venv/installed: requirements.txt requirements-extra.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --requirement requirements.txt --requirement requirements-extra.txt
	touch $@

demo: .venv/installed
	$(PY) -m tools.demo

# Tests of a GPU are skipped where there is none; all others run on the CPU.
# The tests' networks are small: two processes of one thread each are faster than one process of two threads.
test: .venv/installed
	$(PY) -m pytest -m cuda $$(grep -l mark.cuda tests/test_*.py)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
