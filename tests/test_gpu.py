"""What only a GPU can show: `make test-gpu`, on one NVIDIA card, some on two. Without a card each test is skipped with the reason.

PLAINPPO_GPU_TESTS_ON=cpu make test-gpu runs, on a CPU, those of them that need no kernel of a GPU, to show that the tests themselves work.
What they compare with is the rest of the tests': TRL's numbers in tests/golden, the jobs of tests/worker.py, the runs of tests/forge.py.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import GradScalerKwargs
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoint
import distributed
import speed
import test_golden
import worker
from decoding import CompiledPPOTrainer
from forge import make_inputs
from optim import make_optimizer, trainable_parameters
from ppo_core import PPOTrainer
from speed import FastPPOTrainer
from test_distributed import CONFIGS, FULL, HERE, OFFLOAD, PLAIN, ROOT, STAGES, distance, execute, flat, launcher, without_key_biases
from test_ppo_core import config, ragged, review_lm, tiny, tokenizer
from test_survival import PHASES, STEPS, check_fault, check_out_of_memory, end_state, free_port, recorded, wait_for_step
from value_head import AutoModelForCausalLMWithValueHead

ON = os.environ.get("PLAINPPO_GPU_TESTS_ON")
CARDS = torch.cuda.device_count() if ON == "cuda" else 0


def why_not():
    """-> why these tests cannot run, or None."""
    if ON is None:
        return "only `make test-gpu` runs it"
    if ON == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", which is built without CUDA: install the one for your card, see pytorch.org"
        return f"no CUDA device is seen by torch {torch.__version__}{built}"
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
card_only = pytest.mark.skipif(ON == "cpu", reason="it is about the card itself")
two_cards = pytest.mark.skipif(CARDS < 2, reason=f"it needs 2 CUDA devices and {CARDS} are seen")
TOLERANCE = 1e-5 if ON == "cpu" else 1e-4       # of weights of a small model after some steps in float32
KINDS = {"plain": PPOTrainer, "fast": FastPPOTrainer}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """No TF32, seeds, and an Accelerator of its own for each test."""
    if ON == "cuda":
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")
    AcceleratorState._reset_state(reset_partial_state=True)
    distributed.seed_everything(0)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def start(**keywords):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = distributed.start(cpu=ON == "cpu", **keywords)
    assert accelerator.device.type == ON
    return accelerator


def make(kind="plain", family="gpt2", optimizer="sgd", shared=None, accelerator=None, reference=None, model=None, **settings):
    model = model or tiny(family)
    made = make_optimizer(optimizer, trainable_parameters(model), worker.RATES[optimizer])
    return KINDS[kind](config(**settings), model, reference, tokenizer(), optimizer=made, num_shared_layers=shared,
                       accelerator=accelerator or start())


def weights(trainer):
    return {name: tensor.detach().float().cpu().clone() for name, tensor in trainer.language_model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------- the same numbers


@every_kind
@pytest.mark.parametrize("case", test_golden.CASES)
def test_training_arrives_at_trls_numbers(case, kind):
    """To 1e-3: the CPU's golden tests allow 2e-4 per token, and a GPU adds in another order."""
    data, arrays = test_golden.load(case)
    stats, model, updates, draw = test_golden.train(data, kind)
    assert next(model.parameters()).device.type == ON
    last = data["steps"][-1]
    logprobs, values = test_golden.score_one_by_one(model, last["queries"], last["responses"])
    assert test_golden.largest_difference(logprobs, arrays["final/logprobs"], arrays["final/mask"]) < 1e-3
    assert test_golden.largest_difference(values, arrays["final/values"], arrays["final/mask"]) < 1e-3
    assert updates == data["mini_batches"] and draw == data["numpy_draw_after"]
    wrong = []
    for k, (step, ours) in enumerate(zip(data["steps"], stats)):
        for key, expected in step["stats"].items():
            floor = 10 * (test_golden.DIFFERENCE_FLOOR if key in test_golden.DIFFERENCES else test_golden.STAT_FLOOR)
            if not abs(float(ours[key]) - expected) <= 1e-3 * abs(expected) + floor:
                wrong.append(f"step {k}: {key} is {float(ours[key]):.8g}, TRL had {expected:.8g}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("settings", [dict(mini_batch_size=2), dict(kl_penalty="full", shared=1, mini_batch_size=2),
                                      dict(gradient_checkpointing=True, mini_batch_size=2, gradient_accumulation_steps=2)], ids=str)
