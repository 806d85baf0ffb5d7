"""What a run of scripts/train.py starts from: its settings, its prompts, and the plan that it prints.

Why: a wrong setting or prompt is refused at the start, and not after an hour, when it is first used.
Tested by tests/test_train.py and tests/test_bad_input.py.
"""
import argparse
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import HfArgumentParser

import distributed
import reference

# --------------------------------------------------------------------------------------- settings and prompts


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the manual with its own line breaks, and each flag with its default."""


def parse(config_class, manual, arguments):
    """Flags -> settings. With --resume they are those of the run. ValueError: a flag differs."""
    parser = HfArgumentParser(config_class, description=manual, formatter_class=Help)
    config, = parser.parse_args_into_dataclasses(arguments)
    if config.resume is None:
        return config
    saved = saved_settings(config.resume, config_class)
    parser.set_defaults(**saved)
    given, = parser.parse_args_into_dataclasses(arguments)
    for name, value in saved.items():
        if name != "resume" and getattr(given, name) != value:
            raise ValueError(
                f"--resume {config.resume} goes on with that run's own settings, where {name} is {value}, "
                f"not {getattr(given, name)}; leave --{name} out, or start a new run")
    given.output_dir = config.resume
    return given


def check_settings(config):
    """ValueError for a setting of scripts/train.py that cannot work."""
    for name in ("steps", "max_new_tokens", "eval_prompts", "collective_timeout", "lora_r"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.save_every < 0 or config.keep_last < 2:
        raise ValueError(f"save_every is {config.save_every} and keep_last is {config.keep_last}; "
                         "use at least 0 and at least 2")
    if not 0 <= config.reward_timeout < float("inf") or config.on_bad_batch not in ("stop", "skip"):
        raise ValueError(
            f"reward_timeout is {config.reward_timeout} and on_bad_batch is {config.on_bad_batch!r}; "
            "use at least 0 seconds (0 = no limit) and 'stop' or 'skip'")
    for name in ("num_shared_layers", "reference_bits"):
        if config.lora_r is not None and getattr(config, name) is not None:
            raise ValueError(f"lora_r is {config.lora_r} and {name} is {getattr(config, name)}, but with "
                             "adapters the model itself is the reference; leave one of them out")
    if config.reference_bits is not None and config.num_shared_layers is not None:
        raise ValueError(
            f"reference_bits is {config.reference_bits} and num_shared_layers is {config.num_shared_layers}, "
            "but a layer stored in fewer bits cannot be shared; leave one of them out")


def saved_settings(folder, config_class):
    """-> the settings in a run's config.json. ValueError: it cannot be read, or has been changed."""
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        settings = {field.name: saved[field.name] for field in dataclasses.fields(config_class)}
        config_class(**settings)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"--resume {folder}: {path} cannot be read ({type(error).__name__}); "
                         "name a folder that a run was made in") from error
    if saved.get("sha256", digest(settings)) != digest(settings):
        raise ValueError(
            f"--resume {folder}: {path} is not what the run wrote: its SHA-256 differs, and with other "
            "settings it would be another run; put the file back, or start a new run from the newest "
            "checkpoint's model/")
    return settings


def digest(settings):
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def load_prompts(path, config, tokenizer, num_processes, model_config):
    """-> two lists of {"text", "tokens" (Q,), "line"}: prompts to train on, and to evaluate on.

    The last `eval_prompts` of the file are those to evaluate on.
    """
    prompts, vocabulary = [], getattr(model_config, "vocab_size", None)
    for text, number in read_lines(path).items():
        try:
            tokens = tokenizer(text).input_ids
        # The tokenizers library raises plain Exception, so there is no narrower class.
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(f"{path}, line {number}: the tokenizer cannot read it ({reason}); "
                             "leave it out") from error
        if not tokens:
            raise ValueError(f"{path}, line {number}: {text[:40]!r} has no tokens; leave it out")
        if vocabulary is not None and max(tokens) >= vocabulary:
            raise ValueError(
                f"{path}, line {number}: {text[:40]!r} has token {max(tokens)} but the model has "
                f"{vocabulary}: the tokenizer is another model's; give the model its own tokenizer")
        prompts.append({"text": text, "tokens": torch.tensor(tokens), "line": number})
    needed, for_evaluation = config.batch_size * num_processes, config.eval_prompts
    if len(prompts) < needed + for_evaluation:
        raise ValueError(
            f"{path} has {len(prompts)} different prompts but a step takes {needed} (batch_size x processes) "
            f"and {for_evaluation} are kept for evaluation; use a smaller --eval_prompts and --batch_size, "
            "or more prompts")
    longest = max(prompts, key=lambda prompt: len(prompt["tokens"]))
    limit = getattr(model_config, "max_position_embeddings", None) or tokenizer.model_max_length
    if len(longest["tokens"]) + config.max_new_tokens > limit:
        raise ValueError(
            f"{path}, line {longest['line']}: the prompt {longest['text'][:40]!r} has "
            f"{len(longest['tokens'])} tokens and max_new_tokens is {config.max_new_tokens}, "
            f"but the model has {limit} positions; shorten one of them")
    return prompts[:-for_evaluation], prompts[-for_evaluation:]


