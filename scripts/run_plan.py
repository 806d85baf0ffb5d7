"""The plan that a run of scripts/train.py prints, and the formula of the memory that it will need.

    python scripts/run_plan.py      # the table of docs/distributed.md: what fits 24 and 80 GB

Why: a run that does not fit fails in its first update, minutes after it was started. With the formula one can
choose before: more processes, a stage of ZeRO, shared layers, smaller mini-batches, gradient checkpointing.
It counts tensors, as torch.cuda.max_memory_allocated does, for responses of full length. On a CPU the
libraries come on top (LIBRARIES). Left out: the reward model, and gaps between tensors.
Tested by tests/test_plan.py against measured peaks.
"""
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distributed
import reference

LIBRARIES = 430e6       # Python, torch, transformers, and the kernels that a first step loads, on a CPU
MESSAGES = 4 * 5e8      # DeepSpeed's buffer for gradients on their way: reduce_bucket_size float32 numbers
STATE = {"adam": 8, "lion": 4, "sgd": 0, "adam8bit": 2}     # bytes of optimizer state per trained parameter
# Copies of the largest parameter that a step makes. On a GPU, 8-bit Adam makes none.
SCRATCH = {"adam": 0, "lion": 3, "sgd": 0, "adam8bit": 4}
CHUNK = 2 ** 24         # speed.LOGITS_AT_ONCE


@dataclass(frozen=True)
class Shape:
    """The sizes of a language model that memory depends on."""

    parameters: int             # of the whole model
    layers: int
    width: int                  # H, of the hidden states
    inner: int                  # of the feed-forward layers
    keys: int                   # numbers in the keys of a token in one layer: H, or less with grouped heads
    vocabulary: int
    gated: bool                 # True: Llama's layers (RMSNorm, gated feed-forward); False: GPT-2's
    tied: bool                  # lm_head is the embedding


@dataclass(frozen=True)
class Run:
    """The settings of a run that memory depends on. Batch sizes are per process."""

    batch: int
    mini_batch: int
    query: int                  # tokens of the longest prompt
    response: int               # max_new_tokens
    optimizer: str = "adam"
    accumulation: int = 1       # mini-batches per optimizer step
    shared: int = 0             # layers that policy and reference share; the embeddings are then shared, too
    checkpointing: bool = False
    fast: bool = True           # the trainer of speed.py
    full_kl: bool = False
    half: bool = False          # bf16 or fp16 autocast
    processes: int = 1
    stage: int = 0              # of ZeRO
    gather: bool = True         # ZeRO-3: all weights are on each process during a rollout
    compiled: bool = False      # decoding.py: the cache stays in memory; its rounding is left out


