"""Train a language model by PPO, so that its texts get a high score from a reward. Read from the top.

  python scripts/train.py                      # the review writer, on a CPU or one GPU: make train
  C=scripts/accelerate_configs
  accelerate launch --config_file $C/multi_gpu.yaml --num_processes 4 scripts/train.py        # 4 GPUs
  accelerate launch --config_file $C/multi_cpu.yaml --num_processes 2 scripts/train.py --cpu  # 2 on a CPU
  accelerate launch --config_file $C/deepspeed_zero2.yaml --num_processes 4 scripts/train.py  # ZeRO-1, 2, 3
  python scripts/train.py --model_name ./my-model --reward_model ./my-classifier --prompts prompts.txt
  python scripts/train.py --reward_fn my_reward.py:score    # def score(prompts, responses) -> list of floats
  python scripts/train.py --resume runs/review-lm-1         # go on with a run that was stopped
  python scripts/train.py --plain                           # with the code of ppo_core.py, without speed.py

You should see a plan; then one line per step, with a score that rises and a KL of some tens at most; then the
mean score on held-out prompts, before and after. The run leaves in runs/<name>/:
    config.json     every setting, and the versions of the libraries
    metrics.jsonl   one line per step: every statistic but those per token; docs/metrics.md explains them
    before.json     the untrained policy's answers to the held-out prompts; after.json: the trained one's
    report.html     what PPO did, to look at: score against KL, and the texts, each token with its numbers
    newest.json     some responses of the newest step, for report.html while the run goes on
    curves.png, samples.md      the same in short: score, KL, entropy, losses; 16 prompts before and after
    summary.json    the result as numbers: scores, KL, seconds, peak memory, bytes of optimizer state
    bad_batch.safetensors  a batch that led to NaN or infinity, if there was one: see --on_bad_batch
    checkpoints/    the newest states of the run, from which --resume goes on
    final/          the trained policy with its value head; transformers loads it, too, without the head
"""
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# OpenMP reads this when torch is loaded. Without it, torch's threads wait for each other in a loop that never
# sleeps: beside another busy program on 2 cores, a step took 35 s instead of 2.4 s.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import torch
import transformers
from transformers import AutoTokenizer

import decoding
import distributed
import optim
import reference
import rewards
import speed
from adapters import AutoModelForCausalLMWithValueHead, lora_settings
from checkpoint import stop_signals
from checks import leave_out, loading, phase, time_limit
from ppo_core import BadNumbers, PPOConfig, PPOTrainer, knob
from report import token_numbers, write_report
from run_checkpoints import refuse_damaged, restore, save, save_final
from run_folder import Evaluation, RunFolder
from run_inputs import check_settings, decode_responses, load_prompts, parse, prompts_of_step
from run_plan import plan

ADAM_LEARNING_RATE = 1e-4       # for a few million parameters; a large model needs PPOConfig's 1.41e-5
LORA_LEARNING_RATE = 1e-3       # adapters need about ten times as much


