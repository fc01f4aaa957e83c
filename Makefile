# make demo   train, convert and compare on real digits: about two minutes after the first install
# make test   every test
# Each makes .venv by itself; what it holds is installed again only when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)

.PHONY: demo test

demo: .venv/installed-demo
	.venv/bin/python pipelines/demo.py

test: .venv/installed-dev  # one thread per worker: more of them than cores wait for each other
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

.venv/installed-demo: extras = trt,hf,open-clip,demo
.venv/installed-dev: extras = trt,hf,open-clip,genai,dev
.venv/installed-demo .venv/installed-dev: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable ".[$(extras)]"
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
