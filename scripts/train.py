"""Train a language model by PPO so that its text pleases a reward model. The story, top to bottom.

    python scripts/train.py                                          # the review writer, on a CPU or one GPU: make train
    accelerate launch --config_file scripts/accelerate_configs/multi_gpu.yaml --num_processes 4 scripts/train.py        # N GPUs
    accelerate launch --config_file scripts/accelerate_configs/multi_cpu.yaml --num_processes 2 scripts/train.py --cpu  # N on a CPU
    accelerate launch --config_file scripts/accelerate_configs/deepspeed_zero2.yaml --num_processes 4 scripts/train.py  # ZeRO-1, 2, 3
    python scripts/train.py --model_name ./my-model --reward_model ./my-classifier --prompts prompts.txt
    python scripts/train.py --reward_fn my_reward.py:score           # def score(prompts, responses) -> list of floats
    python scripts/train.py --resume runs/review-lm-1                # a run that was killed, from its newest checkpoint

What you should see: a plan, one line per step with a score that rises while the KL stays in the tens at most, then the score
on prompts held out from training, before and after. What it leaves in runs/<name>/:
    config.json     every setting, and the versions of the libraries
    metrics.jsonl   one line per step: every statistic but the per-token ones; the README's glossary says what each means
    before.json     what the untrained policy wrote to the held-out prompts, for a run that is resumed
    curves.png      score, KL, entropy, losses
    samples.md      the same 16 held-out prompts answered before and after, with scores
    summary.json    the last lines of the run as numbers: scores, KL, seconds, peak memory, bytes of optimizer state
    bad_batch.safetensors  the batch that led to NaN or infinity, if one did: see --on_bad_batch
    checkpoints/    the newest states of the run: after a kill, `--resume runs/<name>` goes on as if nothing had happened
    final/          the trained policy with its value head, for from_pretrained; plain transformers loads it too
"""
import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Before torch is loaded: its threads wait for each other in a loop that by default never sleeps. With one busy neighbour on 2
# cores a step then took 35 s instead of 2.4; with a short loop, 5 s, and 2.4 still on a quiet machine.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import accelerate
import safetensors.torch
import torch
import transformers
from transformers import AutoTokenizer, HfArgumentParser

import distributed
import optim
import reference
import rewards
from ppo_core import BadNumbers, PPOConfig, PPOTrainer, knob
from value_head import AutoModelForCausalLMWithValueHead, first_line, why_not_loaded

ADAM_LEARNING_RATE = 4e-4       # suits a model of a few million parameters; a large one wants PPOConfig's 1.41e-5


