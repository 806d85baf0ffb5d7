"""What a run of scripts/train.py starts from: its settings and its prompts.

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
    if config.plain and config.compile_decoding:
        raise ValueError("plain and compile_decoding are both given, but the plain trainer samples by "
                         "transformers' generate; leave one of them out")
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
