"""One process of `scripts/bench.py`: it makes models, runs one trainer on one workload, profiles a step, or
multiplies matrices.

    python scripts/bench_worker.py run '{"library": "ours", "model": "FOLDER/gpt2", ...}' --trainer fast

It runs in plainppo's environment and in that of TRL 0.11.4 with transformers 4.46, so it imports at the top
only what both have. The last line that it prints is what it measured, as JSON. bench.py holds the settings
and the comparison. LEVERS, at the end, switches one lever of speed.py off, from outside: speed.py itself has
no switches.
"""
import argparse
import json
import math
import resource
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# The other tokens' logits have a variance of 0.1, so the mean of their exp is e ** 0.05.
END_1_IN_20 = math.log(4095 / 19) + 0.05


def on_gpu():
    """bench.py shows a GPU to a process that is to use one, and hides all of them from the others."""
    return torch.cuda.is_available()


def now():
    """-> seconds. A GPU works behind the program: only when it has finished is the time that of its work."""
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak():
    """Highest memory so far, in bytes: of the tensors on a GPU, or resident memory of this process.

    A new process starts with the number of the process that started it, so bench.py imports no torch.
    """
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def models(settings):
    """Save the models named in settings["names"], with random weights, below settings["folder"]. -> these
    names.
    """
    from bench import llama_shape, smollm2_shape
    makers = {"gpt2": lambda: gpt2(-20.0), "gpt2-eos": lambda: gpt2(END_1_IN_20),
              "smollm2": lambda: smollm2_shape(layers=30), "gpt2-124m": gpt2_124m,
              "llama-1.5b": lambda: llama_shape(layers=28).bfloat16()}    # a smaller file; loads as float32
    for name in settings["names"]:
        makers[name]().save_pretrained(Path(settings["folder"]) / name)
    return settings["names"]


def gpt2_124m():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0))


