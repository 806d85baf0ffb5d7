# plainppo. `make` lists the targets. ARGS= adds flags to a recipe: make train ARGS="--steps 100 --seed 1"
ARGS ?=
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train train-smollm2 resume features sharing test assets clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with the pinned requirements; the second call does nothing

$(STAMP): requirements.txt
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt && touch $(STAMP)

train: $(STAMP)  ## train the small review writer to be positive, on a CPU or one GPU
	$(BIN)/python scripts/train.py $(ARGS)

train-smollm2: $(STAMP)  ## the same with SmolLM2-135M, 24 of its 30 layers shared
	$(BIN)/python scripts/make_assets.py --smollm2 && $(BIN)/python scripts/train.py --model_name .cache/smollm2-135m --num_shared_layers 24 --batch_size 16 --steps 40 --learning_rate 1e-4 --eval_prompts 50 $(ARGS)

resume: $(STAMP)  ## RUN=runs/<name>: go on with a run that was killed
	$(BIN)/python scripts/train.py --resume $(RUN) $(ARGS)

features: $(STAMP)  ## measure every feature on the default run; about half an hour on 2 cores
	$(BIN)/python scripts/bench.py features $(ARGS)

sharing: $(STAMP)  ## measure what running the shared layers once per batch saves
	$(BIN)/python scripts/bench.py sharing $(ARGS)

test: $(STAMP)  ## every test
	$(BIN)/python -m pytest -q -rs --timeout 600 tests $(ARGS)

assets: $(STAMP)  ## rebuild the committed models from the data; about an hour on 2 cores
	$(BIN)/python scripts/make_assets.py $(ARGS)

clean:  ## remove .venv and the caches, not runs/
	rm -rf .venv .cache .pytest_cache */__pycache__ __pycache__
