"""Says in one sentence what is wrong: arguments, batches, NaN, a process that hangs, a GPU without memory.

Why: NaN in one score becomes NaN in every weight with the next optimizer step, and hours later nobody can
tell where it came from. A wrong batch on one process of several leaves the others waiting for ever. Each
function here looks at one thing, at the moment when it can still be named and nothing has been changed by it.
Source: the mistakes are those of public issue threads about PPO for language models.
Differs from TRL 0.11.4 in: there, only the types, number and dimensions of a batch are checked.
Shapes: B responses of R tokens at most, as ppo_core.py draws it.
Copy me: needs torch, transformers and accelerate. ppo_core.py calls each function once; to train without this
file, see docs/reading.md, "Taking a power away".
Tested by tests/test_checks.py, tests/test_bad_input.py and tests/test_survival.py.
"""
import faulthandler
import json
import math
import os
import platform
import re
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

# -------------------------------------------------------------------------------- wrong arguments and batches


def describe(items):
    """What a wrong argument is, in a few words: its type, how many items it has, and of which kinds."""
    if not isinstance(items, (list, tuple)):
        shape = f" of shape {tuple(items.shape)}" if torch.is_tensor(items) else ""
        return f"a {type(items).__name__}{shape}"
    kinds = sorted({f"tensor of shape {tuple(item.shape)}" if torch.is_tensor(item) else type(item).__name__
                    for item in items})
    return f"a {type(items).__name__} of {len(items)}: {', '.join(kinds[:3])}"


def check_inputs(config, model, ref_model, tokenizer, num_shared_layers, optimizer, lr_scheduler):
    """The arguments of PPOTrainer, in the order in which they are given."""
    if not hasattr(config, "ppo_epochs"):
        raise ValueError(f"config is a {type(config).__name__}; give a PPOConfig")
    for name, network in (("model", model), ("ref_model", ref_model)):
        has_head = hasattr(network, "v_head") and hasattr(network, "pretrained_model")
        if not has_head and not (name == "ref_model" and (network is None or hasattr(network, "in_force"))):
            raise ValueError(f"{name} is a {type(network).__name__}; wrap it with "
                             "AutoModelForCausalLMWithValueHead.from_pretrained(...)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; give the model's own, from "
                         "AutoTokenizer.from_pretrained")
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has 0 end-of-text tokens, so no response could end; set "
                         "tokenizer.eos_token")
    if (model.is_loaded_in_8bit or model.is_loaded_in_4bit) and not model.is_peft_model:
        raise ValueError("model is loaded in 8 or 4 bits, and 0 of its quantized weights can be trained; "
                         "load it without, and only the reference in fewer bits, or give it adapters with "
                         "peft_config=")
    if model.is_peft_model and ref_model is not None and not hasattr(ref_model, "in_force"):
        raise ValueError("a ref_model is given beside a model with adapters, whose reference is the same "
                         "model without them; leave ref_model out")
    if ref_model is not None and num_shared_layers is not None:
        raise ValueError(f"num_shared_layers is {num_shared_layers} but a ref_model is given; leave one of "
                         "them out, or make the reference with create_reference_model(model, "
                         "num_shared_layers)")
    if optimizer is not None:
        check_optimizer(optimizer, lr_scheduler, model)
        rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        if config.value_learning_rate not in (None, *rates):
            raise ValueError(f"value_learning_rate is {config.value_learning_rate} but the optimizer that is "
                             f"given has learning rates {rates}; give it optim.trainable_parameters(model, "
                             "value_learning_rate)")
    elif lr_scheduler is not None:
        raise ValueError("an lr_scheduler is given but 0 optimizers; pass the optimizer that it was built "
                         "over")