def gpt2(eos_logit):
    """6 layers, 256 wide. The end-of-text token has this logit everywhere; the other 4,095 tokens are near 0.

    The first entry of the input of `lm_head` is always 4, by the last norm's weight and bias, and only the
    weights of the end-of-text token are not 0 there.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=256, n_layer=6, n_head=4, n_positions=1024,
                                       bos_token_id=0,
                                       eos_token_id=0))
    with torch.no_grad():
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 4.0
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[0] = 0.0
        model.transformer.wte.weight[0, 0] = eos_logit / 4
    return model


# ----------------------------------------------------------------------------------------------- the trainers


def trainer_class(settings):
    """-> the trainer class that settings["trainer"] names, of the project in settings["root"].

    All but the plain one come with tune_cpu(). With settings["without"] one lever of the fast one is off. A
    checkout from before speed.py has one trainer, which sets its process up itself, in distributed.start.
    """
    root = Path(settings.get("root", ROOT))
    sys.path.insert(0, str(root))
    import ppo_core
    if settings.get("trainer", "fast") == "plain" or not (root / "speed.py").exists():
        return ppo_core.PPOTrainer
    import speed
    chosen = speed.FastPPOTrainer
    if settings.get("trainer") == "compiled":
        import decoding
        chosen = decoding.CompiledPPOTrainer
    if settings.get("without") is not None:
        chosen = switch_off(settings["without"], speed)
    speed.tune_cpu()
    return chosen


def make_trainer(settings):
    """-> trainer, keywords for generate(), bytes after the imports. Both libraries spell it nearly alike."""
    config = {name: settings[name] for name in ("batch_size", "mini_batch_size")}
    config.update(ppo_epochs=settings.get("epochs", 4), learning_rate=1e-5)
    precision = "bf16" if settings.get("bf16") else None
    arguments, sampling = {}, {}
    from transformers import PreTrainedTokenizerFast
    if settings["library"] == "ours":
        chosen = trainer_class(settings)
        import distributed
        from ppo_core import PPOConfig
        from value_head import AutoModelForCausalLMWithValueHead
        imported = peak()
        arguments["accelerator"] = distributed.start(mixed_precision=precision)
    else:
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig
        from trl import PPOTrainer as chosen
        imported = peak()
        config["accelerator_kwargs"] = {"mixed_precision": precision}
        sampling.update(do_sample=True, top_k=0, top_p=1.0)         # the defaults of plainppo's generate()
    # by its file: transformers 4.46 cannot read the tokenizer_config.json of transformers 5
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "assets" / "review-lm" / "tokenizer.json"),
                                        eos_token="<|endoftext|>", pad_token="<|pad|>")
    if settings["library"] != "ours":
        sampling["pad_token_id"] = tokenizer.pad_token_id
    torch.manual_seed(0)        # the value head
    model = AutoModelForCausalLMWithValueHead.from_pretrained(settings["model"])
    trainer = chosen(PPOConfig(**config), model, None, tokenizer, num_shared_layers=settings.get("shared"),
                     **arguments)
    return trainer, sampling, imported


def batches(settings, vocabulary, count, rank=0):
    """`count` times: prompts, responses of 4 to settings["response"] tokens, scores. Random, the same for
    both libraries.
    """
    generator, size = torch.Generator().manual_seed(1 + rank), settings["batch_size"]
    for _ in range(count):
        lengths = torch.randint(4, settings["response"] + 1, (size,), generator=generator).tolist()
        queries, *responses = [torch.randint(10, vocabulary - 100, shape, generator=generator)
                               for shape in [(size, settings["query"]), *((length,) for length in lengths)]]
        yield list(queries), responses, list(torch.randn(size, generator=generator))


def run(settings):
    """One iteration to warm up and settings["iterations"] measured ones. -> seconds, tokens, memory,
    versions.
    """
    trainer, sampling, imported = make_trainer(settings)
    sampling.update(return_prompt=False, max_new_tokens=settings["response"],
                    batch_size=settings["batch_size"])
    accelerator, rows = trainer.accelerator, []
    vocabulary = accelerator.unwrap_model(trainer.model).pretrained_model.config.vocab_size
    for queries, ragged, scores in batches(settings, vocabulary, settings["iterations"] + 1,
                                           accelerator.process_index):
        began = now()
        sampled = trainer.generate(queries, **sampling)
        generated = now()
        responses = ragged if settings.get("ragged") else sampled
        trainer.step(queries, responses, scores)
        rows.append({"generate": generated - began, "step": now() - generated,
                     "sampled": sum(map(len, sampled)), "trained": sum(map(len, responses))})
    result = {"rows": rows[1:], "imported": imported, "peak": peak(), "threads": torch.get_num_threads(),
              "versions": versions()}
    if on_gpu():
        result["reserved"] = torch.cuda.max_memory_reserved()       # with the gaps that the allocator keeps
    if accelerator.num_processes > 1:
        import distributed
        result["peak"] = max(distributed.gather_lists(accelerator, [result["peak"]]))
        distributed.end(accelerator)
    return result if accelerator.is_main_process else None


def versions():
    from importlib.metadata import version
    names = ("torch", "transformers", "accelerate", "trl")
    return {name: version(name) for name in names if name == "torch" or name in sys.modules}


def profile(settings):
    """torch's profiler over one step() after a warm-up, or over generate(), as settings["part"] says. -> its
    seconds, its operations that took most: of the processor's time, or on a GPU of the GPU's.
    """
    from torch.profiler import ProfilerActivity
    timed = "self_device_time_total" if on_gpu() else "self_cpu_time_total"
    part = settings.get("part", "step")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    trainer, sampling, _ = make_trainer(settings)
    sampling.update(return_prompt=False, max_new_tokens=settings["response"],
                    batch_size=settings["batch_size"])
    for number, (queries, ragged, scores) in enumerate(batches(settings, 4096, 2)):
        watched = {name: torch.profiler.profile(activities=activities) if number and name == part
                   else nullcontext() for name in ("generate", "step")}
        began = now()
        with watched["generate"] as generating:
            sampled = trainer.generate(queries, **sampling)
            generated = now()
        with watched["step"] as stepping:
            trainer.step(queries, ragged if settings.get("ragged") else sampled, scores)
            stepped = now()
    seconds = {"generate": generated - began, "step": stepped - generated}[part]
    # On a GPU the kernels are listed, too. Their time already counts for the operation that started them.
    items = [item for item in (stepping or generating).key_averages()
             if item.device_type == torch.autograd.DeviceType.CPU]
    items = sorted(items, key=lambda item: -getattr(item, timed))
    total = sum(getattr(item, timed) for item in items)
    return {"seconds": seconds,
            "items": [[item.key, getattr(item, timed) / 1e6, getattr(item, timed) / total, item.count]
                      for item in items[:settings["items"]]]}


def rate(settings):
    """GFLOP/s of products of settings["size"] x settings["size"] matrices, best of 10, by the faster of
    torch's two ways; "copy": GB/s that a copy of a large tensor reads and writes.
    """
    size, rates, device = settings["size"], {}, "cuda" if on_gpu() else "cpu"
    for name in ("float32", "bfloat16"):
        a, b = torch.randn(2, size, size, device=device).to(getattr(torch, name))
        ways = [lambda: a @ b]
        # the products of speed.use_onednn_for_float32
        if torch.backends.mkldnn.is_available() and not on_gpu():
            ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""))
        rates[name] = 2 * size ** 3 / fastest(ways) / 1e9
    count = settings.get("copied", 2 ** 30 if on_gpu() else 2 ** 28)       # far larger than any cache
    source = torch.ones(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    rates["copy"] = 2 * source.nbytes / fastest([lambda: target.copy_(source)]) / 1e9
    return rates


def fastest(ways):
    """-> seconds of the fastest of 10 calls of each function."""
    seconds = []
    for way in ways * 10:
        began = now()
        way()
        seconds.append(now() - began)
    return min(seconds)


# ---------------------------------------------------------------------------------------------- one lever off


def set_existing(holder, name, value):
    """setattr; a name that `holder` has no longer is an error: the lever would seem to save nothing."""
    if not hasattr(holder, name):
        raise AttributeError(f"{holder.__name__} has no {name} any more; "
                             "bring LEVERS in bench_worker.py up to date")
    setattr(holder, name, value)


def switch_off(lever, speed, change=set_existing):
    """Switch one lever of the module `speed` off. -> the trainer class without it. change: like setattr."""
    class Without(speed.FastPPOTrainer):
        pass

    LEVERS[lever](speed, Without, change)
    return Without


def without_onednn(speed, trainer, change):
    change(speed, "use_onednn_for_float32", lambda force=False: False)


def without_kept_memory(speed, trainer, change):
    change(speed, "keep_freed_memory", lambda: None)


def without_fused_activations(speed, trainer, change):
    change(speed, "fuse_activations", lambda model: None)


def without_even_sizes(speed, trainer, change):
    change(speed, "even_size", lambda n: n)


def without_sampling_loop(speed, trainer, change):
    change(trainer, "generate_batch", speed.PPOTrainer.generate_batch)


def without_one_random_number(speed, trainer, change):
    change(speed, "draw", lambda probabilities: torch.multinomial(probabilities, 1).squeeze(1))


def without_roomy_cache(speed, trainer, change):
    """transformers' own cache, for the models that have the roomy one."""
    roomy = speed.roomy_cache
    change(speed, "roomy_cache", lambda config, tokens: roomy(config, tokens)
           and speed.DynamicCache(config=config))