def shape_of(model):
    """-> Shape of a transformers model, with or without a value head. It may be on the device "meta"."""
    language_model = getattr(model, "pretrained_model", model)
    config, names = language_model.config, [name for name, _ in language_model.named_parameters()]
    heads, width = config.num_attention_heads, config.hidden_size
    grouped = getattr(config, "num_key_value_heads", None) or heads
    inner = [getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim")]
    return Shape(
        parameters=sum(getattr(p, "ds_numel", p.numel()) for p in language_model.parameters()),
        layers=config.num_hidden_layers, width=width, inner=next(filter(None, inner), 4 * width),
        keys=grouped * (getattr(config, "head_dim", None) or width // heads), vocabulary=config.vocab_size,
        gated=any("gate_proj" in name for name in names), tied=bool(config.tie_word_embeddings))


def needed(shape, run, weights=None, added=None, trained=None):
    """-> {what: bytes} that one process needs, "rollout" and "update" in all, and "peak", the larger one.

    weights, added: bytes of the policy, and those that the reference adds. trained: parameters. Default: all
    in float32, and what run.shared layers leave. "cache" is a part of the rollout, "activations" and "logits"
    of the update, or of both if decoding is compiled.
    """
    unshared = shape.parameters - shared_part(shape, run)
    weights = 4 * shape.parameters if weights is None else weights
    added = 4 * unshared if added is None else added
    trained = unshared if trained is None else trained
    # ZeRO-1 divides the optimizer's state among the processes, 2 also the gradients, 3 also the weights.
    divisor = {first: run.processes if run.stage >= first else 1 for first in (1, 2, 3)}
    gradients, state = 4 * trained, STATE[run.optimizer] * trained
    rounded = weights / 2 if run.half else 0        # autocast keeps a copy while it uses the weights
    if run.stage:       # DeepSpeed's weights have the type of the products; it trains a float32 copy
        state += 4 * trained
        weights, added, rounded = (weights / 2, added / 2, 0) if run.half else (weights, added, 0)
    elif run.processes > 1:
        gradients *= 2                              # DDP sends them from buckets, which are as large again
    parts = {"weights": (weights + added) / divisor[3], "gradients": gradients / divisor[2],
             "optimizer": state / divisor[1], "activations": activations(shape, run),
             "logits": logits(shape, run), "cache": cache(shape, run)}
    embedding = 4 * shape.vocabulary * shape.width
    resident = parts["weights"] + parts["optimizer"] + rounded + (MESSAGES if run.stage else 0)
    if run.shared and run.fast:     # the output of the shared layers
        resident += 4 * run.batch * columns(run) * shape.width
    if run.compiled:
        resident += parts["cache"]
    # One token of each row: logits, probabilities, and in float64 the probabilities and their running sums.
    rollout = resident + (0 if run.compiled else parts["cache"]) + 28 * run.batch * shape.vocabulary
    if run.stage == 3 and run.gather:
        rollout += weights
    backward, end = backward_pass(shape, run, parts, 0 if trained < embedding / 4 else embedding)
    step = parts["gradients"] + SCRATCH[run.optimizer] * min(embedding, 4 * trained)
    update = resident + max(backward, end, step)
    return {**parts, "rollout": rollout, "update": update, "peak": max(rollout, update)}


def backward_pass(shape, run, parts, embedding):
    """-> bytes at the start and at the end of a backward pass, beside weights and optimizer.

    embedding: bytes of the gradient of lm_head, and of the embedding's; 0 if they are frozen. The first is
    made while all activations are there, the second last. If the two are tied, they are then added.
    """
    earlier = parts["gradients"] if run.accumulation > 1 else 0         # of the mini-batches before
    one = parts["logits"] / (3 if run.fast else 6)
    start = parts["activations"] + earlier + max(parts["logits"], one + embedding)
    if run.accumulation > 1:        # new gradients have tensors of their own until they are added
        return start, parts["gradients"] + (2 if shape.tied else 1) * embedding
    return start, parts["gradients"] + (embedding if shape.tied else 0)


def shared_part(shape, run):
    """-> parameters that the first run.shared layers and the embeddings have; 0 if nothing is shared."""
    if not run.shared:
        return 0
    embedding = shape.vocabulary * shape.width
    outside = embedding if shape.tied else 2 * embedding
    return embedding + (shape.parameters - outside) * run.shared / shape.layers


def columns(run):
    """-> tokens of a row as the update computes them. The fast trainer rounds them up: speed.even_size."""
    tokens = run.query + run.response
    step = max(8, 2 ** ((tokens - 2).bit_length() - 4))
    return -(-(tokens - 1) // step) * step if run.fast else tokens


def activations(shape, run):
    """-> bytes that the forward pass of a mini-batch keeps for the backward pass.

    Per token and layer, in numbers. GPT-2: the inputs of both norms, their outputs, the output of attention
    (5 H); queries, keys, values (3 H); before and after the activation function (2 inner). transformers' GELU
    of GPT-2 consists of eight operations and keeps 5 inner; speed.py replaces it. Llama: a norm also keeps
    its input divided by the root mean square (7 H), and the gated layer keeps four tensors (4 inner). Also
    each layer keeps its mask, a number for each pair of tokens of a row.
    """
    tokens, layers = run.mini_batch * columns(run), shape.layers - run.shared
    inner = 4 if shape.gated else 2 if run.fast else 5
    wide = (4 if shape.gated else 2) * shape.width      # also float32 under autocast: inside the norms
    rest = 6 * shape.width
    layer = tokens * (4 * wide + (2 if run.half else 4) * (rest + inner * shape.inner + columns(run)))
    if run.checkpointing:       # the input of each layer, and one layer that is computed again
        return 4 * tokens * shape.width * layers + layer
    return layer * layers


def logits(shape, run):
    """-> bytes of logits, and of tensors of their size, that an update holds at once; all are float32.

    The fast trainer: logits, probabilities, their product. The plain one also keeps log-probs and the steps
    of the entropy for the backward pass.
    """
    numbers = run.mini_batch * run.response * shape.vocabulary
    if not run.fast:
        return 4 * 6 * numbers
    return 4 * 3 * (numbers if run.stage == 3 or run.full_kl else min(numbers, CHUNK))


def cache(shape, run):
    """-> bytes of the keys and values of a rollout."""
    return (2 if run.half else 4) * 2 * run.batch * (run.query + run.response) * shape.layers * shape.keys


# ------------------------------------------------------------------------------------------------- the plan


def plan(config, accelerator, model, ref_model, logits_at_once, prompts=()):
    """-> the text that main() prints before the first step: batches, parameters, memory and trainer.

    logits_at_once: how many logits the fast trainer holds at most; None for the plain trainer, which holds
    all logits of a mini-batch. prompts: those to train on, for the length of the longest.
    """
    processes = accelerator.num_processes
    trained = sum(distributed.whole_numel(p) for p in model.parameters() if p.requires_grad)
    frozen = sum(distributed.whole_numel(p) for p in model.parameters() if not p.requires_grad)
    shared = reference.shared_bytes(model, ref_model)
    added = sum(p.nbytes for p in ref_model.parameters()) - shared      # an int8 weight has 1 byte
    if model.is_peft_model:         # the frozen model is the reference, too
        shared = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    run = run_of(config, accelerator, logits_at_once is not None, prompts)
    memory = needed(shape_of(model), run, sum(p.nbytes for p in model.parameters()), added, trained)
    megabytes = {name: f"{value / 1e6:.0f}" for name, value in memory.items()}
    libraries = f", and {LIBRARIES / 1e6:.0f} of libraries" if accelerator.device.type == "cpu" else ""
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
        f"memory     about {megabytes['peak']} MB{where} on {accelerator.device} beside the reward model"
        f"{libraries}: rollout {megabytes['rollout']}, update {megabytes['update']}; of these weights "
        f"{megabytes['weights']}, gradients {megabytes['gradients']}, optimizer {megabytes['optimizer']}, "
        f"activations {megabytes['activations']}, logits {megabytes['logits']}, cache {megabytes['cache']}",
        f"trainer    {trainer}"])


def run_of(config, accelerator, fast, prompts):
    """The settings of scripts/train.py -> Run."""
    longest = max((len(prompt["tokens"]) for prompt in prompts), default=1)
    return Run(batch=config.batch_size, mini_batch=config.mini_batch_size, query=longest,
               response=config.max_new_tokens, optimizer=config.optimizer, fast=fast,
               accumulation=config.gradient_accumulation_steps, shared=config.num_shared_layers or 0,
               checkpointing=config.gradient_checkpointing, full_kl=config.kl_penalty == "full",
               half=accelerator.mixed_precision in ("bf16", "fp16"), processes=accelerator.num_processes,
               stage=distributed.zero_stage(accelerator), gather=config.ds3_gather_for_generation,
               compiled=config.compile_decoding and accelerator.device.type == "cuda")


# ------------------------------------------------------------------------------------ what fits, for the docs

GPT2 = Shape(124_439_808, 12, 768, 3072, 768, 50257, gated=False, tied=True)
LLAMA_1B = Shape(1_543_656_960, 28, 1536, 8960, 256, 151936, gated=True, tied=True)
LLAMA_7B = Shape(6_738_415_616, 32, 4096, 11008, 4096, 32000, gated=True, tied=False)
USUAL = Run(batch=32, mini_batch=4, query=256, response=256, half=True)
# (model, GPUs, how it is run, its shape, what differs from USUAL)
WAYS = [
    ("124 M", 1, "alone", GPT2, {}),
    ("1.5 B", 1, "alone", LLAMA_1B, {}),
    ("1.5 B", 1, "`--num_shared_layers 22`", LLAMA_1B, {"shared": 22}),
    ("1.5 B", 1, "`--optimizer adam8bit --gradient_checkpointing True`", LLAMA_1B,
     {"optimizer": "adam8bit", "checkpointing": True}),
    ("1.5 B", 8, "DDP", LLAMA_1B, {}),
    ("1.5 B", 8, "ZeRO-2", LLAMA_1B, {"stage": 2}),
    ("7 B", 1, "alone", LLAMA_7B, {}),
    ("7 B", 1, "`--num_shared_layers 28`", LLAMA_7B, {"shared": 28}),
    ("7 B", 8, "ZeRO-1", LLAMA_7B, {"stage": 1}),
    ("7 B", 8, "ZeRO-2", LLAMA_7B, {"stage": 2}),
    ("7 B", 8, "ZeRO-3", LLAMA_7B, {"stage": 3}),
    ("7 B", 8, "ZeRO-3, `--gradient_checkpointing True`", LLAMA_7B, {"stage": 3, "checkpointing": True}),
]


def table():
    """-> lines of Markdown: GB that each of WAYS needs on one GPU, and whether it fits."""
    lines = ["| model | GPUs | how | weights | gradients | optimizer | activations | logits | cache "
             "| rollout | update | fits 24 GB? | fits 80 GB? |", "|" + "---|" * 13]
    for model, count, how, shape, different in WAYS:
        memory = needed(shape, replace(USUAL, processes=count, **different))
        cells = [f"{value / 1e9:.1f}" for name, value in memory.items() if name != "peak"]
        # A tenth stays free for gaps between tensors, and for the kernels.
        fits = ["yes" if memory["peak"] < 0.9 * size * 1e9 else "no" for size in (24, 80)]
        lines.append("| " + " | ".join([model, str(count), how, *cells, *fits]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