def check_optimizer(optimizer, lr_scheduler, model):
    """The optimizer trains this model, and the schedule belongs to this optimizer and needs no metric."""
    trained = {id(p) for p in model.parameters()}
    strangers = sum(id(p) not in trained for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise ValueError(f"{strangers} of the optimizer's parameters are not the model's; build it over "
                         "model.parameters()")
    if lr_scheduler is None:
        return
    schedules = torch.optim.lr_scheduler
    kind = type(lr_scheduler)
    if not isinstance(lr_scheduler, schedules.LRScheduler) or kind is schedules.ReduceLROnPlateau:
        raise ValueError(f"lr_scheduler is a {kind.__name__}; give one from torch.optim.lr_scheduler that "
                         "steps without a metric")
    if lr_scheduler.optimizer is not optimizer:
        raise ValueError("the lr_scheduler was built over another optimizer than the one passed; build it "
                         "over that one")


def too_long(tokens, query_tokens, limit):
    return ValueError(f"a query of {query_tokens} tokens with its response needs {tokens} positions but the "
                      f"model has {limit}; use at most {max(0, limit - query_tokens)} response tokens or "
                      "shorter queries")


def check_batch(trainer, queries, responses, scores, response_masks):
    """The arguments of PPOTrainer.step, before anything changes. A wrong one on one process stops all."""
    size = trainer.config.batch_size
    limit = getattr(trainer.language_model.config, "max_position_embeddings", None) or math.inf
    with trainer.together():
        lists = {"queries": queries, "responses": responses, "response_masks": response_masks}
        for name, items in lists.items():
            if items is None and name == "response_masks":
                continue
            listed = isinstance(items, (list, tuple))
            if not listed or not all(torch.is_tensor(item) and item.ndim == 1 for item in items):
                raise ValueError(f"{name} must be a list of tensors of shape (tokens,), got "
                                 f"{describe(items)}")
            if len(items) != size:
                raise ValueError(f"{name} has {len(items)} samples but batch_size is {size}; they must be "
                                 "equal")
        listed = isinstance(scores, (list, tuple)) or getattr(scores, "ndim", 0) > 0
        if not listed or len(scores) != size:
            raise ValueError(f"scores must be {size} numbers, one per response (batch_size), got "
                             f"{describe(scores)}")
        for i, (query, response) in enumerate(zip(queries, responses)):
            mask = response if response_masks is None else response_masks[i]
            lengths_fit = 0 < len(query) <= limit - len(response) and len(mask) == len(response)
            if not lengths_fit or query.is_floating_point() or response.is_floating_point():
                refuse_sample(i, query, response, mask, limit)
        try:
            list(map(float, scores))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            check_token_scores(trainer.config, scores, responses, response_masks, error)
    trainer.where = f"step {trainer.steps_done + 1}"
    trainer.checked_batch = (queries, responses, scores)        # for a BadNumbers that may follow


def check_token_scores(config, scores, responses, masks, error):
    """Called where some score is not one number: then each has to be a tensor (R_i,), a score for each token.

    error: of the conversion to float.
    """
    if config.use_score_scaling or config.score_clip is not None:
        raise ValueError("not every score is 1 number, but use_score_scaling and score_clip are made for 1 "
                         "per response; give numbers, or turn both off") from error
    for i, (score, response) in enumerate(zip(scores, responses)):
        if not torch.is_tensor(score) or score.shape != response.shape:
            found = f"a tensor of shape {tuple(score.shape)}" if torch.is_tensor(score) else repr(score)
            raise ValueError(f"score {i} of {len(scores)} is {found} and its response has {len(response)} "
                             "tokens; give one number for each response, or one for each token of all of them"
                             ) from error
        if masks is not None and bool(score[(masks[i] == 0).to(score.device)].any()):
            raise ValueError(f"score {i} is not 0 at a token whose response_mask is 0; the policy did not "
                             "choose that token, so set its score to 0") from error


def refuse_sample(i, query, response, mask, limit):
    """Say what is wrong with sample number i. query (Q,), response (R,), mask (R,) if it is right."""
    if query.is_floating_point() or response.is_floating_point():
        raise ValueError(f"sample {i} has floating-point tokens; queries and responses are integer ids")
    if len(query) == 0:
        raise ValueError(f"query {i} has 0 tokens; give at least 1, such as the tokenizer's BOS")
    if len(mask) != len(response):
        raise ValueError(f"response_masks[{i}] has {len(mask)} entries but response {i} has {len(response)} "
                         "tokens; they must be equal")
    raise too_long(len(query) + len(response), len(query), limit)


# -------------------------------------------------------------------------------- numbers that are not finite


class BadNumbers(ValueError):
    """NaN or infinity, refused before it has moved any weight. `step` raises it on all processes together.

    stage: "weights", "scores", "log-probs", "reference log-probs", "values", "rewards", "loss", "gradients"
    or "rollout". queries, responses, scores: the batch of this process as it was given; after a rollout, the
    queries alone.
    """
    stage, queries, responses, scores = None, (), (), ()


WEIGHTS = ("the model's weights are not finite, {} first; go back to an older checkpoint, with a lower "
           "learning rate")
# Of ppo_core.TERMS, those that stop an update when they are not finite, and the stage that the sentence
# names. An infinite ratio of finite log-probs is not among them: that policy moved too far, and
# ratio_threshold skips the step.
STAGES = {"policy/policykl": "log-probs", "val/vpred": "values", "loss/value": "loss", "loss/policy": "loss"}


def bad_numbers(trainer, stage, problem):
    """-> the exception. problem: half a sentence."""
    error = BadNumbers(f"{trainer.where}: {problem}")
    error.stage, (error.queries, error.responses, error.scores) = stage, trainer.checked_batch
    return error


def describe_sample(trainer, stage, sample, position, number):
    """-> half a sentence. position: the sample's place in the batch, or in the optimizer step."""
    remedy = ("mend or leave out that sample" if stage in ("scores", "rewards") else
              "look at that sample, or lower the learning rate")
    verb = "is" if stage == "loss" else "are"
    return (f"the {stage} of sample {sample} of {trainer.config.batch_size} (mini-batch "
            f"{1 + position // trainer.config.mini_batch_size}) {verb} {number}; nothing was changed by it: "
            f"{remedy}")


def check_weights(trainer):
    """BadNumbers on all processes if a weight is not finite: then no batch is to blame."""
    name = trainer.first_bad_weight()
    with trainer.together(BadNumbers):
        if name is not None:
            raise bad_numbers(trainer, "weights", WEIGHTS.format(name))


def check_numbers(trainer, batch):
    """Refuse a batch before it moves a weight. Costs one sum of a number over all processes.

    batch: of PPOTrainer.step, with raw_scores (B,) and (B, R) tensors that are 0 outside the mask. In this
    order, the first cause is named: what is computed from it is not finite either.
    """
    rows = {"scores": batch["raw_scores"][:, None], "log-probs": batch["logprobs"],
            "reference log-probs": batch["ref_logprobs"], "values": batch["values"],
            "rewards": batch["rewards"]}
    stage = next((stage for stage, tensor in rows.items() if not tensor.isfinite().all()), None)
    failed = torch.tensor(float(stage is not None), device=batch["mask"].device)
    if trainer.reduce(failed) > 0:
        refuse_batch(trainer, stage, rows.get(stage))


def refuse_batch(trainer, stage, rows):
    """rows: (B, 1) or (B, R) with a number that is not finite; None on a process whose numbers all are."""
    check_weights(trainer)          # first: what follows from a weight that is not finite is not either
    with trainer.together(BadNumbers):
        if stage is not None:
            sample = int((~rows.isfinite()).any(1).nonzero()[0])
            number = next(value for value in rows[sample].tolist() if not math.isfinite(value))
            raise bad_numbers(trainer, stage, describe_sample(trainer, stage, sample, sample, number))


def check_update(trainer, sums, terms, index):
    """Refuse an optimizer step on rows `index` (n,) of which a sum is not finite.

    sums: {term: sum over all processes}, so all processes decide alike. terms: (TERMS, n) of this process. An
    infinite ratio of finite log-probs passes: ratio_threshold skips that step.
    """
    far = not math.isfinite(sums["policy/ratio_mean"])      # the policy moved too far
    bad = [name for name in STAGES if not math.isfinite(sums[name]) and not (far and name == "loss/policy")]
    if bad:
        refuse_update(trainer, STAGES[bad[0]], terms[list(sums).index(bad[0])], index)


def refuse_update(trainer, stage, numbers, index):
    """numbers: (n,), of the samples `index` (n,) of this process. The bad one may be on another process."""
    trainer.drop_gradients()
    with trainer.together(BadNumbers):
        if not numbers.isfinite().all():
            position = int((~numbers.isfinite()).nonzero()[0])
            sample, number = int(index[position]), abs(float(numbers[position]))
            raise bad_numbers(trainer, stage, describe_sample(trainer, stage, sample, position, number))


def check_gradients(trainer, norm, index):
    """Refuse an optimizer step whose norm is not finite. norm: None if no step was tried, or in fp16."""
    if norm is not None and not math.isfinite(norm):
        refuse_gradients(trainer, index)


def refuse_gradients(trainer, index):
    bad = [name for name, p in trainer.language_model.named_parameters()
           if p.grad is not None and not p.grad.isfinite().all()]
    trainer.drop_gradients()
    samples = ", ".join(map(str, index.tolist()))
    with trainer.together(BadNumbers):
        raise bad_numbers(trainer, "gradients", f"the gradient of {bad[0] if bad else 'the weights'} is not "
                                                f"finite, over samples {samples} of "
                                                f"{trainer.config.batch_size}; no weight was moved by it")


def check_ratio(trainer, log_ratio, mask, first):
    """Before the first optimizer step the ratio must be 1: the same network computed both log-probs.

    log_ratio, mask: (b, r). first: no weight has moved yet. In half precision, and in TF32, a logit of 100
    is rounded to 0.5, so there the mean over tokens is compared.
    """
    if not first:
        return
    half = (trainer.accelerator.mixed_precision != "no" or torch.backends.cuda.matmul.fp32_precision == "tf32"
            or any(p.dtype != torch.float32 for p in trainer.model.parameters()))
    difference, tolerance = log_ratio.detach().abs(), 0.1 if half else 1e-3
    worst = float(difference.sum() / mask.sum().clamp(min=1) if half else difference.max())
    fine = worst <= tolerance or not math.isfinite(worst)       # check_update names what is not finite
    if trainer.reduce(torch.tensor(0.0 if fine else 1.0, device=log_ratio.device)) > 0:
        refuse_ratio(worst, tolerance)


def refuse_ratio(worst, tolerance):
    """All processes raise, though the difference may be too large on one of them only."""
    raise RuntimeError(f"the ratio is not 1 before the first update: log-probs differ by {worst:.3g} nats "
                       f"here, {tolerance} is allowed. Usual causes: a layer that behaves differently in "
                       "train and eval mode (dropout under another name, batch norm), weights changed "
                       "between generate() and step(), or a model that ignores position_ids, the mask or "
                       "its cache")


@dataclass
class WatchLogits:
    """Among the logits processors of `generate`: refuses logits that are not finite. torch.multinomial would
    raise from inside, and on a GPU end the whole process.

    On this process alone, because the others may not be generating at the same time. Where a forward pass is
    a collective operation (synced) nothing is raised, or the others would wait for ever: the row is written
    from uniform logits, and step() refuses it. samples: (rows,), the number of the query of each row; None =
    in order, as in `generate`.
    """

    trainer: object
    model: object
    synced: bool
    first: int                  # the number of the first query of this batch among all queries
    rows: int                   # queries in this batch
    samples: object = None
    changes_nothing = True   # the distribution stays as it is, so speed.py may sample by itself and call this

    def __call__(self, input_ids, scores):
        """How `generate` calls it. scores: logits (rows, V), given back as they are."""
        # A maximum hands on NaN and infinity. -inf is a token that a model rules out, unless all of them are.
        bad = ~scores.amax(-1).isfinite()                                                            # (rows,)
        if self.synced:
            return scores.masked_fill_(bad[:, None], 0.0)
        if bad.any():
            row = int(bad.nonzero()[0])
            # a beam search has several rows for a query
            sample = row * self.rows // len(bad) if self.samples is None else int(self.samples[row])
            refuse_rollout(self.trainer, self.model, self.first + sample)
        return scores


def refuse_rollout(trainer, model, sample):
    """On this process alone: the logits of query number `sample` are not finite."""
    name = next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)
    queries = trainer.checked_batch[0]
    cause = "though every weight is; lower the learning rate" if name is None else WEIGHTS.format(name)
    error = BadNumbers(f"step {trainer.steps_done + 1}, rollout: the logits of sample {sample} of "
                       f"{len(queries)} are not finite, {cause}")
    error.stage, error.queries = "rollout" if name is None else "weights", queries
    raise error