def test_the_fast_trainer_trains_as_the_plain_one(family, settings):
    results = []
    for kind in KINDS:
        distributed.seed_everything(0)
        trainer = make(kind, family, **settings)
        results.append(([trainer.step(*ragged(seed=seed)) for seed in range(3)], weights(trainer)))
    (plain_stats, plain), (fast_stats, fast) = results
    assert distance(plain, fast) < TOLERANCE < 10 * TOLERANCE < distance(plain, dict(tiny(family).state_dict()))
    for new, old in zip(fast_stats, plain_stats):
        for key in ("objective/kl", "ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy", "ppo/policy/approxkl", "ppo/grad_norm"):
            assert new[key] == pytest.approx(old[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_the_lean_sampler_writes_the_greedy_text_of_generate(family, monkeypatch):
    queries, greedy = ragged()[0], dict(max_new_tokens=8, return_prompt=False, batch_size=4)
    expected = make("plain", family).generate(queries, do_sample=False, allow_other_distribution=True, **greedy)
    monkeypatch.setattr(speed, "draw", lambda p: p.argmax(-1))
    assert [r.tolist() for r in make("fast", family).generate(queries, **greedy)] == [r.tolist() for r in expected]


def test_draw_follows_the_distribution_with_and_without_deterministic_algorithms():
    """Pearson's chi-square over 200,000 draws: with 31 degrees of freedom 61 is passed once in 1,000 times."""
    p = torch.softmax(torch.randn(32) * 2, -1).to(ON)
    p[5] = 0.0
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            drawn = torch.cat([speed.draw(p.expand(1000, -1)) for _ in range(200)])
        finally:
            torch.use_deterministic_algorithms(False)
        count, expected = torch.bincount(drawn, minlength=32).double(), p.double() / p.double().sum() * len(drawn)
        assert count[5] == 0 and float(((count - expected).square() / expected)[expected > 0].sum()) < 61


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_left_padding_changes_no_log_prob_and_no_value(family):
    model = tiny(family).to(ON).eval()
    ids = torch.randint(5, 90, (2, 7), device=ON)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long, device=ON), ids], 1)
    mask = (torch.arange(12, device=ON) >= 5).long().expand(2, -1)
    with torch.no_grad():
        logits, _, values = model(ids, torch.ones_like(ids))
        left_logits, _, left_values = model(padded, mask)
        wrong_logits, _, _ = model(padded, torch.ones_like(padded))
    assert float((left_logits[:, 5:].log_softmax(-1) - logits.log_softmax(-1)).abs().max()) < 1e-4
    assert float((left_values[:, 5:] - values).abs().max()) < 1e-4
    assert float((wrong_logits[:, 5:].log_softmax(-1) - logits.log_softmax(-1)).abs().max()) > 1e-2


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_compiled_decoding_step_samples_the_tokens_of_the_plain_loop(mixed_precision):
    """GPT-2 124M's shape, 64 rows of 64 tokens; on a CPU a small one. The weights are changed in between, as by an update."""
    small, tokens, counters = ON == "cpu", 8 if ON == "cpu" else 64, torch._dynamo.utils.counters
    shape = dict(n_embd=32, n_layer=2, n_head=2, vocab_size=97) if small else {}
    model = AutoModelForCausalLMWithValueHead(GPT2LMHeadModel(GPT2Config(**shape)), v_head_init_strategy="normal")
    trainer = CompiledPPOTrainer(config(batch_size=64), model, None, tokenizer(), accelerator=start(mixed_precision=mixed_precision))
    if small:
        trainer.compile_settings = {"backend": "aot_eager"}
    synchronize = (lambda: None) if small else torch.accelerator.synchronize
    queries = [torch.randint(5, 90, (4 + n % 13,)) for n in range(64)]
    torch._dynamo.reset()
    counters.clear()
    for attempt in range(4):        # the first compiles, the second records the graph, and the others replay it
        seconds, responses, values = {}, {}, {}
        for way, device in (("plain", "none"), ("compiled", ON)):
            trainer.compiled_on = device
            torch.manual_seed(attempt)
            synchronize()
            began = time.perf_counter()
            responses[way] = trainer.generate(queries, batch_size=64, return_prompt=False, max_new_tokens=tokens, eos_token_id=[-1])
            synchronize()
            seconds[way] = time.perf_counter() - began
            values[way] = [row["values"] for row in trainer.sampled.values()]
        print(f"{mixed_precision}, rollout {attempt}:", ", ".join(f"{way} {64 * tokens / s:.0f} tokens/s" for way, s in seconds.items()))
        # A number that differs in its last digits may now and then draw another token, and then the row goes another way.
        same = [i for i in range(64) if torch.equal(responses["plain"][i], responses["compiled"][i])]
        print(f"{len(same)} of 64 rows are the same")
        assert len(same) >= (60 if mixed_precision == "no" else 1)
        if mixed_precision == "no":
            assert all(float((values["plain"][i] - values["compiled"][i]).abs().max()) < 1e-4 for i in same)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    assert len(trainer.decoders) == 1 and counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


