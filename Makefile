# make demo   train, convert and compare on real digits, from nothing: about two minutes after the install
# make test   every test
# Both make .venv first; it is installed once, and again when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/.installed-demo
	$(BIN)/python pipelines/demo.py

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2

.venv/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[trt,hf,open_clip,$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv demo