def watch_rollout(trainer, model, queries, rows, arguments):
    """Check the batch queries[rows] and its positions. -> logits processors for `generate`."""
    part = queries[rows]
    wrong = next((q.ndim for q in part if torch.is_tensor(q) and q.ndim != 1), None)
    if wrong is not None:
        raise ValueError(f"query_tensor has {wrong} dimensions; give a tensor of shape (Q,) or a list of "
                         "them")
    if not all(torch.is_tensor(q) and len(q) > 0 for q in part):
        raise ValueError("queries must be tensors of shape (Q,) with at least 1 token each, got "
                         f"{describe(part)}")
    longest = max(len(q) for q in part)
    tokens = max(longest + arguments.get("max_new_tokens", 0), arguments.get("max_length", 0))
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    if tokens > limit:
        raise too_long(tokens, longest, limit)
    trainer.checked_batch = (queries, (), ())
    others = [p for p in arguments.get("logits_processor") or () if not isinstance(p, WatchLogits)]
    return [*others, WatchLogits(trainer, model, arguments["synced_gpus"], rows.start, len(part))]


# ----------------------------------------------------------------------------- around a run: scripts/train.py
# Four contexts, each with one argument: contextlib.nullcontext can take the place of each of them.

_phase = "the start"            # the phase that this process entered last, for messages