# ---------------------------------------------------------------------------------------------------- half precision


@every_kind
def test_bf16_autocast_moves_float32_weights_almost_as_float32_does(kind):
    moved = []
    for precision in ("no", "bf16"):
        distributed.seed_everything(0)
        trainer = make(kind, accelerator=start(mixed_precision=precision))
        before = flat(weights(trainer))
        stats = [trainer.step(*ragged(seed=seed)) for seed in range(3)]
        assert float(stats[0]["objective/kl_dist"].abs().max()) < 1e-5          # policy and reference in one precision
        assert {p.dtype for p in trainer.language_model.parameters()} == {torch.float32}
        moved.append(flat(weights(trainer)) - before)
    exact, ours = moved
    assert exact.norm() > 0.1 and 0 < (ours - exact).norm() < 0.1 * exact.norm()


SCALE = 2.0 ** 24       # of the loss: too large for fp16, whose largest number is 65,504


def check_fp16(device, folder, kind="fast"):
    """Optimizer steps in fp16, of which the first overflow: they are counted and left out, the scale is halved, training goes on.

    On a CPU accelerate has no loss scaler, so it gets torch's own for CPUs.
    """
    def start_fp16():
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = distributed.start(cpu=device == "cpu", mixed_precision="fp16", kwargs_handlers=[GradScalerKwargs(init_scale=SCALE)])
        if device == "cpu":
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=SCALE)
        return accelerator
    settings = dict(mini_batch_size=1, ppo_epochs=4, max_grad_norm=0.5)
    trainer = make(kind, optimizer="adam", accelerator=start_fp16(), **settings)
    before = weights(trainer)
    first = trainer.step(*ragged())
    skipped, scaler = int(first["ppo/skipped_steps"]), trainer.accelerator.scaler
    assert 0 < skipped < first["ppo/optimizer_steps"] == 16 and scaler.get_scale() == SCALE * 0.5 ** skipped
    assert abs(first["objective/kl"]) < 1e-5 and {p.dtype for p in trainer.language_model.parameters()} == {torch.float32}
    assert distance(weights(trainer), before) > 1e-4 and all(tensor.isfinite().all() for tensor in weights(trainer).values())
    print(f"fp16: {skipped} of 16 optimizer steps skipped, the scale went from {SCALE:.0f} to {scaler.get_scale():.0f}")
    checkpoint.save(trainer, folder / "step-000001")
    state = np.random.get_state()
    second, expected = trainer.step(*ragged(seed=1)), weights(trainer)
    assert second["ppo/skipped_steps"] < skipped
    other = make(kind, optimizer="adam", accelerator=start_fp16(), **settings)
    checkpoint.load(other, folder / "step-000001")
    assert other.accelerator.scaler.get_scale() == SCALE * 0.5 ** skipped
    np.random.set_state(state)
    other.step(*ragged(seed=1))
    assert distance(weights(other), expected) < (1e-7 if device == "cpu" else 1e-3)
    AcceleratorState._reset_state(reset_partial_state=True)