@dataclass
class RunConfig(PPOConfig):
    """Every PPOConfig field, with defaults that suit the small review model on a CPU, and what only a script needs."""

    model_name: str = knob("assets/review-lm", "language model to train: a folder or a hub id")
    reward_model: Optional[str] = knob("assets/review-sentiment", "text-classification model whose P(POSITIVE), or P(last "
                                                                  "label), is the score: a folder or a hub id")
    batch_size: int = knob(64, "responses per step and process")
    mini_batch_size: Optional[int] = knob(None, "responses per forward and backward pass and process; default: the largest divisor "
                                                "of batch_size up to 32")
    ppo_epochs: int = knob(2, "passes over each batch of responses")
    learning_rate: Optional[float] = knob(None, f"of the optimizer; default: {ADAM_LEARNING_RATE}, and a third of it for lion")
    init_kl_coef: float = knob(0.01, "reward lost per nat of KL to the reference, at the start")
    # ---- the script's own
    steps: int = knob(60, "PPO steps; each is one batch of responses")
    output_dir: Optional[str] = knob(None, "folder for the run; default: runs/<model>-<first free number>")
    prompts: str = knob("assets/review-prompts.txt", "text file, one prompt per line")
    eval_prompts: int = knob(200, "last prompts of the file, kept from training and answered before and after")
    max_new_tokens: int = knob(24, "longest response, in tokens; shorter where the model ends it with EOS")
    reward_fn: Optional[str] = knob(None, "path/to/file.py:function, (prompts, responses) -> list of floats; instead of "
                                          "reward_model")
    reward_timeout: float = knob(300.0, "seconds that the reward may take for one batch before the run ends; 0 = no limit")
    on_bad_batch: Literal["stop", "skip"] = knob("stop", "when a batch leads to NaN or infinity: stop, or skip it and go on; it is kept "
                                                         "in bad_batch.safetensors either way")
    optimizer: Literal["adam", "sgd", "lion", "adam8bit"] = knob("adam", "adam, sgd, lion, or adam8bit, which needs bitsandbytes")
    lr_scheduler: Literal["constant", "linear", "cosine", "exponential"] = knob("cosine", "of the learning rate, over `steps`")
    warmup_steps: int = knob(0, "steps over which the learning rate rises to its value")
    num_shared_layers: Optional[int] = knob(None, "first layers that policy and reference share, frozen; default: none")
    reference_bits: Optional[Literal[8, 4]] = knob(None, "load the reference in 8 or 4 bits; needs bitsandbytes")
    save_every: int = knob(20, "steps between checkpoints; 0 = none, but for the one that Ctrl-C or SIGTERM leaves")
    keep_last: int = knob(2, "checkpoints kept; at least 2, so that a whole one is left when the newest is damaged")
    resume: Optional[str] = knob(None, "run folder to go on with, with its own settings, from its newest whole checkpoint")
    collective_timeout: int = knob(600, "seconds that a process waits for the others before the run ends")
    cpu: bool = knob(False, "stay on the CPU where there is a GPU")

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = optim.default_learning_rate(self.optimizer, ADAM_LEARNING_RATE)
        if self.mini_batch_size is None and self.batch_size > 0:
            per_step = max(1, self.batch_size // self.gradient_accumulation_steps)
            self.mini_batch_size = max(n for n in range(1, min(32, per_step) + 1) if per_step % n == 0)
        super().__post_init__()
        for name in ("steps", "max_new_tokens", "eval_prompts", "collective_timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.save_every < 0 or self.keep_last < 2:
            raise ValueError(f"save_every is {self.save_every} and keep_last is {self.keep_last}; use at least 0 and at least 2")
        if not 0 <= self.reward_timeout < float("inf") or self.on_bad_batch not in ("stop", "skip"):
            raise ValueError(f"reward_timeout is {self.reward_timeout} and on_bad_batch is {self.on_bad_batch!r}; use at least 0 seconds "
                             "(0 = no limit) and 'stop' or 'skip'")
        if self.reference_bits is not None and self.num_shared_layers is not None:
            raise ValueError(f"reference_bits is {self.reference_bits} and num_shared_layers is {self.num_shared_layers}, but a layer "
                             "that is stored in fewer bits is another layer; leave one of them out")


def main(arguments=None):
    # ------------------------------------------------------------------------------------------------ config
    config = parse(arguments)
    transformers.utils.logging.disable_progress_bar()      # its bars for loading and saving would cut through ours

    # ----------------------------------------------------------------------------------------------- machine
    accelerator = distributed.start(log_with=config.log_with, project_dir="runs", cpu=config.cpu, timeout=config.collective_timeout)
    run = RunFolder(config, accelerator)
    if run.finished():
        run.say(f"{config.resume} is finished after {config.steps} steps; there is nothing left to do")
        distributed.end(accelerator)
        return
    accelerator.project_configuration.logging_dir = str(run.folder)
    distributed.seed_everything(config.seed)

    # ------------------------------------------------------------------------------------------------ models
    # `phase` says where and on which process a run of several stopped, should it stop.
    with distributed.phase(accelerator, "set-up of the models"):
        model_path = find(config.model_name)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(model_path, v_head_init_strategy="zero")
        tokenizer = load_tokenizer(model_path)
        ref_model = make_reference(config, accelerator, model, model_path)

    # --------------------------------------------------------------------------------------------- optimizer
    with distributed.phase(accelerator, "set-up of the optimizer"):
        optimizer = optim.make_optimizer(config.optimizer, optim.trainable_parameters(model), config.learning_rate,
                                         ADAM_LEARNING_RATE)
        lr_scheduler = optim.make_schedule(config.lr_scheduler, optimizer, config.steps, config.warmup_steps)

    # ------------------------------------------------------------------------------------------------ reward
    # It is not trained, so ZeRO-3 must not shard it.
    with distributed.phase(accelerator, "set-up of the reward"), distributed.zero3_init_disabled(accelerator):
        reward = (rewards.load_reward_fn(config.reward_fn) if config.reward_fn is not None
                  else rewards.load_reward_model(find(config.reward_model), accelerator.device))

    # ----------------------------------------------------------------------------------------------- prompts
    with distributed.phase(accelerator, "set-up of the prompts"):
        train_prompts, eval_prompts = load_prompts(config, tokenizer, accelerator.num_processes, model.config)

    # -------------------------------------------------------------------------------------------------- loop
    run.say(plan(config, accelerator, model, ref_model))
    with distributed.phase(accelerator, "set-up of the trainer"):
        trainer = PPOTrainer(config, model, ref_model, tokenizer, optimizer=optimizer, lr_scheduler=lr_scheduler,
                             accelerator=accelerator)
    before = run.remember_before(lambda: evaluate(trainer, reward, eval_prompts))
    run.say(f"before: {before}")
    # From here on each rank draws its own numbers: it must sample other responses than its neighbour.
    distributed.seed_everything(config.seed, rank=accelerator.process_index)

    with distributed.stop_signals(accelerator) as stop:
        for step in range(run.restore(trainer) + 1, config.steps + 1):
            one_step(trainer, reward, train_prompts, step, run)
            run.save(trainer, step, stop())

    # ---------------------------------------------------------------------------------------- before / after
    after = evaluate(trainer, reward, eval_prompts)
    run.save_final(trainer)
    run.finish(before, after, optim.state_bytes(trainer.optimizer), distributed.largest_peak_memory(accelerator))
    distributed.end(accelerator)


def one_step(trainer, reward, train_prompts, step, run):
    """PPO step number `step`: a batch of responses is sampled, scored and trained on."""
    config, accelerator, tokenizer = trainer.config, trainer.accelerator, trainer.tokenizer
    started, prompts = time.perf_counter(), prompts_of_step(train_prompts, step, config, accelerator)
    queries, texts = [prompt["tokens"] for prompt in prompts], [prompt["text"] for prompt in prompts]
    # `phase` says where and on which process a run of several stopped, should it stop; `together`, what is wrong on one stops all.
    try:
        # (a) rollout: sample a response to each prompt
        with distributed.phase(accelerator, f"step {step}, (a) rollout"), distributed.together(accelerator, BadNumbers):
            responses = trainer.generate(queries, batch_size=len(queries), return_prompt=False, max_new_tokens=config.max_new_tokens)
        rolled_out = time.perf_counter()
        # (b) score: one number per response
        with distributed.phase(accelerator, f"step {step}, (b) score"), distributed.together(accelerator):
            answers = decode_responses(tokenizer, queries, responses)
            scores = timed_scores(trainer, reward, texts, answers, f"step {step}, (b) score", finite=False)
        scored = time.perf_counter()
        # (c) rewards, (d) advantages, (e) update: PPOTrainer.step, where the same letters stand
        with distributed.phase(accelerator, f"step {step}, (c) rewards to (e) update"):
            stats = trainer.step(queries, responses, scores)
    except BadNumbers as error:
        return leave_out(trainer, step, run, error)
    # (f) book-keeping
    stats["time/rollout"], stats["time/score"], stats["ppo/bad_batch"] = rolled_out - started, scored - rolled_out, 0.0
    with distributed.phase(accelerator, f"step {step}, (f) book-keeping"):
        trainer.log_stats(stats, {"query": texts, "response": answers}, scores)
        run.record(step, stats, time.perf_counter() - started)


# ------------------------------------------------------------------------------------------------ what main() calls


def parse(arguments):
    """Flags -> RunConfig. With --resume every setting is that of the run; another one beside it is refused, not followed."""
    parser = HfArgumentParser(RunConfig, description=__doc__, formatter_class=Help)
    config, = parser.parse_args_into_dataclasses(arguments)
    if config.resume is None:
        return config
    saved = saved_settings(config.resume)
    parser.set_defaults(**saved)
    given, = parser.parse_args_into_dataclasses(arguments)
    for name, value in saved.items():
        if name != "resume" and getattr(given, name) != value:
            raise ValueError(f"--resume {config.resume} goes on with that run's own settings, where {name} is {value}, not "
                             f"{getattr(given, name)}; leave --{name} out, or start a new run")
    given.output_dir = config.resume
    return given


def saved_settings(folder):
    """What a run's config.json says. ValueError: it cannot be read, or is not what the run wrote."""
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        settings = {field.name: saved[field.name] for field in dataclasses.fields(RunConfig)}
        RunConfig(**settings)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--resume {folder}: {path} cannot be read ({first_line(error)}); name a folder that a run was made in") from error
    if saved.get("sha256", digest(settings)) != digest(settings):
        raise ValueError(f"--resume {folder}: {path} is not what the run wrote: its SHA-256 differs, and with other settings it would be "
                         f"another run; put the file back, or start a new run from its newest checkpoint's model/")
    return settings


def digest(settings):
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def find(name):
    """A path as given; or, if there is none from here, below the project's own folder; or a hub id, left as it is.

    ValueError: a folder with a manifest, so one that plainppo wrote, which is no longer what it wrote.
    """
    found = str(ROOT / name) if not os.path.exists(name) and (ROOT / name).exists() else name
    problem = distributed.damage(found) if (Path(found) / distributed.MANIFEST).is_file() else None
    if problem is not None:
        raise ValueError(f"{found} cannot be loaded: {problem}; use an older one")
    return found


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The manual above as it is written, and each flag with its default."""


def load_tokenizer(path):
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokens = tokenizer("a").input_ids
    except Exception as error:      # tokenizers raises plain Exceptions
        raise ValueError(f"the tokenizer of {path!r} cannot be loaded: {why_not_loaded(path, error, 'tokenizer.json')}") from error
    if not tokens:
        raise ValueError(f"{path} has no usable tokenizer: it makes 0 tokens of 'a'; save the model's tokenizer beside its weights")
    return tokenizer


def make_reference(config, accelerator, model, model_path):
    """A frozen copy of the policy, which may share its first layers; or the same model loaded in 8 or 4 bits."""
    if config.reference_bits is None:
        with distributed.whole_weights(model):
            return reference.create_reference_model(model, config.num_shared_layers)
    with distributed.zero3_init_disabled(accelerator):
        return AutoModelForCausalLMWithValueHead.from_pretrained(model_path, device_map="auto",
                                                                 **{f"load_in_{config.reference_bits}bit": True})


def decode_responses(tokenizer, queries, responses):
    """Texts of the responses as they follow their queries; decoded alone, some tokenizers drop the first space."""
    both = tokenizer.batch_decode([torch.cat([q, r.to(q.device)]) for q, r in zip(queries, responses)], skip_special_tokens=True)
    return [text[len(query):] for text, query in zip(both, tokenizer.batch_decode(queries, skip_special_tokens=True))]


def load_prompts(config, tokenizer, num_processes, model_config):
    """-> two lists of {"text", "tokens" (Q,)}: to train on, and to judge by (the last `eval_prompts` of the file)."""
    path = find(config.prompts)
    if not os.path.isfile(path):
        raise ValueError(f"prompts names {config.prompts!r}, which is not a file; give a text file with one prompt per line")
    prompts, size = [], getattr(model_config, "vocab_size", None)
    for line, number in read_lines(path).items():
        try:
            tokens = tokenizer(line).input_ids
        except Exception as error:      # tokenizers raises plain Exceptions
            raise ValueError(f"{path}, line {number}: the tokenizer cannot read it ({first_line(error)}); leave it out") from error
        if not tokens or (size is not None and max(tokens) >= size):
            problem = "has no tokens" if not tokens else f"has token {max(tokens)} but the model has {size}: the tokenizer is another model's"
            raise ValueError(f"{path}, line {number}: {line[:40]!r} {problem}; leave it out, or give the model its own tokenizer")
        prompts.append({"text": line, "tokens": torch.tensor(tokens), "line": number})
    needed, kept = config.batch_size * num_processes, config.eval_prompts
    if len(prompts) < needed + kept:
        raise ValueError(f"{config.prompts} has {len(prompts)} different prompts but a step takes {needed} (batch_size x processes) "
                         f"and {kept} are kept for evaluation; use a smaller --eval_prompts and --batch_size, or more prompts")
    longest = max(prompts, key=lambda prompt: len(prompt["tokens"]))      # said now, not when its turn comes after an hour
    limit = getattr(model_config, "max_position_embeddings", None) or tokenizer.model_max_length
    if len(longest["tokens"]) + config.max_new_tokens > limit:
        raise ValueError(f"{path}, line {longest['line']}: the prompt {longest['text'][:40]!r} has {len(longest['tokens'])} tokens and "
                         f"max_new_tokens is {config.max_new_tokens}, but the model has {limit} positions; shorten one of them")
    return prompts[:-kept], prompts[-kept:]


def read_lines(path):
    """-> {line: its number}, each once, without the empty ones. UTF-8, with or without a byte-order mark, with any system's line ends."""
    try:
        data = Path(path).read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        before, byte = error.object[:error.start], error.object[error.start]        # without the byte-order mark
        number = len((before.decode("utf-8") + "-").splitlines())
        raise ValueError(f"{path}, line {number}: byte {byte:#x} is not UTF-8; save the file as UTF-8, or mend that line") from error
    # A repeated line counts once, or a prompt that is trained on could stand among those it is judged by.
    found = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.setdefault(line.strip(), number)
    if not found:
        raise ValueError(f"{path} has 0 prompts: all of its {len(lines)} lines are empty; give a text file with one prompt per line")
    return found


def timed_scores(trainer, reward, prompts, responses, where, finite=True):
    """The reward's numbers; a reward that takes longer than config.reward_timeout ends the run."""
    seconds, accelerator = trainer.config.reward_timeout, trainer.accelerator
    sentence = (f"error: rank {accelerator.process_index} of {accelerator.num_processes}, {where}: the reward function has not returned "
                f"after {seconds:g} s for {len(responses)} responses; mend it, or give it longer with --reward_timeout")
    with rewards.time_limit(seconds, sentence):
        return rewards.score_texts(reward, prompts, responses, finite)


def leave_out(trainer, step, run, error):
    """A batch that was refused is kept; then the run stops, or goes on with the next as --on_bad_batch says. On all processes."""
    kept = run.keep_batch(trainer.accelerator, trainer.in_hand, step, error)
    trainer.check_weights()         # raises if it is they that are not finite: another batch would not mend them
    if not trainer.in_hand[1]:      # nor a policy that cannot write a response
        raise BadNumbers(f"{error} ({kept})") from error
    if trainer.config.on_bad_batch == "stop":
        raise BadNumbers(f"{error} ({kept}; a new run with --on_bad_batch skip would go on with the next)") from error
    trainer.count_step()
    trainer.accelerator.log({"ppo/bad_batch": 1.0}, step=trainer.steps_done)
    run.say(f"step {step:4d}/{trainer.config.steps}  left out: {error} ({kept})")
    run.write_line(step, {"ppo/bad_batch": 1.0})


def prompts_of_step(prompts, step, config, accelerator):
    """This process's batch. Each pass over the prompts has an order of its own, which seed and step alone decide: a run that is
    resumed need not know what was drawn before."""
    per_step = config.batch_size * accelerator.num_processes
    number, position = divmod(step - 1, len(prompts) // per_step)       # what does not fill a batch waits for the next pass
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1_000_003 * config.seed + number))
    start = position * per_step + accelerator.process_index * config.batch_size
    return [prompts[i] for i in order[start:start + config.batch_size]]


@dataclass
class Evaluation:
    """What the policy writes to the held-out prompts, at fixed random numbers."""
    prompts: list
    responses: list
    scores: list

    @classmethod
    def read(cls, path):
        """What was written to `path`; None when that is damaged: then the untrained policy, which is still there, is asked again."""
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            assert len(found.prompts) == len(found.responses) == len(found.scores) > 0
            assert all(isinstance(text, str) for text in found.prompts + found.responses) and math.isfinite(found.score)
            return found
        except (ValueError, TypeError, AssertionError, OverflowError):
            return None

    @property
    def score(self):
        return sum(self.scores) / len(self.scores)

    @property
    def distinct_bigrams(self):
        """Different pairs of neighbouring words / all pairs, over all responses: low when they all say the same."""
        pairs = [pair for text in self.responses for pair in zip(text.split(), text.split()[1:])]
        return len(set(pairs)) / max(1, len(pairs))

    def __str__(self):
        return (f"mean score {self.score:.3f} on {len(self.scores)} held-out prompts, "
                f"distinct bigrams {self.distinct_bigrams:.2f}")


def evaluate(trainer, reward, prompts):
    """-> Evaluation. Its random numbers are its own, so that training is the same with and without it."""
    queries, starts = [p["tokens"] for p in prompts], [p["text"] for p in prompts]
    with distributed.phase(trainer.accelerator, "evaluation"):
        with torch.random.fork_rng(devices=[trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []):
            torch.manual_seed(1234)
            responses = trainer.generate(queries, batch_size=100, return_prompt=False,
                                         max_new_tokens=trainer.config.max_new_tokens)
        texts = decode_responses(trainer.tokenizer, queries, responses)
        return Evaluation(starts, texts, timed_scores(trainer, reward, starts, texts, "evaluation"))


def plan(config, accelerator, model, ref_model):
    """What is about to happen, in words and numbers, before the first step costs anything."""
    processes, per_step = accelerator.num_processes, config.batch_size // config.backward_batch_size
    trained = sum(distributed.whole_numel(p) for p in model.parameters() if p.requires_grad)
    frozen = sum(distributed.whole_numel(p) for p in model.parameters() if not p.requires_grad)
    shared = reference.shared_bytes(model, ref_model)
    own = sum(p.nbytes for p in ref_model.parameters()) - shared       # bytes; int8 counts as one
    stage = distributed.zero_stage(accelerator)

    def share(size, first_stage):       # what ZeRO shares out from that stage on
        return size / processes if stage >= first_stage else size

    weights = share(sum(p.nbytes for p in model.parameters()) + own, 3)
    gradients = share(4 * trained, 2)
    state = share({"adam": 8, "lion": 4, "sgd": 0, "adam8bit": 2}[config.optimizer] * trained, 1)
    vocabulary = model.pretrained_model.get_output_embeddings().out_features
    # logits, their gradient, and two temporaries of softmax, float32
    logits = 4 * 4 * config.mini_batch_size * config.max_new_tokens * vocabulary
    each = f" on each of {processes} processes" if processes > 1 else ""
    return "\n".join([
        f"batch      {config.batch_size} responses a step{each}, {config.ppo_epochs} epochs of {per_step} optimizer step(s), each over "
        f"{config.gradient_accumulation_steps} mini-batch(es) of {config.mini_batch_size}; {config.steps} steps = "
        f"{config.steps * config.batch_size * processes} responses",
        f"parameters {trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen; the reference shares {shared / 1e6:.1f} MB and "
        f"adds {own / 1e6:.1f} MB",
        f"memory     about {(weights + gradients + state + logits) / 1e6:.0f} MB{each} on {accelerator.device} beside activations and the "
        f"reward model: weights {weights / 1e6:.0f}, gradients {gradients / 1e6:.0f}, optimizer {state / 1e6:.0f}, logits of a mini-batch "
        f"{logits / 1e6:.0f}" + (f" (ZeRO-{stage}; a rollout gathers the weights)" if stage == 3 else "")])


class RunFolder:
    """runs/<name>/: made before anything is computed, filled as the run goes. Only the main process writes and prints."""

    def __init__(self, config, accelerator):
        self.accelerator, self.main, self.started, self.steps = accelerator, accelerator.is_main_process, time.perf_counter(), config.steps
        self.seconds, self.timed = 0.0, 0       # seconds spent in that many steps
        self.save_every, self.keep_last, self.resumed = config.save_every, config.keep_last, config.resume is not None
        made = self.make(config) if self.main else None
        # Every process must see the same folder, and stop with the main one if there is none.
        folder, problem = accelerate.utils.broadcast_object_list([made])[0]
        if problem is not None:
            raise ValueError(problem)
        self.folder = Path(folder)
        with distributed.together(accelerator):
            if not self.folder.is_dir():
                raise ValueError(f"{self.folder} is not there on this machine, but every process writes its part of a checkpoint into it; "
                                 "give an --output_dir that all machines share")

    def make(self, config):
        """-> (folder, None) with config.json and an empty metrics.jsonl in it, or (None, what is wrong)."""
        folder = Path(config.output_dir or f"runs/{Path(config.model_name).name}-N")
        versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate)}
        settings = dataclasses.asdict(config)
        try:
            if self.resumed:
                return str(folder), None
            if config.output_dir is None:
                folder = first_free(f"runs/{Path(config.model_name).name}")
            elif not unused(folder):
                return None, f"{folder} already has a run or other files; choose another --output_dir or move it away"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text("")
            # last: a folder with a config.json is a run, which --resume goes on with
            replace_file(folder / "config.json", json.dumps({**settings, "versions": versions, "sha256": digest(settings)}, indent=1))
        except OSError as error:
            return None, f"cannot write to the run folder {folder}: {error.strerror}; choose another --output_dir"
        return str(folder), None

    def finished(self):
        return self.resumed and (self.folder / "summary.json").is_file()

    def say(self, text):
        if self.main:
            print(text, flush=True)

    def record(self, step, stats, seconds):
        """One line of metrics.jsonl, and one for the person who waits."""
        self.write_line(step, {k: v.tolist() if torch.is_tensor(v) else v for k, v in stats.items() if not torch.is_tensor(v) or "_dist" in k})
        if not self.main:
            return
        self.seconds, self.timed = self.seconds + seconds, self.timed + 1
        left = int(self.seconds / self.timed * (self.steps - step))
        tokens = sum(stats["tokens/responses_dist"].tolist())
        # + 0.0 turns the -0.0 of a first step into 0.
        self.say(f"step {step:4d}/{self.steps}  score {stats['ppo/mean_raw_scores']:6.3f}  KL {round(stats['objective/kl'], 2) + 0.0:6.2f}  "
                 f"KL coef {stats['objective/kl_coef']:.4f}  length {stats['tokens/responses_len_mean']:5.1f}  "
                 f"{tokens / seconds:5.0f} tokens/s  {left // 60:3d}:{left % 60:02d} left")

    def write_line(self, step, numbers):
        """Of metrics.jsonl. All must call."""
        line, path = json.dumps({"step": step, **numbers}) + "\n", self.folder / "metrics.jsonl"
        with self.writes(path, len(line)):
            if self.main:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(line)

    def keep_batch(self, accelerator, batch, step, error):
        """Into bad_batch.safetensors, what all processes were working on: tokens as one flat list and its lengths. -> what to say of it.

        batch: this process's queries, responses, scores; after a rollout, queries alone. A newer one takes the place of an older one.
        """
        path = self.folder / "bad_batch.safetensors"
        queries, responses, scores = batch
        shares = distributed.gather_lists(accelerator, [([q.tolist() for q in queries], [r.tolist() for r in responses], list(scores))])
        tensors = {"ranks": torch.tensor([rank for rank, share in enumerate(shares) for _ in share[0]]),
                   "scores": torch.tensor([score for share in shares for score in share[2]])}
        for i, name in enumerate(("queries", "responses")):
            lists = [tokens for share in shares for tokens in share[i]]
            tensors[name] = torch.tensor([token for tokens in lists for token in tokens], dtype=torch.long)
            tensors[f"{name}_lengths"] = torch.tensor([len(tokens) for tokens in lists], dtype=torch.long)
        try:
            if self.main:
                replace_file(path, safetensors.torch.save(tensors, metadata={"step": str(step), "problem": str(error)}))
        except OSError as failure:      # a full disk must not hide what went wrong first
            return f"the batch could not be kept: {failure.strerror}"
        return f"the batch is in {path}"

    def remember_before(self, evaluate):
        """The evaluation before the first step: made once, and kept in before.json for a run that is resumed."""
        path = self.folder / "before.json"
        known = Evaluation.read(path) if self.main and self.resumed and path.is_file() else None
        known, = accelerate.utils.broadcast_object_list([known])
        if known is not None:
            return known
        before, text = evaluate(), None
        if self.main:
            text = json.dumps(dataclasses.asdict(before))
        with self.writes(path, len(text or "")):
            if self.main:
                replace_file(path, text)
        return before

    @contextmanager
    def writes(self, path, needed):
        """The main process writes inside; where it cannot, all stop with the reason, in one sentence."""
        with distributed.os_error_is_one_sentence(path, needed), distributed.writes(self.accelerator):
            yield

    def save(self, trainer, step, stop):
        """A checkpoint every `save_every` steps, and one when a signal asked to stop: its number, or 0. Then the run ends here."""
        if not stop and not (self.save_every and step % self.save_every == 0):
            return
        folder = self.folder / "checkpoints" / f"step-{step:06d}"
        with distributed.phase(self.accelerator, f"step {step}, (f) saving"):
            if self.main:
                distributed.to_disk(self.folder / "metrics.jsonl")      # the lines up to this step must outlive what the checkpoint does
            trainer.save_checkpoint(folder)
            with distributed.together(self.accelerator):
                problem = distributed.damage(folder) if self.main else None
                if problem is not None:
                    raise ValueError(f"{folder} was just written and is already damaged: {problem}; the disk cannot be trusted")
            for old in self.checkpoints()[self.keep_last:] if self.main else []:        # only now that the new one has been read back
                shutil.rmtree(old.rename(old.with_suffix(".partial")))      # a deletion that is cut short leaves no half under that name
        if stop:
            self.say(f"{signal.Signals(stop).name}: stopped after step {step}, which is saved in {folder}; --resume {self.folder} goes on")
            self.accelerator.wait_for_everyone()        # the launcher ends the others when the first leaves
            sys.exit(128 + stop)        # what a shell says of a process that a signal ended

    def save_final(self, trainer):
        """The trained policy, in final/: whole or not there."""
        with distributed.phase(self.accelerator, "final/"):
            folder, needed = self.folder / "final", trainer.bytes_to_save(optimizer=False)
            if self.main and folder.exists():       # of a run that was killed just after
                shutil.rmtree(folder)
            with distributed.whole_folder(self.accelerator, folder, needed) as partial:
                trainer.save_pretrained(partial)

    def checkpoints(self):
        """Newest first."""
        return sorted((self.folder / "checkpoints").glob("step-" + "[0-9]" * 6), reverse=True)

    def restore(self, trainer):
        """Into `trainer`, the newest whole checkpoint of a resumed run. -> the step it was made after; 0 = from the start."""
        if not self.resumed:
            return 0
        with distributed.phase(self.accelerator, "resuming"):
            newest = self.newest_whole() if self.main else None
            newest, = accelerate.utils.broadcast_object_list([newest])
            if newest is not None:
                trainer.load_checkpoint(newest, check=False)        # newest_whole has just done that
            done = trainer.steps_done
            self.say(f"resuming after step {done}")
            path = self.folder / "metrics.jsonl"        # what was recorded after the checkpoint is done again
            lines = path.read_text(encoding="utf-8").splitlines()[:done] if self.main and path.is_file() else []
            text = "".join(f"{line}\n" for line in lines)
            with self.writes(path, len(text)):
                if self.main:
                    replace_file(path, text)
        return done

    def newest_whole(self):
        """-> folder or None. Damaged ones are said, and put aside under another name: their step will be saved again."""
        for left in (self.folder / "checkpoints").glob("*.partial"):       # by a save or a deletion that was cut short
            shutil.rmtree(left)
        for folder in self.checkpoints():
            problem = distributed.damage(folder)
            if problem is None:
                return str(folder)
            aside = folder.with_name(f"{folder.name}.damaged")
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            self.say(f"passing over {folder}: {problem}; kept as {aside.name}")
        return None

    def finish(self, before, after, state_bytes, peak):
        with self.writes(self.folder / "curves.png", 150_000):      # the largest of what follows
            if self.main:
                self.write_report(before, after, state_bytes, peak)

    def write_report(self, before, after, state_bytes, peak):
        lines = [json.loads(line) for line in open(self.folder / "metrics.jsonl", encoding="utf-8")]
        rows = [line for line in lines if not line.get("ppo/bad_batch")]        # a batch that was left out has no statistics
        draw_curves(rows, self.folder / "curves.png")
        write_samples(before, after, self.folder / "samples.md")
        sides = {f"{name} {side}": getattr(evaluation, name) for side, evaluation in (("before", before), ("after", after))
                 for name in ("score", "distinct_bigrams")}
        summary = {**sides, "kl": rows[-1]["objective/kl"] if rows else 0.0, "steps": self.steps,
                   "batches left out": len(lines) - len(rows), "seconds": time.perf_counter() - self.started,
                   "seconds in steps": self.seconds, "peak memory bytes": peak,
                   "optimizer state bytes": state_bytes}
        replace_file(self.folder / "summary.json", json.dumps(summary, indent=1))      # last and whole: it says that the run is finished
        self.say(f"before: {before}\nafter:  {after}, KL {summary['kl']:.2f} nats\n{summary['seconds']:.0f} s, peak memory "
                 f"{summary['peak memory bytes'] / 1e6:.0f} MB; the model is in {self.folder / 'final'}, see also "
                 f"{self.folder / 'curves.png'} and samples.md")