@contextmanager
def leave_out(run):
    """Context of one step. A batch that is refused inside is kept on the disk, and the run stops, or goes on
    without it, as config.on_bad_batch says.

    run: a RunFolder, whose `trainer` is the trainer of the run. BadNumbers was raised on all processes
    together.
    """
    try:
        yield
    except BadNumbers as error:
        trainer, step = run.trainer, run.trainer.steps_done + 1
        queries, responses, scores = trainer.checked_batch   # of this process, also where another one refused
        where = run.keep_batch(queries, responses, scores, step, error)
        trainer.where = f"after step {trainer.steps_done}"
        check_weights(trainer)          # raises if the weights are to blame: then no other batch would help
        if not responses:          # the policy cannot write a response, so it could not write the next either
            raise BadNumbers(f"{error} ({where})") from error
        if trainer.config.on_bad_batch == "stop":
            raise BadNumbers(f"{error} ({where}; a new run with --on_bad_batch skip would go on with the "
                             "next)") from error
        trainer.count_step()
        run.left_out(step, error, where)


@contextmanager
def time_limit(seconds, grace=5):
    """End the whole process with one sentence and exit code 1 when the reward inside takes longer; 0 = no
    limit.

    A call that never returns can be neither asked to stop nor waited for: a lock, a socket without a
    time-out, a loop in C. So a thread watches the clock, and the reward stays in the main thread, where its
    sqlite connection and its GPU are. C code that never releases Python's lock, such as a regular expression,
    stops that thread too: faulthandler needs no lock and ends the process `grace` seconds later with the line
    at which it hung.
    """
    state = PartialState()

    def end():
        sys.stdout.flush()
        print(f"error: rank {state.process_index} of {state.num_processes}, {_phase}: the reward function "
              f"has not returned after {seconds:g} s; correct it, or give it longer with "
              "--reward_timeout", file=sys.stderr, flush=True)
        os._exit(1)

    if not seconds:
        yield
        return
    clock = threading.Timer(seconds, end)
    clock.daemon = True
    faulthandler.dump_traceback_later(seconds + grace, exit=True, file=sys.__stderr__)
    clock.start()
    try:
        yield
    finally:
        clock.cancel()
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def loading(folder):
    """Context in which a model or tokenizer is loaded from `folder` (or a hub id); a damaged file is a
    ValueError.

    Libraries raise many exceptions on a damaged file, and few name it. So the files are opened before.
    """
    check_files(folder)
    try:
        yield
    except UnpicklingError as error:
        raise ValueError(f"{str(folder)!r} cannot be loaded: its .bin file holds more than tensors, which a "
                         "pickle could execute, and nothing of it was; get safetensors") from error
    except Exception as error:   # tokenizers raises plain Exception, and a wrong config.json almost any class
        text = " ".join(str(error).split())
        if type(error) is ValueError and text == str(error) and Path(folder).name in text:
            raise                   # one sentence that names the folder already
        if brings_code(folder):
            raise ValueError(f"{str(folder)!r} cannot be loaded: it brings code of its own, which is "
                             "executed only where the user says trust_remote_code=True") from error
        raise ValueError(f"{str(folder)!r} cannot be loaded: its files do not fit together "
                         f"({type(error).__name__}: {text[:200]}); get them again") from error


