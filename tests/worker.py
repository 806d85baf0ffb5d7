"""One rank of a test run: it does one job after the other, each on its share of a fixed ragged batch, and writes what it found.

    python worker.py OUT '[{"name": "sgd", "do": "train", ...}, ...]'       # writes OUT-<name>-<rank>.json and .safetensors
Started alone, by torch.distributed.run or by accelerate launch. One start for many jobs: starting takes longer than the jobs.
It stays on the CPU, but for tests/test_gpu.py, which says PLAINPPO_GPU_TESTS_ON=cuda.
"""
import hashlib
import itertools
import json
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adapters
import distributed
import optim
import rewards
import speed
from forge import share_gpu
from ppo_core import BadNumbers, PPOConfig, PPOTrainer
from test_ppo_core import GOLDEN, ragged, tiny, tokenizer
from value_head import AutoModelForCausalLMWithValueHead

ON_GPU = os.environ.get("PLAINPPO_GPU_TESTS_ON") == "cuda"
TOTAL = 8
LENGTHS, QUERIES = (1, 7, 3, 5, 0, 9, 2, 4), (2, 6, 3, 4, 5, 2, 3, 6)
IDS = torch.tensor([[5, 6, 7, 8, 9]])
RATES = {"sgd": 0.05, "adam": 1e-3, "lion": 1e-3, "adam8bit": 1e-3}


def make(settings, optimizer="sgd", shared=None, dataset=None, reference=lambda accelerator: None):
    AcceleratorState._reset_state(reset_partial_state=True)     # each job is a run of its own
    if "SHARE_GPU" in os.environ:
        share_gpu()
    accelerator = distributed.start(cpu=not ON_GPU)
    settings = dict(settings)
    whole = settings.pop("whole", 0)                            # DeepSpeed keeps what is small whole: all of this model
    if distributed.zero_stage(accelerator) == 3:
        accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = whole
    distributed.seed_everything(0)
    model = with_adapters() if settings.pop("lora", False) else tiny()
    optimizer = optim.make_optimizer(optimizer, optim.trainable_parameters(model), RATES[optimizer])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    kind = speed.FastPPOTrainer if settings.pop("fast", False) else PPOTrainer
    trainer = kind(PPOConfig(**settings), model, reference(accelerator), tokenizer(), optimizer=optimizer, lr_scheduler=schedule,
                         num_shared_layers=shared, accelerator=accelerator, dataset=dataset, data_collator=list)
    np.random.seed(accelerator.process_index)                   # each rank shuffles its own share
    if distributed.zero_stage(accelerator) == 3:
        spoil_padding(trainer.model)
    return trainer


def with_adapters():
    """The small GPT-2 with adapters that TRL made."""
    base = AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / "gpt2", dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(base, GOLDEN / "models" / "gpt2_lora", is_trainable=True)
    return adapters.AutoModelForCausalLMWithValueHead(wrapped, v_head_init_strategy="zero")


def spoil_padding(model):
    """ZeRO-3 leaves what fills up the last share of a tensor as it finds the memory. Here that is NaN, the worst it can be."""
    padded = 0
    for parameter in distributed.unwrap(model).parameters():
        share = parameter.ds_tensor.data
        own = parameter.ds_numel - parameter.ds_zero_partition_rank * share.numel()
        share[max(0, own):] = float("nan")
        padded += own < share.numel()
    assert padded or torch.distributed.get_rank() == 0          # the bias of the value head is one number


def mine(trainer, items):
    share = TOTAL // trainer.accelerator.num_processes
    return items[trainer.accelerator.process_index * share:][:share]


def step(trainer, seed=0, lengths=LENGTHS):
    """-> the step's statistics that must be the same on every rank."""
    queries, responses, scores = (mine(trainer, part) for part in ragged(lengths, QUERIES, seed))
    stats = trainer.step(queries, responses, scores)
    own = {k: v for k, v in stats.items() if not torch.is_tensor(v) and not k.startswith("time/")}
    return {**own, "objective/kl_dist": stats["objective/kl_dist"].tolist()}


def greedy(trainer, eos=None, batch_size=3):
    queries, *_ = ragged(LENGTHS, QUERIES, seed=7)
    responses = trainer.generate(mine(trainer, queries), batch_size=batch_size, return_prompt=False, max_new_tokens=6, do_sample=False,
                                 allow_other_distribution=True, **({} if eos is None else {"eos_token_id": eos}))
    return [r.tolist() for r in responses]


def weights_of(trainer):
    """-> all weights on the main process, {} elsewhere."""
    state = dict(distributed.full_state_dict(trainer.accelerator, trainer.model))
    state.pop("lm_head.weight", None)                           # tied to the embedding
    return {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}