def replace_file(path, content):
    """The old file or the new one, never half of one. content: text or bytes."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        distributed.to_disk(partial)
        os.replace(partial, path)
    except OSError:                 # it would take up room where there is none
        partial.unlink(missing_ok=True)
        raise


def first_free(prefix):
    """Make the first of prefix-1, prefix-2, ... that does not exist. Making it is the test: two runs may start at once."""
    for number in itertools.count(1):
        folder = Path(f"{prefix}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def unused(folder):
    """True for a folder that does not exist, is empty, or was begun by a run that ended before its first step."""
    files = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    begun = set(files) <= {"config.json", "config.json.partial", "metrics.jsonl"}
    return begun and sum(path.stat().st_size for name, path in files.items() if name == "metrics.jsonl") == 0


def draw_curves(rows, path):
    """rows: the lines of metrics.jsonl as dicts -> a picture of four panels."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = (("score", ["ppo/mean_raw_scores"]), ("KL to the reference (nats per response)", ["objective/kl"]),
              ("entropy (nats per token)", ["ppo/policy/entropy"]), ("losses", ["ppo/loss/policy", "ppo/loss/value"]))
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels):
        for name in names:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("PPO step")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write_samples(before, after, path, count=16):
    """The same prompts before and after; the prompt in bold, the response after it."""
    lines = [f"# Samples\n\nMean score on {len(before.scores)} held-out prompts: {before.score:.3f} before, {after.score:.3f} after.\n",
             "| | score | text |", "|---|---|---|"]
    for i in range(min(count, len(before.prompts))):
        for name, side in (("before", before), ("after", after)):
            text = f"**{side.prompts[i]}**{side.responses[i]}".replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {name} | {side.scores[i]:.2f} | {text} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        # Flags from the environment come last and win; README.md says what for.
        main(sys.argv[1:] + shlex.split(os.environ.get("PLAINPPO_ARGS", "")))
    except ValueError as error:      # what a person can mend is said in one sentence, without a traceback
        sys.exit(f"error: {error}")
