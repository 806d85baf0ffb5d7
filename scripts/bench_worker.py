"""One process of `scripts/bench.py`: it makes the models, runs one library on one workload, profiles a step, or multiplies matrices.

    python scripts/bench_worker.py run '{"library": "ours", "model": "FOLDER/gpt2", "batch_size": 64, ...}'

It runs in plainppo's environment and in the peer's (TRL 0.11.4 with transformers 4.46), so it imports at the top only what both have.
What it measured is the last line it prints, as JSON. bench.py holds the settings and the comparison.
"""
import json
import math
import resource
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
END_1_IN_20 = math.log(4095 / 19) + 0.05      # the others' logits have a variance of 0.1, so the mean of their exp is e ** 0.05


def peak():
    """Highest resident memory of this process so far, in bytes. A new process begins with its parent's, so bench.py imports no torch."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def models(settings):
    """The models named in settings["names"], with random weights, below settings["folder"]. -> these names."""
    from bench import smollm2_shape
    for name in settings["names"]:
        model = smollm2_shape(layers=30) if name == "smollm2" else gpt2(END_1_IN_20 if name == "gpt2-eos" else -20.0)
        model.save_pretrained(Path(settings["folder"]) / name)
    return settings["names"]


def gpt2(eos_logit):
    """6 layers, 256 wide. The end of text has this logit everywhere; the other 4,095 tokens are near 0.

    The first entry of what `lm_head` reads is always 4, by the last norm's weight and bias, and only the end of text looks at it.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=256, n_layer=6, n_head=4, n_positions=1024, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 4.0
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[0] = 0.0
        model.transformer.wte.weight[0, 0] = eos_logit / 4
    return model


def make_trainer(settings):
    """-> trainer, tokenizer, keywords for generate(), bytes after the imports. Both libraries spell this nearly the same."""
    config = {name: settings[name] for name in ("batch_size", "mini_batch_size")}
    config.update(ppo_epochs=settings.get("epochs", 4), learning_rate=1e-5)
    precision, plain = "bf16" if settings.get("bf16") else None, settings.get("plain", False)
    arguments, sampling = {}, {}
    from transformers import PreTrainedTokenizerFast
    if settings["library"] == "ours":
        sys.path.insert(0, str(ROOT))
        import distributed
        import ppo_core
        from ppo_core import PPOConfig, PPOTrainer
        from value_head import AutoModelForCausalLMWithValueHead
        if plain:       # before anything that made a step faster without changing a line of it
            distributed.fast_float32_products = distributed.keep_freed_memory = ppo_core.fuse_activations = lambda *_: None
            PPOTrainer.recall = lambda *_: {}
        imported = peak()
        arguments["accelerator"] = distributed.start(mixed_precision=precision)
    else:
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
        imported = peak()
        config["accelerator_kwargs"] = {"mixed_precision": precision}
        sampling.update(do_sample=True, top_k=0, top_p=1.0)         # what plainppo does unless told
    # by its file: transformers 4.46 cannot read the tokenizer_config.json of transformers 5
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "assets" / "review-lm" / "tokenizer.json"), eos_token="<|endoftext|>",
                                        pad_token="<|pad|>")
    if settings["library"] != "ours":
        sampling["pad_token_id"] = tokenizer.pad_token_id
    torch.manual_seed(0)        # the value head
    model = AutoModelForCausalLMWithValueHead.from_pretrained(settings["model"])
    if plain:
        arguments["optimizer"] = torch.optim.Adam(model.parameters(), lr=1e-5)
    trainer = PPOTrainer(PPOConfig(**config), model, None, tokenizer, num_shared_layers=settings.get("shared"), **arguments)
    return trainer, sampling, imported


def batches(settings, vocabulary, count, rank=0):
    """`count` times: prompts, responses of 4 to settings["response"] tokens, scores. Random, and the same for both libraries."""
    generator, size = torch.Generator().manual_seed(1 + rank), settings["batch_size"]
    for _ in range(count):
        lengths = torch.randint(4, settings["response"] + 1, (size,), generator=generator).tolist()
        queries, *responses = [torch.randint(10, vocabulary - 100, shape, generator=generator)
                               for shape in [(size, settings["query"]), *((length,) for length in lengths)]]
        yield list(queries), responses, list(torch.randn(size, generator=generator))


def run(settings):
    """One iteration to warm up and settings["iterations"] measured ones. -> seconds, tokens, memory, versions."""
    trainer, sampling, imported = make_trainer(settings)
    sampling.update(return_prompt=False, max_new_tokens=settings["response"], batch_size=settings["batch_size"])
    accelerator, rows = trainer.accelerator, []
    vocabulary = accelerator.unwrap_model(trainer.model).pretrained_model.config.vocab_size
    for queries, ragged, scores in batches(settings, vocabulary, settings["iterations"] + 1, accelerator.process_index):
        began = time.perf_counter()
        sampled = trainer.generate(queries, **sampling)
        generated = time.perf_counter()
        responses = ragged if settings.get("ragged") else sampled
        trainer.step(queries, responses, scores)
        rows.append({"generate": generated - began, "step": time.perf_counter() - generated,
                     "sampled": sum(map(len, sampled)), "trained": sum(map(len, responses))})
    result = {"rows": rows[1:], "imported": imported, "peak": peak(), "threads": torch.get_num_threads(), "versions": versions()}
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
    """torch's profiler over one step() after a warm-up. -> its seconds, and the operations that took most of it themselves."""
    from torch.profiler import ProfilerActivity
    trainer, sampling, _ = make_trainer(settings)
    for number, (queries, ragged, scores) in enumerate(batches(settings, 4096, 2)):
        responses = ragged if settings.get("ragged") else trainer.generate(
            queries, return_prompt=False, max_new_tokens=settings["response"], batch_size=settings["batch_size"])
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) if number else nullcontext() as profiler:
            began = time.perf_counter()
            trainer.step(queries, responses, scores)
            seconds = time.perf_counter() - began
    items = sorted(profiler.key_averages(), key=lambda item: -item.self_cpu_time_total)
    total = sum(item.self_cpu_time_total for item in items)
    return {"seconds": seconds, "items": [[item.key, item.self_cpu_time_total / 1e6, item.self_cpu_time_total / total, item.count]
                                          for item in items[:settings["items"]]]}


def rate(settings):
    """GFLOP/s of products of settings["size"] x settings["size"] matrices, best of 10, by the faster of torch's two ways."""
    size, rates = settings["size"], {}
    for name in ("float32", "bfloat16"):
        a, b = torch.randn(2, size, size).to(getattr(torch, name))
        ways = [lambda: a @ b]
        if torch.backends.mkldnn.is_available():        # as distributed.fast_float32_products has it
            ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""))
        seconds = []
        for way in ways * 10:
            began = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - began)
        rates[name] = 2 * size ** 3 / min(seconds) / 1e9
    return rates


if __name__ == "__main__":
    what, given = sys.argv[1], json.loads(sys.argv[2])
    measured = {"models": models, "run": run, "profile": profile, "rate": rate}[what](given)
    if measured is not None:
        print(json.dumps(measured), flush=True)
