# plainppo. `make` lists the targets. ARGS= adds flags to a recipe: make train ARGS="--steps 100 --seed 1"
ARGS ?=
PYTHON ?= python3
# NUM_PROCESSES= processes of all machines together; default: one per GPU, or 2 on the CPU where there is none.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
NUM_PROCESSES ?= $(if $(filter 0,$(GPUS)),2,$(GPUS))
# Several machines: the same command on each, with its MACHINE_RANK (0, 1, ...) and the address of machine 0.
NUM_MACHINES ?= 1
MACHINE_RANK ?= 0
MAIN_ADDRESS ?= 127.0.0.1
MAIN_PORT ?= 29500
# Seconds that a launcher gives its processes to finish a step and save it after Ctrl-C or SIGTERM; its own default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 600
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train train-smollm2 train-multi-gpu train-zero1 train-zero2 train-zero3 train-multi-node resume watch fluency features sharing stages \
	bench levers profile test test-long test-gpu assets clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1|/' | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with the pinned requirements; the second call does nothing

$(STAMP): requirements.txt
	$(PYTHON) -m venv .venv && $(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt && touch $(STAMP)

train: $(STAMP)  ## train the small review writer to be positive, on a CPU or one GPU
	$(BIN)/python scripts/train.py $(ARGS)

train-smollm2: $(STAMP)  ## the same with SmolLM2-135M, 24 of its 30 layers shared
	$(BIN)/python scripts/make_assets.py --smollm2 && $(BIN)/python scripts/train.py --model_name .cache/smollm2-135m --num_shared_layers 24 --batch_size 16 --steps 40 --ppo_epochs 2 --learning_rate 3e-4 --init_kl_coef 0.01 --eval_prompts 50 $(ARGS)

LAUNCH = $(BIN)/accelerate launch --config_file scripts/accelerate_configs

train-multi-gpu: $(STAMP)  ## NUM_PROCESSES GPUs of this machine, or CPU processes where there is none
	$(LAUNCH)/$(if $(filter 0,$(GPUS)),multi_cpu,multi_gpu).yaml --num_processes $(NUM_PROCESSES) scripts/train.py $(ARGS)

train-zero1: $(STAMP)  ## the same, the optimizer's state shared out (DeepSpeed ZeRO-1)
	$(LAUNCH)/deepspeed_zero1.yaml --num_processes $(NUM_PROCESSES) scripts/train.py $(ARGS)

train-zero2: $(STAMP)  ## and the gradients (ZeRO-2)
	$(LAUNCH)/deepspeed_zero2.yaml --num_processes $(NUM_PROCESSES) scripts/train.py $(ARGS)

train-zero3: $(STAMP)  ## and the weights (ZeRO-3)
	$(LAUNCH)/deepspeed_zero3.yaml --num_processes $(NUM_PROCESSES) scripts/train.py $(ARGS)

train-multi-node: $(STAMP)  ## NUM_MACHINES= MACHINE_RANK= MAIN_ADDRESS=, on each machine
	$(LAUNCH)/multi_node.yaml --num_machines $(NUM_MACHINES) --machine_rank $(MACHINE_RANK) --main_process_ip $(MAIN_ADDRESS) --main_process_port $(MAIN_PORT) --num_processes $(NUM_PROCESSES) scripts/train.py $(ARGS)

resume: $(STAMP)  ## RUN=runs/<name>: go on with a run that was killed
	$(BIN)/python scripts/train.py --resume $(RUN) $(ARGS)

watch: $(STAMP)  ## RUN=runs/<name>: write its report.html again every few seconds, for a browser that stays open
	$(BIN)/python scripts/report.py $(RUN) --watch

fluency: $(STAMP)  ## how English the default policy writes before and after PPO, by SmolLM2; trains three seeds
	$(BIN)/python scripts/fluency.py $(ARGS)

features: $(STAMP)  ## measure every feature on the default run; 6 to 12 minutes on 2 cores
	$(BIN)/python scripts/bench.py features $(ARGS)

sharing: $(STAMP)  ## measure what running the shared layers once per batch saves
	$(BIN)/python scripts/bench.py sharing $(ARGS)

stages: $(STAMP)  ## measure 1 process, DDP and ZeRO-1, 2, 3 on 2 CPU processes
	$(BIN)/python scripts/bench.py stages $(ARGS)

bench: $(STAMP)  ## TRL 0.11.4 (goes into .peer), plain and fast trainer, on a GPU if there is one: time and memory
	$(BIN)/python scripts/bench.py speed $(ARGS)

levers: $(STAMP)  ## what each lever of speed.py saves: the fast trainer with this lever alone switched off
	$(BIN)/python scripts/bench.py levers $(ARGS)

profile: $(STAMP)  ## the five operations that take most of a step, now and by the plain path
	$(BIN)/python scripts/bench.py profile $(ARGS)

test: $(STAMP)  ## every test but those of test-long
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --timeout 600 -m "not long and not gpu" tests $(ARGS)

test-long: $(STAMP)  ## DeepSpeed, the README's launches, kills, full disks, a soak; compiles an operator the first time
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --timeout 600 -m long tests $(ARGS)

test-gpu: $(STAMP)  ## the tests that need a GPU, under 10 minutes; without one each is skipped and the reason printed
	PLAINPPO_GPU_TESTS_ON=$${PLAINPPO_GPU_TESTS_ON:-cuda} $(BIN)/python -m pytest -q -rs -s --timeout 300 tests/test_gpu.py $(ARGS)

assets: $(STAMP)  ## rebuild the committed models from the data; some three hours on 2 cores
	$(BIN)/python scripts/make_corpus.py && $(BIN)/python scripts/make_assets.py && $(BIN)/python scripts/polish_writer.py

clean:  ## remove .venv, .peer and the caches, not runs/
	rm -rf .venv .peer .cache .pytest_cache */__pycache__ __pycache__
