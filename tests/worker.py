"""One rank of a test run: it does one job after the other, each on its share of a fixed ragged batch, and writes what it found.

    python worker.py OUT '[{"name": "sgd", "do": "train", ...}, ...]'       # writes OUT-<name>-<rank>.json and .safetensors
Started alone, by torch.distributed.run or by accelerate launch. One start for many jobs: starting takes longer than the jobs.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
import optim
from ppo_core import PPOConfig, PPOTrainer
from test_ppo_core import ragged, tiny, tokenizer

TOTAL = 8
LENGTHS, QUERIES = (1, 7, 3, 5, 0, 9, 2, 4), (2, 6, 3, 4, 5, 2, 3, 6)
RATES = {"sgd": 0.05, "adam": 1e-3, "lion": 1e-3, "adam8bit": 1e-3}


def make_optimizer(name, model):
    if name == "adam8bit":
        from bitsandbytes.optim import Adam8bit
        return Adam8bit(model.parameters(), lr=RATES[name])
    optimizer = optim.make_optimizer(name, model.parameters(), RATES[name])
    for group in optimizer.param_groups:
        if name == "adam":
            group["eps"] = 1e-6      # some gradients are 0 but for rounding (a key's bias), and Adam makes them steps of full size
    return optimizer


def make(settings, optimizer="sgd", shared=None):
    AcceleratorState._reset_state(reset_partial_state=True)     # each job is a run of its own
    accelerator = distributed.start(cpu=True)
    if distributed.zero_stage(accelerator) == 3:                # DeepSpeed keeps what is small whole: all of this model
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    distributed.seed_everything(0)
    model = tiny()
    optimizer = make_optimizer(optimizer, model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = PPOTrainer(PPOConfig(**settings), model, None, tokenizer(), optimizer=optimizer, lr_scheduler=schedule,
                         num_shared_layers=shared, accelerator=accelerator)
    np.random.seed(accelerator.process_index)                   # each rank shuffles its own share
    return trainer


def mine(trainer, items):
    share = TOTAL // trainer.accelerator.num_processes
    return items[trainer.accelerator.process_index * share:][:share]


def step(trainer, seed=0, lengths=LENGTHS):
    """-> the step's statistics that must be the same on every rank."""
    queries, responses, scores = (mine(trainer, part) for part in ragged(lengths, QUERIES, seed))
    stats = trainer.step(queries, responses, scores)
    own = {k: v for k, v in stats.items() if not torch.is_tensor(v) and not k.startswith("time/")}
    return {**own, "objective/kl_dist": stats["objective/kl_dist"].tolist()}


def greedy(trainer, eos=None, batch_size=2):
    queries, *_ = ragged(LENGTHS, QUERIES, seed=7)
    responses = trainer.generate(mine(trainer, queries), batch_size=batch_size, return_prompt=False, max_new_tokens=6, do_sample=False,
                                 allow_other_distribution=True, **({} if eos is None else {"eos_token_id": eos}))
    return [r.tolist() for r in responses]


def weights_of(trainer):
    """-> all weights on the main process, {} elsewhere."""
    state = dict(distributed.full_state_dict(trainer.accelerator, trainer.model))
    state.pop("lm_head.weight", None)                           # tied to the embedding
    return {k: v.detach().clone().contiguous() for k, v in state.items()}


def train(settings, optimizer="sgd", steps=3, lengths=LENGTHS, write_first=False, shared=None, save=None):
    """Three steps on different batches. -> statistics, KL coefficient, and the weights."""
    trainer = make(settings, optimizer, shared)
    found = []
    for seed in range(steps):
        if write_first:
            greedy(trainer)     # a rollout between the updates must leave the sharding as it was
        found.append(step(trainer, seed, lengths))
    if save:
        trainer.save_pretrained(save)
    return {"steps": found, "kl_coef": trainer.kl_ctl.value}, weights_of(trainer)


def skip(settings, optimizer="adam"):
    """A step whose every optimizer step is skipped, then a real one, as if the first had never been."""
    trainer = make({**settings, "ratio_threshold": 1e-9}, optimizer)
    before = weights_of(trainer)
    skipped = step(trainer)
    after = weights_of(trainer)
    trainer.config.ratio_threshold = 10.0
    for group in trainer.optimizer.param_groups:                # the schedule did go on
        group["lr"] = RATES[optimizer]
    real = step(trainer)
    moved = max((float((after[k] - before[k]).abs().max()) for k in before), default=0.0)
    return {"skipped": skipped["ppo/skipped_steps"], "of": skipped["ppo/optimizer_steps"], "moved": moved,
            "then": real["ppo/skipped_steps"]}, weights_of(trainer)


def write(settings, gather=True):
    """Greedy text, sampled text, and text of which the first rank ends at once while the others go on."""
    trainer = make({**settings, "ds3_gather_for_generation": gather})
    gathers = count_gathers() if distributed.zero_stage(trainer.accelerator) == 3 else []
    text = greedy(trainer)
    gathers = len(gathers)
    rank = trainer.accelerator.process_index
    uneven = greedy(trainer, eos=list(range(200)) if rank == 0 else 10 ** 6)
    distributed.seed_everything(3, rank=rank)
    sampled = trainer.generate([torch.tensor([5, 6, 7])] * 4, return_prompt=False, max_new_tokens=6)
    return {"greedy": distributed.gather_lists(trainer.accelerator, text), "gathers": gathers, "uneven": [len(r) for r in uneven],
            "sampled": [r.tolist() for r in sampled]}, {}


def count_gathers():
    """-> a list that grows by one with every context in which weights are whole."""
    import deepspeed
    entered, original = [], deepspeed.zero.GatheredParameters.__enter__

    def enter(self):
        entered.append(1)
        return original(self)
    deepspeed.zero.GatheredParameters.__enter__ = enter
    return entered


def refuse(settings):
    """A score that is not a number on the last rank only. -> the message on this rank; and the next step works."""
    trainer = make(settings)
    queries, responses, scores = (mine(trainer, part) for part in ragged(LENGTHS, QUERIES, 0))
    bad = trainer.accelerator.process_index == trainer.accelerator.num_processes - 1
    try:
        trainer.step(queries, responses, [float("nan")] + scores[1:] if bad else scores)
        message = "no error"
    except ValueError as error:
        message = str(error)
    return {"message": message, "score": step(trainer)["ppo/mean_scores"]}, {}


def construct(settings):
    """-> what the constructor says, or "runs"."""
    try:
        make(settings)
        return {"message": "runs"}, {}
    except ValueError as error:
        return {"message": str(error)}, {}


JOBS = {"train": train, "skip": skip, "write": write, "refuse": refuse, "construct": construct}


def main(out, jobs):
    for job in jobs:
        found, weights = JOBS[job.pop("do")](**{k: v for k, v in job.items() if k != "name"})
        rank = AcceleratorState().process_index
        if weights:
            save_file(weights, f"{out}-{job['name']}-{rank}.safetensors")
        Path(f"{out}-{job['name']}-{rank}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