def without_dropping_rows(speed, trainer, change):
    """Rows whose response has ended stay in the batch until all have ended."""
    def drop_finished(self, t, drawn, stop, cache):
        new_tokens = self.tokens.shape[1]
        ended = torch.isin(drawn, stop) & (self.lengths == new_tokens)
        self.lengths[ended] = t + 1
        self.input_ids = drawn.unsqueeze(1)
        self.attention_mask = torch.nn.functional.pad(self.attention_mask, (0, 1), value=1)
        return bool((self.lengths < new_tokens).all())

    change(speed.Rollout, "drop_finished", drop_finished)


def without_recall(speed, trainer, change):
    change(trainer, "recalls", lambda self: False)


def without_shared_trunk(speed, trainer, change):
    """Layers that policy and reference share are computed in each pass of each of them."""
    def prepare(self, *arguments):
        speed.FastPPOTrainer.prepare(self, *arguments)
        self.trunk.blocks = []

    change(trainer, "prepare", prepare)


def without_rows_of_like_length(speed, trainer, change):
    """Mini-batches as the plain trainer makes them: rows in their order, with all columns."""
    def mini_batches(self, batch, index):
        for part, rows in speed.PPOTrainer.mini_batches(self, batch, index):
            if "trunk" in rows:     # the sampler's has one column less, because no token follows a last token
                missing = rows["input_ids"].shape[1] - rows["trunk"].shape[1]
                rows["trunk"] = torch.nn.functional.pad(rows["trunk"], (0, 0, 0, missing))
            yield part, rows

    change(trainer, "mini_batches", mini_batches)


def without_halving(speed, trainer, change):
    change(speed, "halved", lambda lengths, part: [part])


def without_chunks(speed, trainer, change):
    change(speed, "LOGITS_AT_ONCE", 2 ** 62)


def without_one_pass(speed, trainer, change):
    """Log-prob and entropy by the functions of ppo_core, each with the tensors that autograd keeps for it."""
    from ppo_core import entropy_from_logits, logprobs_from_logits

    class Separate:
        @staticmethod
        def apply(logits, labels):
            return logprobs_from_logits(logits, labels), entropy_from_logits(logits.detach())

    change(speed, "LogprobsAndEntropy", Separate)


# name: function(speed, trainer class to change, change) that switches this lever off
LEVERS = {
    "float32 products by oneDNN": without_onednn,
    "freed memory kept": without_kept_memory,
    "fused activations": without_fused_activations,
    "even sizes": without_even_sizes,
    "lean sampling loop": without_sampling_loop,
    "one random number per token": without_one_random_number,
    "cache with room": without_roomy_cache,
    "finished rows dropped": without_dropping_rows,
    "sampler's results used again": without_recall,
    "shared layers run once": without_shared_trunk,
    "rows of like length, trimmed": without_rows_of_like_length,
    "mini-batches halved": without_halving,
    "logits in chunks": without_chunks,
    "log-prob and entropy in one pass": without_one_pass,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"models": models, "run": run, "profile": profile, "rate": rate}
    parser.add_argument("what", choices=list(tasks))
    parser.add_argument("settings", type=json.loads, help="a JSON object")
    parser.add_argument("--trainer", choices=["plain", "fast", "compiled"],
                        help="of plainppo; default: settings, then fast")
    arguments = parser.parse_args()
    settings = arguments.settings
    if arguments.trainer is not None:
        settings["trainer"] = arguments.trainer
    measured = tasks[arguments.what](settings)
    if measured is not None:
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