def train(settings, optimizer="sgd", steps=3, lengths=LENGTHS, write_first=False, shared=None, save=None):
    """Three steps on different batches. -> statistics, KL coefficient, and the weights."""
    trainer = make(settings, optimizer, shared)
    found, passes = [], []
    inside = distributed.unwrap(trainer.model).pretrained_model.transformer.h[0].ln_1
    inside.register_forward_pre_hook(lambda module, _: passes.append(module.training))      # in the update; checkpointing comes again
    for seed in range(steps):
        if write_first:
            greedy(trainer)     # a rollout between the updates must leave the sharding as it was
        found.append(step(trainer, seed, lengths))
    result = {"steps": found, "kl_coef": trainer.kl_ctl.value, "passes": sum(passes)}
    if save:
        trainer.save_pretrained(save)
        with torch.no_grad():
            ids = IDS.to(trainer.accelerator.device)
            logits, _, values = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        result.update(logits=logits.tolist(), values=values.tolist())
    return result, weights_of(trainer)


def skip(settings, optimizer="adam"):
    """A step whose every optimizer step is skipped, then a real one, as if the first had never been."""
    trainer = make({**settings, "ratio_threshold": 1e-9}, optimizer)
    before = weights_of(trainer)
    skipped = step(trainer, seed=1)                             # another batch: a gradient left of it would point elsewhere
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
    sharded = distributed.zero_stage(trainer.accelerator) == 3
    gathers = count_gathers() if sharded else []
    text = greedy(trainer)
    gathers = len(gathers)
    rank = trainer.accelerator.process_index
    held = sum(p.numel() for m in (trainer.model, trainer.ref_model) for p in trainer.accelerator.unwrap_model(m).parameters())
    uneven = greedy(trainer, eos=list(range(200)) if rank == 0 else 10 ** 6)
    distributed.seed_everything(3, rank=rank)
    sampled = trainer.generate([torch.tensor([5, 6, 7])] * 4, return_prompt=False, max_new_tokens=6)
    return {"greedy": distributed.gather_lists(trainer.accelerator, text), "gathers": gathers, "uneven": [len(r) for r in uneven],
            "sampled": [r.tolist() for r in sampled], "held": held, "refused": refused_batches(trainer)}, {}


def refused_batches(trainer):
    """-> what is said when one rank has more to write than the other, where that would hang."""
    if trainer.config.ds3_gather_for_generation:
        return None
    queries = [torch.tensor([5, 6])] * (2 + 2 * trainer.accelerator.process_index)
    try:
        trainer.generate(queries, batch_size=2, max_new_tokens=2)
        return None
    except ValueError as error:
        return str(error)


def sampled_run(settings):
    """Two whole steps: prompts from the loader, sampled responses, scores that depend on them. Then the loader alone, to its end."""
    prompts = [torch.tensor([5 + i, 6, 7]) for i in range(4 * TOTAL + 5)]       # the last batch would be a part of one
    trainer = make(settings, dataset=prompts)
    distributed.seed_everything(0, rank=trainer.accelerator.process_index)
    found = []
    for _, queries in zip(range(2), trainer.dataloader):
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=6)
        stats = trainer.step(queries, responses, [float(r.float().mean()) / 50 for r in responses])
        found.append({"prompts": [int(q[0]) for q in queries], "responses": [r.tolist() for r in responses],
                      "kl": stats["objective/kl"], "loss": stats["ppo/loss/total"]})
    weights = weights_of(trainer)
    return {"steps": found, "pass": [[int(q[0]) for q in queries] for queries in trainer.dataloader]}, weights


def infinite_loss(settings):
    """Values that overflow on one rank make a loss that is not finite there: all ranks refuse it, and none steps."""
    trainer = make(settings)
    before, forward = weights_of(trainer), trainer.forward
    bad = trainer.accelerator.process_index == trainer.accelerator.num_processes - 1

    def overflow(model, rows, **kwargs):
        logprobs, values, rest = forward(model, rows, **kwargs)
        return logprobs, values * (float("inf") if bad and torch.is_grad_enabled() else 1.0), rest
    trainer.forward = overflow
    message = refusal(trainer)[1]
    after = weights_of(trainer)
    return {"message": message, "moved": max((float((after[k] - before[k]).abs().max()) for k in before), default=0.0)}, {}


def refusal(trainer):
    """-> stage and message of what a step is refused with; (None, None) for a step that is taken."""
    try:
        step(trainer)
        return None, None
    except BadNumbers as error:
        return error.stage, str(error)


