# make demo: from a fresh clone to a checkpoint ported and proven. make test: everything CI runs. make gpu: the part for a GPU.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test gpu check clean

demo: $(STAMP)
	mkdir -p demo
	$(BIN)/python tools/convert.py --ckpt synthetic:efficientdet-d0 --verify --out demo/efficientdet_d0.safetensors

test: check
	$(BIN)/pytest parity_tests -m '' --refusals

# On a machine with a CUDA device: what it computes is right, and how fast it is.
gpu: $(STAMP)
	$(BIN)/pytest parity_tests -m gpu -n 0
	$(BIN)/python tools/bench.py infer --models efficientdet-d0 --batch-sizes 1,64 --device cuda --json > gpu.json

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[tensorflow,test]'
# Both ask for torchvision, which has no build for a PyTorch without CUDA; the tests that use them stand in for it.
	$(BIN)/python -m pip install --quiet --no-deps effdet==0.4.1 timm==1.0.31
	touch $@

clean:
	rm -rf $(VENV) demo
