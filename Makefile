# Everything here works on a fresh clone: .venv is made, and filled, by itself.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test demo bench clean

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --numprocesses auto --dist worksteal

demo: .venv/installed
	$(BIN)/python demo/run.py

bench: .venv/installed
	$(BIN)/python benchmarks/run.py

.venv/installed: pyproject.toml setup.py constraints.txt specnorm_fx/cpu_kernels.c
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build specnorm_fx/*.so