def bad_numbers(settings, optimizer="adam"):
    """NaN and infinity in every stage, in sample 1 of the last rank, one step after the other. -> {stage number: what came of it}."""
    trainer, found, original = make(settings, optimizer), {}, PPOTrainer.optimizer_step
    step(trainer)                                               # the optimizer now has a state that could be spoilt
    for place, kind in itertools.product(PLACES, ("nan", "inf")):
        done, moments, snapshots = trainer.steps_done, trainer.score_moments.state_dict(), [everything(trainer)]

        def watched(*arguments, **keywords):
            snapshots.append(everything(trainer))
            return original(trainer, *arguments, **keywords)
        trainer.optimizer_step = watched
        mend = PLACES[place](trainer, float(kind))
        stage, message = refusal(trainer)
        mend()
        found[f"{place} {kind}"] = {"stage": stage, "message": message, "same": everything(trainer) == snapshots[-1], "step": done + 1,
                                    "moments": trainer.score_moments.state_dict() == moments, "steps_done": trainer.steps_done - done,
                                    "optimizer steps": len(snapshots) - 1, "then": refusal(trainer)[1]}
    return found, {}


def everything(trainer):
    """Every bit of weights and optimizer state that this rank holds."""
    tensors = [*weights_of(trainer).values()]
    for state in getattr(trainer.optimizer, "optimizer", trainer.optimizer).state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return hashlib.sha256(b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in tensors)).hexdigest()


def bad_rank(trainer):
    return trainer.accelerator.process_index == trainer.accelerator.num_processes - 1


def spoil_weights(trainer, number):
    p = distributed.unwrap(trainer.model).pretrained_model.transformer.h[0].mlp.c_fc.bias
    p = getattr(p, "ds_tensor", p).data
    kept = p.clone()
    if bad_rank(trainer):
        p[3] = number
    return lambda: p.copy_(kept)


def spoil_scores(trainer, number):
    original = trainer.step

    def step(queries, responses, scores):
        return original(queries, responses, [scores[0], number, *scores[2:]] if bad_rank(trainer) else scores)
    trainer.step = step
    return lambda: setattr(trainer, "step", original)


def spoil_forward(trainer, number, output, reference=False, update=None):
    """The first token of the response in one output of forward(): 0 = log-probs, 1 = values; recorded, or in an epoch of the update."""
    original = trainer.forward

    def forward(model, rows, **kwargs):
        outputs = list(original(model, rows, **kwargs))
        now = update in trainer.where if update else not torch.is_grad_enabled()
        if bad_rank(trainer) and now and (model is trainer.ref_model) == reference:
            outputs[output] = outputs[output].masked_fill(of_sample_1(trainer, rows)[:, None] & (outputs[output] == outputs[output][:, :1]), number)
        return outputs
    trainer.forward = forward
    return lambda: setattr(trainer, "forward", original)


def of_sample_1(trainer, rows):
    """(b,): True for the row that is sample 1 of this rank."""
    tokens = torch.cat([part[1] for part in trainer.checked_batch[:2]]).to(rows["input_ids"].device)
    width = min(len(tokens), rows["input_ids"].shape[1])
    return (rows["input_ids"][:, :width] == tokens[:width]).all(1) & (rows["attention_mask"].sum(1) == len(tokens))


def spoil_rewards(trainer, number):
    original = rewards.token_rewards

    def token_rewards(*arguments):
        per_token, rest = original(*arguments)
        if bad_rank(trainer):
            per_token[1, 0] = number
        return per_token, rest
    rewards.token_rewards = token_rewards
    return lambda: setattr(rewards, "token_rewards", original)


def spoil_loss(trainer, number):
    """A return so large that its squared error is infinite, or NaN."""
    original = trainer.minibatch_loss

    def minibatch_loss(rows, first):
        if bad_rank(trainer) and "epoch 2" in trainer.where:
            rows["returns"][:, 0] = rows["returns"][:, 0].masked_fill(of_sample_1(trainer, rows), 1e30 if number == float("inf") else number)
        return original(rows, first)
    trainer.minibatch_loss = minibatch_loss
    return lambda: setattr(trainer, "minibatch_loss", original)


def spoil_gradients(trainer, number):
    def hook(gradient):
        if bad_rank(trainer) and "epoch 2" in trainer.where:
            return gradient.index_fill(0, torch.tensor([3], device=gradient.device), number)
    handle = distributed.unwrap(trainer.model).pretrained_model.transformer.h[0].mlp.c_fc.bias.register_hook(hook)
    return handle.remove


PLACES = {"weights": spoil_weights, "scores": spoil_scores, "rewards": spoil_rewards, "loss": spoil_loss, "gradients": spoil_gradients,
          "log-probs": partial(spoil_forward, output=0), "reference log-probs": partial(spoil_forward, output=0, reference=True),
          "values": partial(spoil_forward, output=1), "first log-probs": partial(spoil_forward, output=0, update="epoch 1"),
          "new log-probs": partial(spoil_forward, output=0, update="epoch 2"),
          "new values": partial(spoil_forward, output=1, update="epoch 2")}


