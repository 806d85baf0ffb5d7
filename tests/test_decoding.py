"""decoding.py: the compiled step against the plain loop of speed.py, with the same random numbers, and when it is not taken.

Inductor, torch's own backend, stops at GPT-2's blocks on a CPU. So the step is compiled by "aot_eager": the same capture of
the graph, which is then run by the usual kernels. What only a GPU can show is in tests/test_gpu.py.
"""
import contextlib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import decoding
import speed
import train
from adapters import AutoModelForCausalLMWithValueHead as WithAdapters
from adapters import lora_settings
from decoding import CompiledPPOTrainer, StaticDecoder
from speed import FastPPOTrainer
from test_ppo_core import config, distance, seeded, sgd, tokenizer, weights      # noqa: F401 (seeded: a fixture)
from test_train import SMALL, numbers
from value_head import AutoModelForCausalLMWithValueHead

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 12
LENGTHS = (2, 6, 3, 9, 4, 5, 7, 8, 2, 3, 6, 11)
STOP = list(range(0, 90, 4))            # so many tokens end a response that rows are dropped on the way
compiled = []                           # one entry for each graph that the backend is given


def backend(graph, inputs):
    compiled.append(len(inputs))
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


class Compiled(CompiledPPOTrainer):
    compiled_on, compile_settings = "cpu", {"backend": backend}


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    compiled.clear()
    yield
    torch._dynamo.reset()


def policy(family="llama"):
    """review-lm, which is a GPT-2, or random weights; with a value head that gives other numbers than 0."""
    torch.manual_seed(1)
    small = dict(vocab_size=90, bos_token_id=0, eos_token_id=0)
    llama = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    models = {"gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, **small)),
              "llama": lambda: LlamaForCausalLM(LlamaConfig(**small, **llama)),
              "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, **small)),
              "sliding": lambda: MistralForCausalLM(MistralConfig(sliding_window=4, **small, **llama)),
              "review-lm": lambda: ROOT / "assets" / "review-lm"}
    return AutoModelForCausalLMWithValueHead.from_pretrained(models[family](), v_head_init_strategy="normal", v_head_initializer_range=0.02)


def make(kind, family="llama", model=None, shared=None, **settings):
    torch.manual_seed(0)
    np.random.seed(0)
    model = model or policy(family)
    settings = {"batch_size": 12, "mini_batch_size": 4, "temperature": 0.7, **settings}
    return kind(config(**settings), model, None, tokenizer(), optimizer=sgd(model, 0.01), num_shared_layers=shared)


def queries(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 90, (n,), generator=generator) for n in LENGTHS]