@every_kind
def test_fp16_skips_what_overflows_and_goes_on(kind, tmp_path):
    check_fp16(ON, tmp_path, kind)


# --------------------------------------------------------------------------------------------------------- bitsandbytes


def test_adam8bit_keeps_its_state_on_the_device_in_8_bits():
    trainer = make(optimizer="adam8bit", model=review_lm())
    before = weights(trainer)
    trainer.step(*ragged())
    states = [(p.numel(), state) for p, state in trainer.optimizer.state.items() if "state1" in state]
    large = [state for size, state in states if size >= 4096]
    assert large and all(state[name].dtype == torch.uint8 and state[name].device.type == ON for state in large for name in ("state1", "state2"))
    assert all(state["state1"].dtype == torch.float32 for size, state in states if size < 4096)
    assert distance(weights(trainer), before) > 1e-4 and all(tensor.isfinite().all() for tensor in weights(trainer).values())


@pytest.mark.parametrize("bits", [8, 4])
@every_kind
def test_a_reference_in_few_bits_runs_through_bitsandbytes_and_its_kl_at_step_0_is_small(bits, kind):
    reference = review_lm(bits)
    assert {p.device.type for p in reference.parameters()} == {ON}
    kinds = {type(module).__name__ for module in reference.modules()}
    assert {8: "Linear8bitLt", 4: "Linear4bit"}[bits] in kinds, kinds
    stats = make(kind, reference=reference, model=review_lm()).step(*ragged())
    print(f"step-0 KL to a reference in {bits} bits, {kind} trainer: {stats['objective/kl']:.4f} nats per response")
    assert 0 < abs(stats["objective/kl"]) < 2


# --------------------------------------------------------------------------------------------------------------- memory


@card_only
def test_optimize_cuda_cache_gives_memory_back_before_and_after_the_update():
    junk, found = 256 * 2 ** 20, {}
    for clear in (False, True):
        trainer = make(optimize_cuda_cache=clear)
        torch.cuda.empty_cache()
        reserved, original = [], trainer.optimizer_step

        def optimizer_step(*arguments, **keywords):
            reserved.append(torch.cuda.memory_reserved())
            return original(*arguments, **keywords)
        trainer.optimizer_step = optimizer_step
        del (block := [torch.empty(junk, dtype=torch.uint8, device="cuda")])[:]         # what a rollout leaves in the allocator
        before = torch.cuda.memory_reserved()
        trainer.step(*ragged())
        found[clear] = (before, reserved[0], torch.cuda.memory_reserved())
        print(f"optimize_cuda_cache={clear}: {before:,} bytes reserved before the step, {reserved[0]:,} at its first optimizer step, "
              f"{torch.cuda.memory_reserved():,} after it")
        assert block == []
    assert found[False][1] >= junk and found[True][0] >= junk
    assert found[True][1] < junk and found[True][2] <= found[True][1] + 64 * 2 ** 20