def read_lines(path):
    """-> {line: its number in the file}, without empty and repeated lines. The file is UTF-8.

    A repeated line counts once, because otherwise a prompt to train on could also be one to evaluate on.
    """
    if not os.path.isfile(path):
        raise ValueError(f"prompts names {str(path)!r}, which is not a file; "
                         "give a text file with one prompt per line")
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    except UnicodeDecodeError as error:
        before, byte = error.object[:error.start], error.object[error.start]
        number = len((before.decode("utf-8") + "-").splitlines())
        raise ValueError(f"{path}, line {number}: byte {byte:#x} is not UTF-8; "
                         "save the file as UTF-8, or correct that line") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            found.setdefault(line.strip(), number)
    if not found:
        raise ValueError(f"{path} has 0 prompts: all of its {len(lines)} lines are empty; "
                         "give a text file with one prompt per line")
    return found


def prompts_of_step(prompts, step, config, accelerator):
    """-> this process's prompts of a step. They follow from seed and step, so a resumed run gets the same."""
    per_step = config.batch_size * accelerator.num_processes
    # Each pass over the prompts has another order, and leaves out those that do not fill its last batch.
    pass_number, position = divmod(step - 1, len(prompts) // per_step)
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + pass_number)
    order = torch.randperm(len(prompts), generator=generator)
    start = position * per_step + accelerator.process_index * config.batch_size
    return [prompts[i] for i in order[start:start + config.batch_size]]


def decode_responses(tokenizer, queries, responses):
    """-> texts. Each is decoded with its query, because alone it may lose the space before its first word."""
    rows = [torch.cat([query, response.to(query.device)]) for query, response in zip(queries, responses)]
    texts, starts = (tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (rows, queries))
    return [text[len(start):] for text, start in zip(texts, starts)]


# -------------------------------------------------------------------------------------------------- the plan


def plan(config, accelerator, model, ref_model, logits_at_once):
    """-> the text that main() prints before the first step: batches, parameters, memory and trainer.

    logits_at_once: how many logits the fast trainer holds at most; None for the plain trainer, which holds
    all logits of a mini-batch.
    """
    processes, stage = accelerator.num_processes, distributed.zero_stage(accelerator)
    trained = sum(distributed.whole_numel(p) for p in model.parameters() if p.requires_grad)
    frozen = sum(distributed.whole_numel(p) for p in model.parameters() if not p.requires_grad)
    shared = reference.shared_bytes(model, ref_model)
    added = sum(p.nbytes for p in ref_model.parameters()) - shared      # an int8 weight has 1 byte
    if model.is_peft_model:         # the frozen model is the reference, too
        shared = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    # ZeRO-1 divides the optimizer's state among the processes, 2 also the gradients, 3 also the weights.
    divisor = {first: processes if stage >= first else 1 for first in (1, 2, 3)}
    weights = (sum(p.nbytes for p in model.parameters()) + added) / divisor[3]
    gradients = 4 * trained / divisor[2]
    state = {"adam": 8, "lion": 4, "sgd": 0, "adam8bit": 2}[config.optimizer] * trained / divisor[1]
    vocabulary = model.pretrained_model.get_output_embeddings().out_features
    logits = logits_bytes(config, vocabulary, stage, logits_at_once)
    gathers = " (ZeRO-3; a rollout gathers the weights)" if stage == 3 else ""
    where = f" on each of {processes} processes" if processes > 1 else ""
    trainer = ("plain: the code of ppo_core.py alone" if logits_at_once is None else
               "fast: the same algorithm in less time and memory; --plain takes the plain one")
    return "\n".join([
        f"batch      {config.batch_size} responses a step{where}, {config.ppo_epochs} epochs of "
        f"{config.batch_size // config.backward_batch_size} optimizer step(s), each over "
        f"{config.gradient_accumulation_steps} mini-batch(es) of {config.mini_batch_size}; {config.steps} "
        f"steps = {config.steps * config.batch_size * processes} responses",
        f"parameters {trained / 1e6:.2f} M trained, {frozen / 1e6:.2f} M frozen; the reference shares "
        f"{shared / 1e6:.1f} MB and adds {added / 1e6:.1f} MB",
        f"memory     about {(weights + gradients + state + logits) / 1e6:.0f} MB{where} on "
        f"{accelerator.device} beside activations and the reward model: weights {weights / 1e6:.0f}, "
        f"gradients {gradients / 1e6:.0f}, optimizer {state / 1e6:.0f}, logits {logits / 1e6:.0f}{gathers}",
        f"trainer    {trainer}"])


def logits_bytes(config, vocabulary, stage, logits_at_once):
    """-> most bytes of logits and of tensors of their shape that an update holds at once, all in float32."""
    numbers = config.mini_batch_size * config.max_new_tokens * vocabulary
    if logits_at_once is None:
        return 4 * 4 * numbers      # the logits, their gradient, and two intermediate results of softmax
    if stage < 3 and config.kl_penalty != "full":
        numbers = min(numbers, logits_at_once)
    return 2 * 4 * numbers          # the logits, and their probabilities, which the gradient overwrites