def sampled(trainer, seed=0, prompts=None, **arguments):
    """-> responses as lists, and what the sampler stored: lists of log-probs and of values."""
    torch.manual_seed(seed)
    arguments = {"batch_size": 12, "return_prompt": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": STOP, **arguments}
    responses = trainer.generate(prompts or queries(seed), **arguments)
    stored = list(trainer.sampled.values())
    return [r.tolist() for r in responses], [row["logprobs"] for row in stored], [row["values"] for row in stored]


def check_same(ours, plain):
    assert ours[0] == plain[0]
    for name, new, old in zip(("log-probs", "values"), ours[1:], plain[1:]):
        assert len(new) == len(old) > 0, name
        torch.testing.assert_close(torch.cat(new), torch.cat(old), rtol=0, atol=1e-5, msg=lambda text: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("family", ["review-lm", "gpt2", "llama", "bloom"])
@pytest.mark.parametrize("stop", [[-1], STOP], ids=["no row ends", "rows end"])
def test_it_samples_the_tokens_of_the_plain_loop_with_their_log_probs_and_values(family, stop):
    fast, ours = make(FastPPOTrainer, family), make(Compiled, family)
    for seed in range(2):       # the second batch meets what the first one left in the cache
        plain = sampled(fast, seed, eos_token_id=stop)
        check_same(sampled(ours, seed, eos_token_id=stop), plain)
        assert (min(map(len, plain[0])) < NEW_TOKENS) == (stop == STOP)
        assert torch.cat(plain[2]).std() > 0.01, "a head that gives one value would prove nothing"
    assert len(compiled) == 1 and list(ours.decoders) == [(12, 64)]


def test_rows_are_dropped_by_the_sampler_and_computed_in_the_graph(monkeypatch):
    """Else the test above would not have tried it; and a dropped row goes no further than its last position."""
    trainer, rows, last, step = make(Compiled, "gpt2"), [], [], StaticDecoder.forward

    def watch(self, input_ids, **keywords):
        rows.append(len(input_ids))
        result = step(self, input_ids, **keywords)
        last.append(self.mask.sum(1).max().item())
        return result
    monkeypatch.setattr(StaticDecoder, "forward", watch)
    responses = sampled(trainer)[0]
    assert rows[0] == 12 and rows[-1] == 8 and len(compiled) == 1
    assert last[-1] <= max(LENGTHS) + max(map(len, responses)) <= 32


def test_a_batch_ends_when_all_of_its_rows_have_ended():
    assert [len(r) for r in sampled(make(Compiled), eos_token_id=list(range(90)))[0]] == [1] * 12 and not compiled


@pytest.mark.parametrize("family", ["review-lm", "llama"])
def test_a_whole_ppo_step_is_the_fast_trainers(family):
    results = []
    for kind in (FastPPOTrainer, Compiled):
        trainer, stats = make(kind, family), []
        for seed in range(2):           # the second rollout runs with the weights that the first step made
            responses = sampled(trainer, seed)[0]
            assert trainer.sampled, "the sampler's results are there to be used again"
            stats.append(trainer.step(queries(seed), [torch.tensor(r) for r in responses], [len(r) / 10 for r in responses]))
        results.append((weights(trainer), stats, responses))
    (plain, plain_stats, plain_responses), (ours, stats, responses) = results
    assert responses == plain_responses and len(compiled) == 1
    assert distance(ours, plain) < 1e-5 < 1e-3 < distance(ours, weights(make(FastPPOTrainer, family)))
    for new, old in zip(stats, plain_stats):
        for key in ("objective/kl", "ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy", "ppo/policy/approxkl", "ppo/val/mean"):
            assert new[key] == pytest.approx(old[key], abs=1e-5), key


def test_with_the_layers_shared_but_not_recorded_it_is_compiled():
    """With the full KL the sampler's results are not used again, and so nothing has to be recorded."""
    fast, ours = (make(kind, shared=1, kl_penalty="full") for kind in (FastPPOTrainer, Compiled))
    assert sampled(ours)[0] == sampled(fast)[0] and len(compiled) == 1 and not ours.sampled


# ------------------------------------------------------------------------------------------------ compiled once


def test_prompts_of_other_lengths_compile_nothing_new_and_another_number_of_rows_does():
    ours, fast = make(Compiled), make(FastPPOTrainer)
    longer = [torch.cat([query, query, query]) for query in queries()]              # 33 tokens at most, where it was 11
    for prompts in (queries(), longer, queries(1)):
        check_same(sampled(ours, prompts=prompts), sampled(fast, prompts=prompts))
    assert len(compiled) == 1
    check_same(sampled(ours, prompts=queries()[:5]), sampled(fast, prompts=queries()[:5]))
    assert len(compiled) == 2 and list(ours.decoders) == [(12, 64), (5, 64)]


def test_the_cache_keeps_its_addresses():
    """Those are part of a CUDA graph."""
    trainer, found = make(Compiled), []
    for seed in range(2):
        sampled(trainer, seed)
        layers = trainer.decoders[12, 64].cache.layers
        found.append([tensor.data_ptr() for layer in layers for tensor in (layer.keys, layer.values, layer.cumulative_length)])
    assert found[0] == found[1] and len(found[0]) == 6


def test_the_policys_own_forward_is_back_afterwards_also_after_an_error(monkeypatch):
    trainer = make(Compiled)
    before = trainer.language_model.forward
    sampled(trainer)
    assert trainer.language_model.forward == before
    monkeypatch.setattr(speed, "draw", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampled(trainer)
    assert trainer.language_model.forward == before


# ------------------------------------------------------------------------------------------------ the plain loop


def with_adapters():
    return WithAdapters.from_pretrained(policy().pretrained_model, peft_config=lora_settings(2))


def quantized(trainer):
    trainer.language_model.is_loaded_in_8bit = True


def with_zero(trainer):
    trainer.accelerator = types.SimpleNamespace(
        device=trainer.accelerator.device, autocast=contextlib.nullcontext, num_processes=1, mixed_precision="no",
        state=types.SimpleNamespace(deepspeed_plugin=types.SimpleNamespace(zero_stage=2)))


def flash(trainer):
    trainer.language_model.config._attn_implementation_internal = "flash_attention_2"


def not_compilable(trainer):
    type(trainer.language_model.pretrained_model)._can_compile_fullgraph      # the name that transformers uses
    trainer.language_model.pretrained_model._can_compile_fullgraph = False


@pytest.mark.parametrize("change, settings, sentence", [
    (lambda trainer: setattr(trainer, "compiled_on", "cuda"), {}, "the device is 'cpu', and it is made for 'cuda'"),
    (lambda trainer: None, dict(model=with_adapters), "adapters put layers"), (quantized, {}, "quantized"), (with_zero, {}, "DeepSpeed"),
    (lambda trainer: None, dict(shared=1), "shared with the reference"), (not_compilable, {}, "LlamaForCausalLM cannot be")])
def test_what_it_is_not_made_for_is_sampled_by_the_plain_loop(change, settings, sentence, caplog):
    found = []
    for kind in (FastPPOTrainer, Compiled):
        trainer = make(kind, **{name: value() if callable(value) else value for name, value in settings.items()})
        change(trainer)
        found.append([sampled(trainer, seed)[0] for seed in range(2)])
    assert found[0] == found[1] and not compiled and not trainer.decoders
    assert [record.message for record in caplog.records if sentence in record.message] and len(trainer.reported) == 1
    assert sum("decoding is not compiled" in record.message for record in caplog.records) == 1, "it is said once"


def test_attention_that_may_need_a_cache_that_grows_is_named():
    trainer = make(Compiled)
    assert trainer.why_not_compiled(trainer.language_model, (12, 64)) is None
    flash(trainer)
    assert "attention 'flash_attention_2'" in trainer.why_not_compiled(trainer.language_model, (12, 64))


def test_a_sliding_window_never_comes_as_far(monkeypatch):
    """`generate` samples there: the cache forgets tokens, and FastPPOTrainer.generate_batch refuses it."""
    monkeypatch.setattr(CompiledPPOTrainer, "sample", lambda *args: 1 / 0)
    plain, ours = make(FastPPOTrainer, "sliding"), make(Compiled, "sliding")
    torch.manual_seed(0)
    expected = plain.generate(queries(), batch_size=12, return_prompt=False, max_new_tokens=4)
    torch.manual_seed(0)
    responses = ours.generate(queries(), batch_size=12, return_prompt=False, max_new_tokens=4)
    assert [r.tolist() for r in responses] == [r.tolist() for r in expected]


@pytest.mark.parametrize("adapters", [False, True])
def test_the_references_responses_are_those_of_the_plain_loop(adapters):
    found = []
    for kind in (FastPPOTrainer, Compiled):
        trainer = make(kind, model=with_adapters() if adapters else None)
        torch.manual_seed(3)
        both = trainer.generate(queries(), batch_size=12, return_prompt=False, max_new_tokens=4, generate_ref_response=True)
        found.append([[r.tolist() for r in responses] for responses in both])
    assert found[0] == found[1] and len(compiled) == (0 if adapters else 1)


def test_more_shapes_than_a_few_are_sampled_by_the_plain_loop(monkeypatch, caplog):
    monkeypatch.setattr(decoding, "MOST_SHAPES", 2)
    ours, fast = make(Compiled), make(FastPPOTrainer)
    for rows in (12, 5, 3, 12):
        prompts = queries()[:rows]
        check_same(sampled(ours, prompts=prompts), sampled(fast, prompts=prompts))
    assert len(compiled) == len(ours.decoders) == 2
    assert "2 shapes of a batch are already, and this is another one: (rows, columns) (3, 64)" in caplog.text


def test_numbers_that_are_not_finite_are_found_as_by_the_plain_loop():
    from ppo_core import BadNumbers
    for kind in (FastPPOTrainer, Compiled):
        trainer = make(kind)
        sampled(trainer)
        with torch.no_grad():
            trainer.language_model.pretrained_model.model.norm.weight[0] = float("nan")
        with pytest.raises(BadNumbers):
            sampled(trainer)
        # and the cache keeps nothing of it
        with torch.no_grad():
            trainer.language_model.pretrained_model.model.norm.weight[0] = 1.0
        assert sampled(trainer)[0]


# ------------------------------------------------------------------------------------------------ from the command line


def test_the_flag_runs_it_and_changes_no_number(tmp_path, monkeypatch, caplog):
    """Where there is no GPU the run says so and goes on; with the step compiled it has the same statistics."""
    for folder, flags in (("fast", []), ("plain loop", ["--compile_decoding"]), ("compiled", ["--compile_decoding"])):
        if folder == "compiled":
            assert "decoding is not compiled: the device is 'cpu'" in caplog.text and not compiled
            monkeypatch.setattr(decoding, "CompiledPPOTrainer", Compiled)
        train.main([*SMALL, "--output_dir", str(tmp_path / folder), *flags])
    assert compiled
    fast, plain_loop, ours = (numbers(tmp_path / folder) for folder in ("fast", "plain loop", "compiled"))
    assert fast == plain_loop and len(fast) == len(ours) == 2
    for one, other in zip(fast, ours):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == pytest.approx(other[name], abs=2e-5, rel=1e-4), name


def test_the_plain_trainer_has_no_decoding_step_to_compile(tmp_path):
    with pytest.raises(ValueError, match="plain and compile_decoding are both given"):
        train.main([*SMALL, "--output_dir", str(tmp_path / "run"), "--plain", "--compile_decoding"])