def finite(settings):
    """-> the first weight that is not finite: of whole weights, and after one has become NaN."""
    trainer = make(settings)
    found = [trainer.first_bad_weight()]
    spoil_weights(trainer, float("nan"))
    return {"found": [*found, trainer.first_bad_weight()]}, {}


def reward_model(settings):
    """The documentation page's snippet and our helper, and what they load; without DeepSpeed there is nothing to switch off."""
    trainer = make(settings)
    held = {"plain": elements()}
    ds_plugin = trainer.accelerator.state.deepspeed_plugin
    if ds_plugin is not None and ds_plugin.is_zero3_init_enabled():
        with ds_plugin.zero3_init_context_manager(enable=False):
            held["page"] = elements()
    with distributed.zero3_init_disabled(trainer.accelerator):
        held["helper"] = elements()
    return held, {}


def elements():
    """What a language model that is loaded now holds in this process."""
    return sum(p.numel() for p in tiny().pretrained_model.parameters())


def conflict(settings):
    """A DeepSpeed config that says something else than PPOConfig. -> what the constructor says."""
    original, messages = distributed.start, []
    for name, value in (("gradient_clipping", 0.25), ("train_micro_batch_size_per_gpu", 3), ("gradient_accumulation_steps", 7)):
        def start(**kwargs):
            accelerator = original(**kwargs)
            if accelerator.state.deepspeed_plugin is not None:
                accelerator.state.deepspeed_plugin.deepspeed_config[name] = value
            return accelerator
        distributed.start = start
        try:
            make(settings)
        except ValueError as error:
            messages.append(str(error))
    distributed.start = original
    return {"messages": messages}, {}


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


def eight_bits(settings):
    """A reference in 8 bits, which can be neither moved nor cut. -> two steps with it, and what became of it."""
    places = []

    def load(accelerator):
        with distributed.zero3_init_disabled(accelerator):
            model = AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "models" / "gpt2", load_in_8bit=True, device_map="auto")
        places.append([model, place(model)])
        return model
    trainer = make(settings, reference=load)
    (model, before), = places
    steps = [step(trainer, seed) for seed in range(2)]
    return {"steps": steps, "alone": trainer.ref_model is model and place(model) == before,
            "bytes": sum(p.numel() for p in model.parameters() if p.dtype == torch.int8),
            "elements": sum(p.numel() for p in model.parameters())}, weights_of(trainer)


def place(model):
    return [(name, p.data_ptr(), tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]


def disagree(settings, shift):
    """From the second optimizer step on the last rank, and it alone, sees a policy whose every log-prob has grown by `shift` nats."""
    trainer = make(settings)
    step_of, forward, last = trainer.optimizer_step, trainer.forward, trainer.accelerator.num_processes - 1

    def shifted(model, rows, **kwargs):
        logprobs, values, entropy = forward(model, rows, **kwargs)
        return rows["logprobs"] + shift + 0 * logprobs, values, entropy

    def optimizer_step(batch, index, first):
        if not first and trainer.accelerator.process_index == last:
            trainer.forward = shifted
        return step_of(batch, index, first)
    trainer.optimizer_step = optimizer_step
    stats = step(trainer)
    return {"skipped": stats["ppo/skipped_steps"], "of": stats["ppo/optimizer_steps"]}, weights_of(trainer)


def memory():
    """The last rank, and it alone, takes half as much again as its highest point so far. -> what it then has, and what all say."""
    speed.tune_cpu()
    accelerator = distributed.start(cpu=True)
    if accelerator.process_index == accelerator.num_processes - 1:
        torch.ones(distributed.peak_memory(accelerator.device) // 8)        # float32
    faults = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16_000_000)                                  # 64 MB, above what glibc itself would ever keep
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {"own": distributed.peak_memory(accelerator.device), "largest": distributed.largest_peak_memory(accelerator),
            "faults": faults[-1]}, {}


JOBS = {job.__name__: job for job in (train, skip, write, sampled_run, infinite_loss, bad_numbers, refuse, reward_model, conflict, memory,
                                     eight_bits, disagree, finite)}


def main(out, jobs):
    for job in jobs:
        started = time.perf_counter()
        outside = dict(os.environ)
        os.environ.update(job.pop("env", {}))
        found, weights = JOBS[job.pop("do")](**{k: v for k, v in job.items() if k != "name"})
        rank = AcceleratorState().process_index
        print(f"{job['name']}: {time.perf_counter() - started:.1f} s", flush=True)
        if weights:
            save_file(weights, f"{out}-{job['name']}-{rank}.safetensors")
        Path(f"{out}-{job['name']}-{rank}.json").write_text(json.dumps(found))
        for name in set(os.environ) - set(outside):
            del os.environ[name]
        os.environ.update(outside)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.1)         # as distributed.end, which says why
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