@dataclass
class RunConfig(PPOConfig):
    """The settings of PPOConfig, some with a default for the small review model, and those of this script."""

    model_name: str = knob("assets/review-lm", "language model to train: a folder or a hub id")
    reward_model: Optional[str] = knob(
        "assets/review-sentiment", "text-classification model whose P(POSITIVE), or P(last label), is the "
                                   "score: a folder or a hub id")
    batch_size: int = knob(64, "responses per step and process")
    mini_batch_size: Optional[int] = knob(
        None, "responses per forward and backward pass and process; default: the largest divisor of "
              "batch_size / gradient_accumulation_steps up to 32")
    learning_rate: Optional[float] = knob(
        None, f"default: {ADAM_LEARNING_RATE}, {LORA_LEARNING_RATE} with --lora_r; for lion a third of these")
    init_kl_coef: float = knob(0.015, "reward lost per nat of KL to the reference, at the start")
    # ---- settings of this script
    plain: bool = knob(False, "train with PPOTrainer of ppo_core.py instead of speed.FastPPOTrainer")
    compile_decoding: bool = knob(False, "on a GPU: sample by one compiled step; for small models")
    steps: int = knob(60, "PPO steps; each is one batch of responses")
    output_dir: Optional[str] = knob(None, "folder for the run; default: runs/<model>-<first free number>")
    prompts: str = knob("assets/review-prompts.txt", "text file, one prompt per line")
    eval_prompts: int = knob(200, "last prompts of the file, not trained on, answered before and after")
    max_new_tokens: int = knob(24, "longest response, in tokens; it is shorter where EOS ends it")
    reward_fn: Optional[str] = knob(
        None, "path/to/file.py:function, (prompts, responses) -> list of floats; instead of reward_model")
    reward_timeout: float = knob(300.0, "seconds that the reward may take for one batch; 0 = no limit")
    on_bad_batch: Literal["stop", "skip"] = knob(
        "stop", "when a batch leads to NaN or infinity: stop, or skip it; bad_batch.safetensors keeps it")
    optimizer: Literal["adam", "sgd", "lion", "adam8bit"] = knob("adam", "adam8bit needs bitsandbytes")
    lr_scheduler: Literal["constant", "linear", "cosine", "exponential"] = knob("cosine", "over all `steps`")
    warmup_steps: int = knob(0, "steps over which the learning rate rises to its value")
    num_shared_layers: Optional[int] = knob(None, "first layers, frozen, shared with the reference")
    lora_r: Optional[int] = knob(None, "rank of LoRA adapters: they alone are trained, in all linear layers")
    reference_bits: Optional[Literal[8, 4]] = knob(None, "bits of the reference's weights")
    save_every: int = knob(20, "steps between checkpoints; 0 = only the one that Ctrl-C or SIGTERM leaves")
    keep_last: int = knob(2, "checkpoints kept; at least 2, because the newest may be damaged")
    resume: Optional[str] = knob(None, "run folder to go on with, from its newest whole checkpoint")
    collective_timeout: int = knob(600, "seconds that a process waits for the others before the run ends")
    cpu: bool = knob(False, "stay on the CPU where there is a GPU")

    def __post_init__(self):
        if self.learning_rate is None:
            self.learning_rate = optim.default_learning_rate(self.optimizer, adam_rate(self))
        if self.mini_batch_size is None and self.batch_size > 0:
            per_step = max(1, self.batch_size // self.gradient_accumulation_steps)
            self.mini_batch_size = max(n for n in range(1, min(32, per_step) + 1) if per_step % n == 0)
        super().__post_init__()
        check_settings(self)


def adam_rate(config):
    return ADAM_LEARNING_RATE if config.lora_r is None else LORA_LEARNING_RATE


def main(arguments=None):
    """-> None, or the exit code after a signal. An error inside a `phase` is reported with that phase."""
    # ------------------------------------------------------------------------------------------------ config
    config = parse(RunConfig, __doc__, arguments)
    trainer_class, logits_at_once = PPOTrainer, None
    if not config.plain:
        speed.tune_cpu()
        trainer_class, logits_at_once = decoding.fast_trainer(config.compile_decoding), speed.LOGITS_AT_ONCE
    # ----------------------------------------------------------------------------------------------- machine
    accelerator = distributed.start(config.log_with, "runs", None, config.cpu, config.collective_timeout)
    run = RunFolder(config, accelerator)
    if run.finished():
        return distributed.end(accelerator)
    distributed.seed_everything(config.seed)
    # ------------------------------------------------------------------------------------------------ models
    with phase("set-up of the models"):
        model, tokenizer, ref_model = load_models(config, accelerator)
    # --------------------------------------------------------------------------------------------- optimizer
    parameters = optim.trainable_parameters(model, config.value_learning_rate)
    optimizer = optim.make_optimizer(config.optimizer, parameters, config.learning_rate, adam_rate(config))
    lr_scheduler = optim.make_schedule(config.lr_scheduler, optimizer, config.steps, config.warmup_steps)
    # ------------------------------------------------------------------------------------------------ reward
    with phase("set-up of the reward"):
        reward = load_reward(config, accelerator)
    # ----------------------------------------------------------------------------------------------- prompts
    with phase("set-up of the prompts"):
        train_prompts, eval_prompts = load_prompts(find(config.prompts), config, tokenizer,
                                                   accelerator.num_processes, model.config)
    # -------------------------------------------------------------------------------------------------- loop
    run.say(plan(config, accelerator, model, ref_model, logits_at_once, train_prompts))
    with phase("set-up of the trainer"):
        trainer = run.trainer = trainer_class(config, model, ref_model, tokenizer, optimizer=optimizer,
                                              lr_scheduler=lr_scheduler, accelerator=accelerator)
    before = run.before(lambda: evaluate(trainer, reward, eval_prompts))
    # From here on each process draws different random numbers, so that it samples different responses.
    distributed.seed_everything(config.seed, rank=accelerator.process_index)
    with phase("resuming"):
        first = restore(trainer, run)
    with stop_signals(accelerator) as signal_received:
        for step in range(first, config.steps + 1):
            one_step(trainer, reward, train_prompts, step, run)
            with phase(f"step {step}, (f) saving"):
                stop = save(trainer, run, step, signal_received())
            if stop:
                return 128 + stop
    with phase("final/"):
        save_final(trainer, run.folder / "final")
    after = evaluate(trainer, reward, eval_prompts)
    run.finish(before, after, optim.state_bytes(trainer.optimizer), write_report)
    distributed.end(accelerator)


def one_step(trainer, reward, train_prompts, step, run):
    """PPO step number `step`: sample responses, score them, train on them.

    `leave_out` skips a batch that led to NaN or infinity, or ends the run, as --on_bad_batch says.
    """
    config, accelerator, started = trainer.config, trainer.accelerator, time.perf_counter()
    prompts = prompts_of_step(train_prompts, step, config, accelerator)
    queries, texts = [prompt["tokens"] for prompt in prompts], [prompt["text"] for prompt in prompts]
    with leave_out(run):
        # (a) rollout: sample a response to each prompt. `together` raises the error of one process on all.
        with phase(f"step {step}, (a) rollout"), distributed.together(accelerator, BadNumbers):
            responses = trainer.generate(queries, batch_size=len(queries), return_prompt=False,
                                         max_new_tokens=config.max_new_tokens)
        rolled_out = time.perf_counter()
        # (b) score: one number per response
        with phase(f"step {step}, (b) score"), distributed.together(accelerator):
            answers = decode_responses(trainer.tokenizer, queries, responses)
            with time_limit(config.reward_timeout):
                scores = rewards.score_texts(reward, texts, answers, finite=False)
        scored = time.perf_counter()
        # (c) rewards
        # (d) advantages
        # (e) update: all three are in PPOTrainer.step, under the same letters
        with phase(f"step {step}, (c) rewards, (d) advantages, (e) update"):
            stats = trainer.step(queries, responses, scores)
        # (f) book-keeping
        with phase(f"step {step}, (f) book-keeping"):
            stats["time/rollout"], stats["time/score"] = rolled_out - started, scored - rolled_out
            stats["ppo/bad_batch"] = 0.0
            trainer.log_stats(stats, {"query": texts, "response": answers}, scores)
            run.record(step, stats, time.perf_counter() - started, Evaluation(texts, answers, scores))


def find(name):
    """-> `name`, a path or a hub id; or its path in the project's folder, if it exists only there.

    ValueError if plainppo wrote this folder and a file in it has changed since.
    """
    found = str(ROOT / name) if not os.path.exists(name) and (ROOT / name).exists() else name
    refuse_damaged(found)
    return found


def load_models(config, accelerator):
    """-> the policy, its tokenizer and its reference: a frozen copy, or the same model in 8 or 4 bits."""
    transformers.utils.logging.disable_progress_bar()
    path = find(config.model_name)
    lora = None if config.lora_r is None else lora_settings(config.lora_r)
    with loading(path):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(path, v_head_init_strategy="zero",
                                                                  peft_config=lora)
    tokenizer = load_tokenizer(path)
    if config.reference_bits is None:
        with distributed.whole_weights(model):
            return model, tokenizer, reference.create_reference_model(model, config.num_shared_layers)
    bits = {f"load_in_{config.reference_bits}bit": True}
    if accelerator.device.type == "cpu":        # otherwise transformers would take a GPU, also with --cpu
        bits["device_map"] = {"": "cpu"}
    with distributed.zero3_init_disabled(accelerator), loading(path):
        reference_model = AutoModelForCausalLMWithValueHead.from_pretrained(path, **bits)
    return model, tokenizer, reference_model


def load_tokenizer(path):
    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokens = tokenizer("a").input_ids
    if not tokens:
        raise ValueError(f"{path} has no usable tokenizer: it makes 0 tokens of 'a'; save the model's "
                         "tokenizer beside its weights")
    return tokenizer


def load_reward(config, accelerator):
    """-> function(prompts, responses) -> scores. ZeRO-3 must not shard a reward model: it is not trained."""
    if config.reward_fn is not None:
        return rewards.load_reward_fn(config.reward_fn)
    path = find(config.reward_model)
    with distributed.zero3_init_disabled(accelerator), loading(path):
        return rewards.load_reward_model(path, accelerator.device)


def evaluate(trainer, reward, prompts):
    """-> Evaluation. It has its own random numbers, so that training is the same with and without it."""
    queries, texts = [prompt["tokens"] for prompt in prompts], [prompt["text"] for prompt in prompts]
    device = trainer.accelerator.device
    with phase("evaluation"):
        with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
            torch.manual_seed(1234)
            responses = trainer.generate(queries, batch_size=100, return_prompt=False,
                                         max_new_tokens=trainer.config.max_new_tokens)
        answers = decode_responses(trainer.tokenizer, queries, responses)
        with time_limit(trainer.config.reward_timeout):
            scores = rewards.score_texts(reward, texts, answers)
        return Evaluation(texts, answers, scores, token_numbers(trainer, queries, responses, scores))


if __name__ == "__main__":
    try:
        # Flags from the environment come last, so they win; docs/distributed.md says why one would use them.
        sys.exit(main(sys.argv[1:] + shlex.split(os.environ.get("PLAINPPO_ARGS", ""))))
    except ValueError as error:         # A mistake that the user can correct is one sentence, no traceback.
        sys.exit(f"error: {error}")
