"""scripts/run_plan.py: the memory that it foresees, against the peak of real rollouts and updates.

The measured peak is that of the tensors, as torch.cuda.max_memory_allocated counts it on a GPU: torch's profiler reports each
allocation. Nothing is subtracted but what was there before the models were made. One test compares with a whole process.
"""
import gc
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench
import bench_worker
import pytest
import run_plan
import speed
import torch
from torch._C._profiler import _EventType
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import distributed
import optim
import reference
from decoding import CompiledPPOTrainer
from ppo_core import PPOConfig, PPOTrainer
from run_plan import Run, Shape, needed, shape_of
from value_head import AutoModelForCausalLMWithValueHead

ROOT = Path(__file__).resolve().parent.parent


def llama(**sizes):
    """A small model with W3's proportions: 9 heads in groups of 3, a feed-forward layer of 8 / 3 of the width."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": 4096, "hidden_size": 144, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, **sizes}))


def allocations(events):
    for event in events:
        if event.typed[0] == _EventType.Allocation:
            yield event.start_time_ns, event.typed[1].alloc_size        # below 0: memory is freed
        yield from allocations(event.children)


def peak_of(call, before):
    """-> bytes of tensors at most while `call` runs, bytes after it. before: bytes that were there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watch:
        call()
    now = most = before
    for _, size in sorted(allocations(watch.profiler.kineto_results.experimental_event_tree()), key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most, now


def measured(language_model, run):
    """Two rollouts and steps as `run` says. -> bytes of the second rollout and of the second step, at most; the Shape."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(language_model)
    shape, kind = shape_of(model), speed.FastPPOTrainer if run.fast else PPOTrainer
    if run.compiled:
        kind = type("Compiled", (CompiledPPOTrainer,), {"compiled_on": "cpu", "compile_settings": {"backend": "eager"}})
    config = PPOConfig(batch_size=run.batch, mini_batch_size=run.mini_batch, ppo_epochs=1, gradient_checkpointing=run.checkpointing,
                       gradient_accumulation_steps=run.accumulation)
    frozen = reference.create_reference_model(model, run.shared or None)
    optimizer = optim.make_optimizer(run.optimizer, optim.trainable_parameters(model), 1e-6)
    trainer = kind(config, model, frozen, AutoTokenizer.from_pretrained(ROOT / "assets" / "review-lm"), optimizer=optimizer,
                   accelerator=distributed.start(cpu=True))
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
              for network in (model, frozen) for tensor in [*network.parameters(), *network.buffers()]}
    now, settings = sum(memory.values()), {"batch_size": run.batch, "query": run.query, "response": run.response}
    gc.collect()
    for queries, _, scores in bench_worker.batches(settings, 4096, 2):
        responses = []
        rollout, now = peak_of(lambda: responses.extend(trainer.generate(
            queries, return_prompt=False, max_new_tokens=run.response, batch_size=run.batch, eos_token_id=-1)), now)
        update, now = peak_of(lambda: trainer.step(queries, responses, scores), now)
    return rollout, update, shape


W1 = Run(batch=32, mini_batch=8, query=8, response=24)
SMALL = Run(batch=4, mini_batch=1, query=8, response=16)


@pytest.mark.parametrize("family, run", [
    ("gpt2", W1), ("gpt2", replace(W1, fast=False)), ("gpt2", replace(W1, shared=4)), ("gpt2", replace(W1, mini_batch=16, optimizer="sgd")),
    ("gpt2", replace(W1, mini_batch=2, optimizer="lion")), ("gpt2", replace(W1, checkpointing=True, response=56)),
    ("gpt2", replace(W1, mini_batch=2, optimizer="adam8bit")), ("gpt2", replace(W1, batch=8, response=400)),
    ("llama", W1), ("llama", replace(W1, fast=False)), ("llama", replace(W1, shared=4, mini_batch=16)),
    ("llama", replace(SMALL, optimizer="sgd", accumulation=2)), ("untied", replace(SMALL, optimizer="lion")),
    ("llama", replace(W1, accumulation=2)), ("llama", replace(W1, checkpointing=True, optimizer="lion", response=56)),
    ("gpt2", replace(W1, batch=8, mini_batch=1, response=400, compiled=True))], ids=str)
def test_the_estimate_is_within_15_percent_of_the_peak_of_the_tensors(family, run):
    model = {"gpt2": lambda: bench_worker.gpt2(-20.0), "llama": llama, "untied": lambda: llama(tie_word_embeddings=False)}[family]()
    rollout, update, shape = measured(model, run)
    estimate = needed(shape, run)
    print(f"rollout {estimate['rollout'] / rollout:.2f}, update {estimate['update'] / update:.2f}")
    assert estimate["rollout"] == pytest.approx(rollout, rel=0.15) and estimate["update"] == pytest.approx(update, rel=0.15)
    assert estimate["peak"] == max(estimate["rollout"], estimate["update"])


def test_the_estimate_with_the_libraries_is_within_15_percent_of_a_whole_process(tmp_path):
    """W1 in small, and the whole W1 to W5 as the last `make bench` measured them. W6 needs more: oneDNN keeps kernels for many sizes."""
    bench_worker.models({"folder": str(tmp_path), "names": ["gpt2"]})
    settings = {**bench.sides("W1")["fast"], "batch_size": 32, "epochs": 1, "iterations": 1, "model": str(tmp_path / "gpt2")}
    code = f"import bench, json; print(json.dumps(bench.worker('run', {settings!r}, OMP_NUM_THREADS='1')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    shapes = {"gpt2": shape_of(bench_worker.gpt2(-20.0))}
    with torch.device("meta"):
        shapes["smollm2"] = shape_of(bench.smollm2_shape(layers=30))
    results = json.loads((ROOT / "bench" / "results.json").read_text())["results"]
    peaks = [("", json.loads(done.stdout)["peak"], settings, "gpt2")]
    peaks += [(name, results[name]["fast"]["peak"], what, what["model"]) for name, (_, what, _) in bench.WORKLOADS.items() if name != "W6"]
    page = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    for name, peak, what, model in peaks:
        run = Run(what["batch_size"], what["mini_batch_size"], what["query"], what["response"], shared=what.get("shared", 0),
                  half=what.get("bf16", False))
        estimate = needed(shapes[model], run)["peak"]
        assert estimate + run_plan.LIBRARIES == pytest.approx(peak, rel=0.15), what
        assert not name or f"| {name} | {estimate / 1e6:.0f} + 430 | {peak / 1e6:.0f} |" in page


def test_the_sizes_are_read_from_the_model():
    assert shape_of(bench_worker.gpt2(-20.0)) == Shape(6_049_792, 6, 256, 1024, 256, 4096, gated=False, tied=True)
    small = shape_of(AutoModelForCausalLMWithValueHead.from_pretrained(llama(tie_word_embeddings=False)))
    assert (small.keys, small.inner, small.gated, small.tied) == (48, 384, True, False)
    assert small.parameters == sum(p.numel() for p in llama(tie_word_embeddings=False).parameters())


def test_columns_are_those_of_the_fast_trainer():
    for tokens in range(2, 3000):
        run = Run(1, 1, 1, tokens)
        assert run_plan.columns(run) == speed.even_size(tokens) and run_plan.columns(replace(run, fast=False)) == tokens + 1
    assert run_plan.CHUNK == speed.LOGITS_AT_ONCE


def test_stages_and_settings_divide_what_they_say():
    shape, run = run_plan.LLAMA_7B, run_plan.USUAL
    one, ddp, first, second, third = [needed(shape, replace(run, processes=count, stage=stage))
                                      for count, stage in ((1, 0), (8, 0), (8, 1), (8, 2), (8, 3))]
    trained = 4 * shape.parameters
    assert one["optimizer"] == 2 * trained and one["gradients"] == trained and one["weights"] == 2 * trained
    assert ddp["gradients"] == 2 * trained and ddp["optimizer"] == one["optimizer"]
    assert first["optimizer"] == 3 * trained / 8 and first["gradients"] == trained and first["weights"] == trained       # in bf16
    assert second["gradients"] == trained / 8 and third["weights"] == trained / 8
    assert needed(shape, replace(run, processes=8, stage=3, gather=False))["rollout"] == third["rollout"] - trained / 2
    whole, limit = 4 * 3 * 4 * 256 * 32000, 4 * 3 * run_plan.CHUNK
    assert one["logits"] == limit < whole == third["logits"] == needed(shape, replace(run, full_kl=True))["logits"]
    assert needed(shape, replace(run, fast=False))["logits"] == 2 * whole
    assert needed(shape, run, added=0, trained=1e6)["weights"] == trained        # adapters: no second model


def test_the_page_shows_the_table_that_the_script_prints():
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert "\n".join(run_plan.table()) in page
    lines = [re.split(r" *\| *", line)[1:-1] for line in run_plan.table()[2:]]
    assert len(lines) == len(run_plan.WAYS) and {tuple(line[-2:]) for line in lines} == {("yes", "yes"), ("no", "yes"), ("no", "no")}
    with torch.device("meta"):
        from transformers import GPT2Config, GPT2LMHeadModel
        assert shape_of(GPT2LMHeadModel(GPT2Config())) == run_plan.GPT2
        big = LlamaConfig(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                          num_key_value_heads=2, tie_word_embeddings=True)
        assert shape_of(LlamaForCausalLM(big)) == run_plan.LLAMA_1B
        seven = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        assert shape_of(LlamaForCausalLM(seven)) == run_plan.LLAMA_7B