def check_files(folder):
    """ValueError for the first .json or .safetensors file of `folder` that cannot be read."""
    for path in sorted(path for path in Path(folder).glob("*") if path.suffix in (".json", ".safetensors")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, framework="pt"):
                    pass
        except (ValueError, OSError, RecursionError, SafetensorError) as error:
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"{str(folder)!r} cannot be loaded: {path.name} is damaged "
                             f"({type(error).__name__}: {text}); get it again") from error


def brings_code(folder):
    """True if config.json names a class in a file of `folder`, of a type that transformers does not know."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    auto_map = isinstance(config, dict) and config.get("auto_map")
    return bool(auto_map) and str(config.get("model_type")) not in CONFIG_MAPPING


class phase:
    """Context that names the phase `name` when something fails inside; the error then goes on as it is.

    One failing process makes its launcher end the others, whose errors (a lost connection) say nothing by
    themselves. So each process tells the store of the group which phase it enters, and one that waited for
    others in vain says where they are. BadNumbers passes without a word: its batch may be left out.
    """

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        global _phase
        self.process, _phase = PartialState(), self.name
        self.told = {"phase": self.name, "since": time.time(), "pid": os.getpid(), "machine": platform.node(),
                     "failed": False}
        if self.process.num_processes > 1:
            store = torch.distributed.group.WORLD.get_group_store()
            store.set(f"phase of rank {self.process.process_index}", json.dumps(self.told))

    def __exit__(self, kind, error, traceback):
        if error is None or isinstance(error, BadNumbers) or not isinstance(error, Exception):
            return
        shown = out_of_memory(self.name, error) or error
        if self.process.num_processes > 1:
            self.report(kind, shown)
        if shown is not error:
            raise shown from error

    def report(self, kind, error):
        """Say that this process fails, and if it has waited for others, where they are."""
        rank = self.process.process_index
        print(f"rank {rank} of {self.process.num_processes} fails in {self.name}: {kind.__name__}: {error}",
              file=sys.stderr, flush=True)
        # gloo raises plain RuntimeErrors for a lost connection and for a time-out. They cannot be told from
        # other plain RuntimeErrors, so each of those also says where the others are, which is true as well.
        waited = kind is RuntimeError or isinstance(error, torch.distributed.DistError)
        others = told_by_others(rank, self.process.num_processes, self.told, 1.0 if waited else 0.0)
        if not waited:
            return
        if others is None:
            print(f"rank {rank} waited in vain, and rank 0, which keeps the list of phases, does not answer",
                  file=sys.stderr, flush=True)
        for other, told in (others or {}).items():
            if told["failed"]:      # it has said so by itself
                continue
            state, sibling = state_of_process(told)
            seconds = time.time() - told["since"]
            print(f"rank {rank} waited for rank {other}, which has been in {told['phase']} for "
                  f"{seconds:.0f} s and is {state}", file=sys.stderr, flush=True)
            if sibling is not None:     # it may not hear the launcher's SIGTERM, and SIGKILL comes 30 s later
                sibling.kill()


# Settings of scripts/train.py that take less memory, by a word in the name of the phase. What fills the
# memory is the weights of two models, the responses sampled at once, or the activations of a mini-batch.
SMALLER_MODELS = "more --num_shared_layers, or a stage of ZeRO on several GPUs"
LESS_MEMORY = {
    "set-up": f"a smaller model, --reference_bits 8, {SMALLER_MODELS}",
    "resuming": f"--optimizer adam8bit, --reference_bits 8, {SMALLER_MODELS}",
    "evaluation": f"fewer than 100 --eval_prompts, fewer --max_new_tokens, {SMALLER_MODELS}",
    "rollout": f"a smaller --batch_size, fewer --max_new_tokens, {SMALLER_MODELS}",
    "score": f"a smaller reward model, a smaller --batch_size, {SMALLER_MODELS}",
    "": "a smaller --mini_batch_size with as many times more --gradient_accumulation_steps (the update is "
        f"the same), --gradient_checkpointing True, {SMALLER_MODELS}"}


def out_of_memory(where, error):
    """-> a ValueError, if the memory of a GPU was too small: `error` or one of its causes says so. Or None.

    where: the name of the phase.
    """
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__         # of "the reward function raised ...", say
    if error is None:
        return None
    text = " ".join(str(error).split())
    size = r"([\d.]+ \w+)"              # such as 2.00 GiB
    found = re.search(rf"allocate {size}\. (GPU \d+) has a total capacity of {size} of which {size} is free",
                      text)
    problem = text[:200]
    if found:
        problem = f"{found[2]} is out of memory: {found[1]} asked, {found[4]} of {found[3]} free"
    remedy = next(settings for word, settings in LESS_MEMORY.items() if word in where)
    kept = ("; the checkpoints are as they were, and it can begin with the newest one's model/"
            if where.startswith("step") else "")
    return ValueError(f"{where}: {problem}; a new run needs less with {remedy}{kept}")


def told_by_others(rank, ranks, told, patience):
    """Tell the store that this rank has failed. -> {rank: what `phase` told it last}; None: no answer.

    patience: seconds before it asks, in which others that fail too can say so, and killed ones vanish. It
    asks in a thread, because a store whose process is stopped never answers, and has no time-out.
    """
    store, found = torch.distributed.group.WORLD.get_group_store(), {}

    def ask():
        try:
            store.set(f"phase of rank {rank}", json.dumps({**told, "failed": True}))
            time.sleep(patience)
            for other in sorted({*range(ranks)} - {rank}):
                if store.check([f"phase of rank {other}"]):
                    found[other] = json.loads(store.get(f"phase of rank {other}"))
        except torch.distributed.DistError:     # the process that kept the store is dead
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience + 2.0)
    return dict(found) or None


def state_of_process(told):
    """-> in words, what the process does; and its psutil.Process if it lives and has the parent of this one.

    None for one on another machine or in another container, or if its id is now another process's.
    """
    import psutil
    if told["machine"] != platform.node():
        return f"on {told['machine']}", None
    try:
        process = psutil.Process(told["pid"])
        status = process.status()
        sibling = process if process.ppid() == os.getppid() else None
    except psutil.NoSuchProcess:
        return "dead", None
    if status == psutil.STATUS_ZOMBIE:
        return "dead", None
    stopped = status == psutil.STATUS_STOPPED
    return "stopped by a signal" if stopped else f"still there ({status})", sibling


if __name__ == "__main__":
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        check_optimizer(optimizer, None, layer)
    except ValueError as error:
        print("refused:", error)
    print("described:", describe([torch.zeros(3), torch.zeros(2), 1.5]))
    with phase("an example"), time_limit(5):
        print("a call that takes", round(sum(0.5 for _ in range(4)), 1), "of 5 seconds is left alone")