def test_peak_memory_counts_what_was_allocated_on_the_device():
    device = start().device
    before = distributed.peak_memory(device)
    del (block := [torch.ones(before // 2 + 2 ** 26, dtype=torch.uint8, device=device)])[:]
    assert block == [] and distributed.peak_memory(device) >= before


# -------------------------------------------------------------------------------------------------------- runs, one card


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    flags = [str(flag) for flag in make_inputs(tmp_path_factory.mktemp("inputs"))]
    return [flag for flag in flags if ON == "cpu" or flag != "--cpu"] + ["--steps", str(STEPS)]


def begin(arguments, output, ranks=1, **environment):
    """Start scripts/train.py as processes that share the first card. -> list of them"""
    shared = {"SHARE_GPU": "1", "CUDA_VISIBLE_DEVICES": first_card()} if ON == "cuda" and ranks > 1 else {}
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    with open(output, "a") as file:
        return [subprocess.Popen([sys.executable, str(HERE / "forge.py"), "train", *map(str, arguments)], cwd=ROOT, stdout=file,
                                 stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", **shared, **environment,
                                                   **({**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})})
                for rank in range(ranks)]


def first_card():
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def finish(processes, output, seconds=250):
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, Path(output).read_text()


DETERMINISTIC = {"DETERMINISTIC": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@every_kind
def test_a_run_that_is_killed_and_resumed_ends_bit_for_bit_as_one_that_was_not(kind, inputs, tmp_path):
    flags = [*inputs, "--save_every", 3, "--keep_last", STEPS, *(["--plain", "True"] if kind == "plain" else [])]
    codes, text = finish(begin([*flags, "--output_dir", tmp_path / "whole"], tmp_path / "out", **DETERMINISTIC), tmp_path / "out")
    assert codes == [0], text[-3000:]
    run, process = tmp_path / "killed", begin([*flags, "--output_dir", tmp_path / "killed"], tmp_path / "out", **DETERMINISTIC)
    wait_for_step(run, 4, seconds=100)
    process[0].send_signal(signal.SIGKILL)
    process[0].wait()
    assert recorded(run) < STEPS
    codes, text = finish(begin(["--resume", run], tmp_path / "out", **DETERMINISTIC), tmp_path / "out")
    assert codes == [0] and "resuming after step 3" in text, text[-3000:]
    assert end_state(run) == end_state(tmp_path / "whole")
    saved = torch.load(run / "checkpoints" / f"step-{STEPS:06d}" / "random-0.pt", weights_only=True)
    assert ("cuda" in saved) == (ON == "cuda"), "the card's own generator is part of a checkpoint"


@pytest.mark.parametrize("fault, phase, rank", [("kill", "update", 1), ("stop", "reward", 1), ("slow", "rollout", 1)])
def test_a_rank_that_hangs_ends_the_run_in_time_and_is_named_with_its_phase(fault, phase, rank, inputs, tmp_path):
    """Two processes on one card, over gloo."""
    run, output = tmp_path / "run", tmp_path / "out"
    processes = begin([*inputs, "--save_every", 1, "--collective_timeout", 20, "--output_dir", run], output, ranks=2,
                      FAULT=f"{fault}:{phase}:{rank}")
    wait_for_step(run, 1, seconds=150)
    started = time.monotonic()
    codes, text = finish(processes, output)
    assert time.monotonic() - started < 20 + 5 + 15 and 0 not in codes, text[-3000:]        # the second step, and the end of two processes
    check_fault(text, fault, phase, rank)
    kept, = (run / "checkpoints").iterdir()
    assert checkpoint.damage(kept) is None


@pytest.mark.parametrize("phase", PHASES)
def test_a_full_card_is_one_sentence_and_costs_no_checkpoint(phase, inputs, tmp_path):
    """In the second step more is asked for than the card has. On a CPU, torch's error is raised without asking."""
    run, output = tmp_path / "run", tmp_path / "out"
    codes, text = finish(begin([*inputs, "--save_every", 1, "--keep_last", STEPS, "--output_dir", run], output, FAULT=f"memory:{phase}:0"), output)
    asked, free = check_out_of_memory(text, phase)
    print(f"out of memory in {phase}: {asked} asked, {free} free")
    kept, = (run / "checkpoints").iterdir()
    assert codes == [1] and kept.name == "step-000001" and checkpoint.damage(kept) is None
    codes, text = finish(begin(["--resume", run], output), output)
    assert codes == [0] and "resuming after step 1" in text, text[-3000:]


def test_a_number_that_is_not_finite_is_refused_by_name_before_it_moves_anything():
    found, _ = worker.bad_numbers({**PLAIN, "batch_size": 8, "mini_batch_size": 4, "gradient_accumulation_steps": 2})
    assert len(found) == 2 * len(worker.PLACES)
    for name, one in found.items():
        place, number = name.rsplit(" ", 1)
        assert one["same"] and one["moments"] and one["steps_done"] == 0 and one["then"] is None, (name, one)
        assert one["stage"] == place.removeprefix("new ").removeprefix("first "), name
        words = {"weights": "the model's weights are not finite", "gradients": "gradient of .* is not finite"}.get(
            place, rf"sample 1 of 8 \(mini-batch [12]\) (are|is) -?{number}")
        assert re.search(words, one["message"]), one["message"]


# ------------------------------------------------------------------------------------------- DDP and ZeRO on one card


FLAGS = {"sgd": {"optimizer": "sgd", "settings": FULL, "write_first": True}, "adam": {"optimizer": "adam", "settings": FULL},
         "fast": {"optimizer": "sgd", "settings": {**FULL, "fast": True}},
         "accumulated": {"optimizer": "sgd", "settings": {**FULL, "mini_batch_size": 2}}}


class Ranks:
    """-> ranks(way, processes, job, nccl): [(findings, weights) of each], of jobs that are started when a test first asks for them.

    way: "one" without a launcher, "ddp", a file of scripts/accelerate_configs, or ZeRO-2 with offload, which is its file with a line
    more. Several processes share the first card over gloo; with nccl each has a card of its own.
    """

    def __init__(self, folder):
        self.folder, self.started = folder, set()

    def jobs(self, way, processes):
        size = 8 // processes
        todo = []
        for name, job in FLAGS.items():
            settings = {"batch_size": size, **job["settings"]}
            if name == "accumulated":
                settings["gradient_accumulation_steps"] = size // 2
            todo.append({"name": name, "do": "train", **job, "settings": settings})
        todo += [{"name": "write", "do": "write", "settings": {**PLAIN, "batch_size": size}},
                 {"name": "skip", "do": "skip", "settings": {**PLAIN, "batch_size": size}},
                 {"name": "finite", "do": "finite", "settings": {**PLAIN, "batch_size": size, "whole": 1000}},
                 {"name": "bf16", "do": "train", "settings": {**PLAIN, "batch_size": size}, "env": {"ACCELERATE_MIXED_PRECISION": "bf16"}}]
        left_out = {"deepspeed_zero2_offload": {"write"}, "deepspeed_zero3_offload": {"write"}}.get(way, set())
        return [job for job in todo if job["name"] not in left_out]

    def command(self, way, processes, out):
        config = None
        if way == "deepspeed_zero2_offload":
            config = self.folder / f"{way}.yaml"
            config.write_text((CONFIGS / "deepspeed_zero2.yaml").read_text() + "  offload_optimizer_device: cpu\n")
        name = ("multi_cpu" if ON == "cpu" else "multi_gpu") if way == "ddp" else way
        start = [sys.executable] if way == "one" else launcher(name, "--num_processes", processes, config=config)
        return [*start, HERE / "worker.py", out, json.dumps(self.jobs(way, processes))]

    def __call__(self, way, processes, job, nccl=False):
        out = self.folder / f"{way}-{processes}-{'nccl' if nccl else 'gloo'}"
        if out not in self.started:
            self.started.add(out)
            shared = {"SHARE_GPU": "1", "CUDA_VISIBLE_DEVICES": first_card()} if ON == "cuda" and processes > 1 and not nccl else {}
            code, output = execute(self.command(way, processes, out), seconds=280, **shared)
            assert code == 0, output[-3000:]
        paths = [Path(f"{out}-{job}-{rank}.json") for rank in range(processes)]
        assert all(path.exists() for path in paths), f"{way} has failed at an earlier job, or none of the tests has started it"
        return [(json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")) if path.with_suffix(".safetensors").exists() else {})
                for path in paths]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks(tmp_path_factory.mktemp("ranks"))


def check_trained_alike(found, expected):
    """found(job), expected(job): what the ranks of two ways have found."""
    for job in ("sgd", "fast", "accumulated"):
        assert distance(found(job)[0][1], expected("sgd")[0][1]) < TOLERANCE, job
    assert distance(*(without_key_biases(ways("adam")[0][1]) for ways in (found, expected))) < max(1e-4, TOLERANCE)
    for job in FLAGS:
        assert all(rank["steps"] == found(job)[0][0]["steps"] and rank["kl_coef"] == found(job)[0][0]["kl_coef"] for rank, _ in found(job)), job
    for rank, _ in found("skip"):
        assert rank["skipped"] == rank["of"] and rank["moved"] == 0 and rank["then"] == 0
    weight = "pretrained_model.transformer.h.0.mlp.c_fc.bias"
    assert [rank["found"] for rank, _ in found("finite")][-1] == [None, weight]
    assert abs(found("bf16")[0][0]["steps"][0]["objective/kl"]) < 1e-5          # policy and reference are one model
    bf16, exact = (flat(each("bf16")[0][1]) for each in (found, expected))
    assert (bf16 - exact).abs().max() < 0.1


@pytest.mark.parametrize("way", [*STAGES, *OFFLOAD])
def test_each_stage_of_zero_on_one_card_trains_as_plain_training(way, ranks):
    check_trained_alike(lambda job: ranks(way, 1, job), lambda job: ranks("one", 1, job))


@pytest.mark.parametrize("way", ["ddp", *STAGES])
def test_two_processes_on_one_card_train_as_one_process(way, ranks):
    check_trained_alike(lambda job: ranks(way, 2, job), lambda job: ranks("one", 1, job))
    if way != "ddp":
        assert distance(ranks(way, 2, "sgd")[0][1], ranks("ddp", 2, "sgd")[0][1]) < TOLERANCE


@pytest.mark.parametrize("way, processes", [*((way, 1) for way in STAGES), *((way, 2) for way in ["ddp", *STAGES])])
def test_text_is_written_as_by_one_process_and_uneven_ends_do_not_hang(way, processes, ranks):
    (one, _), = ranks("one", 1, "write")
    found = ranks(way, processes, "write")
    assert all(rank["greedy"] == one["greedy"] for rank, _ in found)
    assert [rank["uneven"][0] for rank, _ in found] == [1, 6][:processes]
    assert processes == 1 or found[0][0]["sampled"] != found[1][0]["sampled"]


# ------------------------------------------------------------------------------------------------- two cards and NCCL


@two_cards
@pytest.mark.parametrize("way", ["ddp", *STAGES])
def test_two_cards_over_nccl_train_as_one_process(way, ranks):
    check_trained_alike(lambda job: ranks(way, 2, job, nccl=True), lambda job: ranks("one", 1, job))


def launch_on_two_cards(flags, run, output, **environment):
    command = [*launcher("multi_gpu"), HERE / "forge.py", "train", *flags, "--output_dir", run]
    with open(output, "w") as file:
        return subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=file, stderr=file,
                                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10", **environment})


@two_cards
@pytest.mark.parametrize("fault", ["kill", "stop", "slow"])
@pytest.mark.parametrize("blocking", [False, True])
def test_a_rank_that_is_lost_inside_an_all_reduce_over_nccl_ends_the_run(fault, blocking, inputs, tmp_path):
    """The other rank waits in the all-reduce of an optimizer step. NCCL's watchdog ends its process after the time-out; with
    TORCH_NCCL_BLOCKING_WAIT=1 the wait raises, and the run says which rank it waited for."""
    run, output, timeout = tmp_path / "run", tmp_path / "out", 20
    process = launch_on_two_cards([*inputs, "--save_every", 1, "--collective_timeout", timeout], run, output, FAULT=f"{fault}:update:1",
                                  TORCH_NCCL_BLOCKING_WAIT=str(int(blocking)))
    wait_for_step(run, 1, seconds=150)
    started, family = time.monotonic(), psutil.Process(process.pid).children(recursive=True)
    code = process.wait(timeout=timeout + 100)
    print(f"{fault} inside an all-reduce, blocking={blocking}: the run ended after {time.monotonic() - started:.0f} s")
    assert code != 0 and not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family)
    kept, = (run / "checkpoints").iterdir()
    assert checkpoint.damage(kept) is None
    if blocking and fault != "kill":        # a launcher ends the others as soon as one is dead
        check_fault(output.read_text(), fault, "update", 1)


@two_cards
def test_a_run_on_two_cards_resumes_bit_for_bit(inputs, tmp_path):
    flags = [*inputs, "--save_every", 3, "--keep_last", STEPS]
    ends = []
    for stop in (False, True):
        run, output = tmp_path / f"run-{stop}", tmp_path / f"out-{stop}"
        process = launch_on_two_cards(flags, run, output, **DETERMINISTIC)
        if stop:
            wait_for_step(run, 4, seconds=150)
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            assert process.wait(timeout=100) != 0
            command = [*launcher("multi_gpu"), HERE / "forge.py", "train", "--resume", run]
            code, text = execute(command, seconds=200, **DETERMINISTIC)
            assert code == 0, text[-3000:]
        else:
            assert process.wait(timeout=200) == 0, output.read_text()[-3000:]
        ends.append(end_state(run))
    assert ends[0] == ends[1]
