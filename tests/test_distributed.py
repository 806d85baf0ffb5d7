"""distributed.py: one process, two real ones (gloo on the CPU) and DeepSpeed's three stages do the same to the same batch.

Each way of running is started once, with scripts/accelerate_configs/<way>.yaml, and does all its jobs (tests/worker.py); the tests
look at what it left. A start that hangs is killed and fails.
"""
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import distributed
from test_ppo_core import tiny
from value_head import AutoModelForCausalLMWithValueHead

HERE = Path(__file__).parent
ROOT = HERE.parent
CONFIGS = ROOT / "scripts" / "accelerate_configs"
PLAIN = {"adap_kl_ctrl": False, "ppo_epochs": 2}
FULL = {"ppo_epochs": 2, "init_kl_coef": 0.3, "target": 0.05, "horizon": 50.0, "whiten_rewards": True, "max_grad_norm": 0.5,
        "use_score_scaling": True, "use_score_norm": True}
EMPTY = (1, 7, 3, 5, 0, 0, 0, 0)        # the second rank has no response token at all
STAGES = ["deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"]
long = pytest.mark.long         # whatever starts DeepSpeed, see conftest.py
WAYS = ["multi_cpu", *(pytest.param(way, marks=long) for way in STAGES)]
OFFLOAD = ["deepspeed_zero2_offload", "deepspeed_zero3_offload"]       # the first is ZeRO-2's file with one more line, see launcher
OPTIMIZERS = ["sgd", "adam", "adam8bit", "lion"]
BF16 = {"env": {"ACCELERATE_MIXED_PRECISION": "bf16"}}                  # what `mixed_precision: bf16` becomes
# From the second optimizer step on, by how many nats each log-prob has grown for the second rank alone. It has 15 of the 31 tokens, so
# the mean ratio is about 20 or 7 (10 is allowed), and the mean KL 1.9 or 1 (1.5 is allowed): one time all do what the first rank by
# itself would not, one time they do not do what the second would.
EARLY = {"early_stopping": True, "target_kl": 1.0, "ppo_epochs": 4}
DISAGREE = {"all_skip": (math.log(40), {}), "none_skips": (math.log(12), {}), "all_stop": (-4.0, EARLY), "none_stops": (-2.0, EARLY)}
every_way, every_stage = pytest.mark.parametrize("way", WAYS), pytest.mark.parametrize("way", WAYS[1:])
every_way_and_offload = pytest.mark.parametrize("way", [*WAYS, *(pytest.param(way, marks=long) for way in OFFLOAD)])


def jobs(processes, folder, way):
    """What each way does. Sizes are per process, so that all train on the same 8 responses."""
    size = 8 // processes
    pieces = {"batch_size": size, "mini_batch_size": 2, "gradient_accumulation_steps": size // 2}
    todo = [{"name": name, "do": "train", "optimizer": name, "settings": {**PLAIN, "batch_size": size}} for name in OPTIMIZERS[2:]]
    todo += [{"name": "sgd", "do": "train", "settings": {**FULL, "batch_size": size}, "write_first": True,
              "save": str(folder / f"{way}-final")},
             {"name": "adam", "do": "train", "optimizer": "adam", "settings": {**FULL, "batch_size": size}}]
    if way == "one":
        todo += [{"name": "plain", "do": "train", "settings": {**PLAIN, "batch_size": size}},
                 {"name": "unskipped", "do": "train", "optimizer": "adam", "steps": 1, "settings": {**PLAIN, **pieces}}]
    todo += [{"name": "accumulated", "do": "train", "settings": {**FULL, **pieces}},
             {"name": "skip", "do": "skip", "settings": {**PLAIN, **pieces}},
             {"name": "checkpointed", "do": "train", "settings": {**FULL, "batch_size": size, "gradient_checkpointing": True}},
             {"name": "eight_bits", "do": "eight_bits", "settings": {**PLAIN, "batch_size": size}},
             {"name": "bf16", "do": "train", "settings": {**PLAIN, "batch_size": size}, **BF16},
             {"name": "bf16_checkpointed", "do": "train", "settings": {**PLAIN, "batch_size": size, "gradient_checkpointing": True}, **BF16}]
    todo += [{"name": f"fast_{name}", "do": "train", "optimizer": name, "settings": {**FULL, "batch_size": size, "fast": True}}
             for name in ("sgd", "adam")]
    if way != "deepspeed_zero3" and way not in OFFLOAD:
        todo += [{"name": name, "do": "train", "settings": {**FULL, "batch_size": size, "lora": True, "fast": name == "fast_lora"}}
                 for name in ("lora", "fast_lora")]
    todo += [{"name": "fast_shared", "do": "train", "steps": 1, "shared": 2, "settings": {**PLAIN, "batch_size": size, "fast": True}}]
    if way in OFFLOAD:
        return todo
    todo += [{"name": name, "do": "disagree", "shift": shift, "settings": {**PLAIN, "batch_size": size, **more}}
             for name, (shift, more) in DISAGREE.items()] if processes == 2 else []
    todo += [{"name": "one_epoch", "do": "train", "steps": 1, "settings": {**PLAIN, "batch_size": size, "ppo_epochs": 1}},
             {"name": "empty", "do": "train", "steps": 1, "lengths": EMPTY, "settings": {**PLAIN, "batch_size": size}},
             # the second rank alone would never stop: it has no token that could have moved
             {"name": "early", "do": "train", "steps": 1, "lengths": EMPTY, "settings": {**PLAIN, "batch_size": size, "ppo_epochs": 4,
                                                                      "early_stopping": True, "target_kl": 1e-3}},
             {"name": "shared", "do": "train", "steps": 1, "shared": 2, "settings": {**PLAIN, "batch_size": size}},
             {"name": "infinite", "do": "infinite_loss", "settings": {**PLAIN, "batch_size": size, "ppo_epochs": 1}},
             {"name": "refuse", "do": "refuse", "settings": {**PLAIN, "batch_size": size, "ppo_epochs": 1}},
             {"name": "write", "do": "write", "settings": {**PLAIN, "batch_size": size}},
             {"name": "conflict", "do": "conflict", "settings": {**PLAIN, "batch_size": size, "max_grad_norm": 0.5}},
             {"name": "run", "do": "sampled_run", "settings": {**PLAIN, "batch_size": size, "ppo_epochs": 1}},
             {"name": "again", "do": "sampled_run", "settings": {**PLAIN, "batch_size": size, "ppo_epochs": 1}}]
    sharded = {}
    if way == "deepspeed_zero3":
        sharded = {"env": {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}}      # what `zero3_init_flag: true` becomes
        todo += [{"name": "layers", "do": "write", "gather": False, "settings": {**PLAIN, "batch_size": size}},
                 {"name": "loaded", "do": "train", "steps": 1, "lengths": EMPTY, "settings": {**PLAIN, "batch_size": size}, **sharded}]
    todo += [{"name": "memory", "do": "memory"}]
    return todo + [{"name": "reward", "do": "reward_model", "settings": {**PLAIN, "batch_size": size}, **sharded}]


def execute(command, seconds, **environment):
    """-> return code, stdout + stderr. A hang fails: the launcher is told to end, as only it can end the processes it started."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([str(part) for part in command], env=own, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            end(process)
        output.seek(0)
        text = output.read()
    if code is None:
        pytest.fail(f"no end after {seconds} s: {text[-3000:]}")
    return code, text


def end(process):
    process.terminate()
    try:
        process.wait(timeout=40)        # a launcher gives its processes 30 s
    except subprocess.TimeoutExpired:
        process.kill()


def launcher(way, *flags, config=None):
    """config: the file that says how, if it is not the one in scripts/accelerate_configs."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config or CONFIGS / f"{way}.yaml",
            "--num_processes", "2", *flags]


class Runs:
    """Starts each way once, when a test first asks for it. -> runs(way, job): [(findings, weights) of each rank]."""

    def __init__(self, folder):
        self.folder, self.started = folder, set()

    def start(self, way):
        processes = 1 if way == "one" else 2
        todo = json.dumps(jobs(processes, self.folder, way))
        config = None
        if way == "deepspeed_zero2_offload":
            config = self.folder / f"{way}.yaml"
            config.write_text((CONFIGS / "deepspeed_zero2.yaml").read_text() + "  offload_optimizer_device: cpu\n")
        command = [sys.executable] if processes == 1 else launcher(way, config=config)
        code, output = execute([*command, HERE / "worker.py", self.folder / way, todo], seconds=240)
        assert code == 0, output[-3000:]

    def __call__(self, way, job):
        if way not in self.started:
            self.started.add(way)
            self.start(way)
        found = []
        for rank in range(1 if way == "one" else 2):
            path = self.folder / f"{way}-{job}-{rank}.json"
            weights = path.with_suffix(".safetensors")
            found.append((json.loads(path.read_text()), load_file(weights) if weights.exists() else {}))
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("ranks"))


def distance(a, b):
    assert set(a) == set(b) and a
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def without_key_biases(weights):
    """A key's bias adds the same to all scores of a softmax, so its gradient is 0 but for rounding; Adam makes that a step of full size."""
    thirds = {k: v.chunk(3) for k, v in weights.items() if k.endswith("attn.c_attn.bias")}        # query, key, value
    assert thirds
    return {**weights, **{k: torch.cat([query, value]) for k, (query, _, value) in thirds.items()}}


# ------------------------------------------------------------------------------------------------ the same update


@every_way
@pytest.mark.parametrize("job", ["sgd", "accumulated", "empty", "early", "shared"])
def test_two_processes_train_as_one_on_the_whole_batch(runs, way, job):
    (_, expected), = runs("one", job)
    assert distance(runs(way, job)[0][1], expected) < 1e-5


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("job", ["lora", "fast_lora"])
def test_two_processes_train_adapters_as_one(runs, way, job):
    """With ZeRO-3 adapters are refused, see test_adapters.py."""
    (_, expected), = runs("one", "lora")
    assert all("lora_" in name or "v_head" in name for name in expected)
    assert distance(runs(way, job)[0][1], expected) < 1e-5


@long
@pytest.mark.parametrize("way", OFFLOAD)
@pytest.mark.parametrize("job", ["sgd", "accumulated"])
def test_offload_changes_nothing(runs, way, job):
    assert distance(runs(way, job)[0][1], runs("one", job)[0][1]) < 1e-5


@every_way_and_offload
def test_adam_too_trains_as_in_one_process(runs, way):
    assert distance(*(without_key_biases(runs(each, "adam")[0][1]) for each in (way, "one"))) < 1e-4


@pytest.mark.parametrize("way", ["one", *WAYS])
def test_the_fast_trainer_trains_as_the_plain_one_in_every_way(runs, way):
    for name in ("sgd", "shared"):
        assert distance(runs(way, f"fast_{name}")[0][1], runs(way, name)[0][1]) < 1e-5, name
    assert distance(*(without_key_biases(runs(way, name)[0][1]) for name in ("fast_adam", "adam"))) < 1e-4


def test_accumulation_in_one_process_is_the_large_batch(runs):
    assert distance(runs("one", "accumulated")[0][1], runs("one", "sgd")[0][1]) < 1e-5


@every_way
def test_every_rank_has_the_same_statistics_and_kl_coefficient_to_the_last_bit(runs, way):
    for job in ("sgd", "adam", "accumulated", "empty", "early", "shared"):
        (first, _), (second, _) = runs(way, job)
        for key in ("steps", "kl_coef"):
            assert first[key] == second[key], (job, key)


@every_way
def test_statistics_are_those_of_the_whole_batch(runs, way):
    (one, _), (two, _) = runs("one", "sgd")[0], runs(way, "sgd")[0]
    assert two["kl_coef"] == pytest.approx(one["kl_coef"], rel=1e-5) and one["kl_coef"] != 0.3
    for step_one, step_two in zip(one["steps"], two["steps"]):
        for key, value in step_one.items():
            assert step_two[key] == pytest.approx(value, rel=1e-4, abs=2e-5), key
        assert step_two["ppo/learning_rate"] == step_one["ppo/learning_rate"]
    # these steps were clipped, or the equal weights would say nothing about clipping
    assert all(step["ppo/grad_norm"] > 2 * FULL["max_grad_norm"] for step in two["steps"])
    assert [step["ppo/learning_rate"] for step in two["steps"]] == [0.05, 0.025, 0.0125]


@every_way
def test_a_ratio_over_the_threshold_and_an_early_stop_are_decided_by_all_though_each_alone_would_differ(runs, way):
    expected = {"all_skip": (1, 2), "none_skips": (0, 2), "all_stop": (0, 2), "none_stops": (0, 4)}
    for job, (skipped, of) in expected.items():
        (first, weights), (second, others) = runs(way, job)
        assert first == second == {"skipped": skipped, "of": of}, job
        assert way == "deepspeed_zero3" or distance(weights, others) == 0, job      # where each has whole weights: the same ones
    assert distance(runs(way, "all_skip")[0][1], runs("one", "one_epoch")[0][1]) < 1e-5        # its second optimizer step left nothing


@every_way
def test_early_stopping_is_decided_by_all(runs, way):
    counts = [found["steps"][0]["ppo/optimizer_steps"] for found, _ in runs("one", "early") + runs(way, "early")]
    assert counts == [counts[0]] * 3 and counts[0] < 4


@pytest.mark.parametrize("way", ["one", *WAYS, *(pytest.param(way, marks=long) for way in OFFLOAD)])
def test_a_skipped_step_leaves_nothing_behind(runs, way):
    (_, expected), = runs("one", "unskipped")
    for found, _ in runs(way, "skip"):
        assert found["skipped"] == found["of"] == 2 and found["moved"] == 0 and found["then"] == 0
    # the real step after it, with Adam, is that of a run without it: neither a gradient nor a moment of it is left
    assert distance(without_key_biases(runs(way, "skip")[0][1]), without_key_biases(expected)) < 1e-4


@every_way
def test_a_loss_that_is_not_finite_on_one_rank_is_refused_by_all_and_moves_none(runs, way):
    for found, _ in runs(way, "infinite"):
        assert found["message"].startswith("rank 1: step 1, epoch 1, optimizer step 1: the values of sample ") and found["moved"] == 0


@every_way
def test_a_wrong_input_on_one_rank_is_named_on_all_and_harms_nothing(runs, way):
    for found, _ in runs(way, "refuse"):
        assert found["message"].startswith("rank 1: step 1: the scores of sample 0 of 4 (mini-batch 1) are nan")
    assert runs(way, "refuse")[0][0]["score"] == pytest.approx(runs("one", "refuse")[0][0]["score"], rel=1e-5)


@every_way_and_offload
def test_gradient_checkpointing_computes_each_block_twice_and_changes_nothing(runs, way):
    (one, expected), = runs("one", "sgd")
    found, weights = runs(way, "checkpointed")[0]
    assert distance(weights, expected) < 1e-5 and found["passes"] == 2 * one["passes"] > 0


@every_way_and_offload
def test_bf16_moves_the_weights_as_it_does_in_one_process(runs, way):
    """Without DeepSpeed the weights stay float32; it keeps those in the optimizer and rounds what it computes with and saves to bf16."""
    (_, expected), = runs("one", "bf16")
    ranks = runs(way, "bf16")
    assert ranks[0][0]["steps"] == ranks[1][0]["steps"] and abs(ranks[0][0]["steps"][0]["objective/kl"]) < 1e-5     # the same model
    assert {tensor.dtype for tensor in ranks[0][1].values()} == {torch.float32 if way == "multi_cpu" else torch.bfloat16}
    distributed.seed_everything(0)
    start = flat({k: v for k, v in tiny().state_dict().items() if k in expected})
    exact, moved, here = (flat(weights) - start for weights in (runs("one", "plain")[0][1], expected, ranks[0][1]))
    assert moved.norm() > 0.1 and 0 < (moved - exact).norm() < 0.05 * exact.norm()
    assert (here - moved).norm() < (0.05 if way == "multi_cpu" else 0.25) * moved.norm()        # of which rounding is 0.15
    assert distance(runs(way, "bf16_checkpointed")[0][1], ranks[0][1]) < 1e-6


def flat(weights):
    return torch.cat([weights[name].detach().float().flatten() for name in sorted(weights)])


@every_way_and_offload
def test_a_reference_in_8_bits_is_left_alone(runs, way):
    (one, expected), = runs("one", "eight_bits")
    ranks = runs(way, "eight_bits")
    for found, _ in ranks:
        assert found["alone"] and found["bytes"] == one["bytes"] > 0 and found["elements"] == one["elements"]
        assert found["steps"] == ranks[0][0]["steps"]
    assert 0 < abs(one["steps"][0]["objective/kl"]) < 1         # a rounded copy
    assert ranks[0][0]["steps"][0]["objective/kl"] == pytest.approx(one["steps"][0]["objective/kl"], rel=1e-3)
    assert distance(ranks[0][1], expected) < 1e-5


# ------------------------------------------------------------------------------------------------------- rollouts


@every_way
def test_text_written_by_two_processes_is_that_of_one(runs, way):
    (one, _), = runs("one", "write")
    for found, _ in runs(way, "write"):
        assert found["greedy"] == one["greedy"]


@long
def test_zero3_gathers_once_per_rollout_or_layer_by_layer_and_writes_the_same(runs):
    (one, _), = runs("one", "write")
    for job, gathers in (("write", 1), ("layers", 0)):      # a rollout of two batches
        for found, _ in runs("deepspeed_zero3", job):
            assert found["greedy"] == one["greedy"] and found["gathers"] == gathers
            assert found["held"] == 0                       # policy and reference: nothing is whole between rollouts
    for found, _ in runs("deepspeed_zero3", "layers"):
        assert "[1, 2] batches" in found["refused"] and "ds3_gather_for_generation=True" in found["refused"]


@pytest.mark.parametrize("way", [*WAYS, pytest.param("layers", marks=long)])
def test_ranks_that_reach_the_end_at_different_steps_do_not_wait_for_ever(runs, way):
    (first, _), (second, _) = runs("deepspeed_zero3", "layers") if way == "layers" else runs(way, "write")
    assert first["uneven"] == [1] * 4 and second["uneven"] == [6] * 4


@every_way
def test_a_seed_reproduces_a_run_in_which_each_rank_samples_its_own(runs, way):
    (first, weights), (second, _) = runs(way, "run")
    assert [first, second] == [found for found, _ in runs(way, "again")]
    assert distance(runs(way, "again")[0][1], weights) == 0
    for mine, other in zip(first["steps"], second["steps"]):
        assert not set(mine["prompts"]) & set(other["prompts"])
        assert not [r for r in mine["responses"] if r in other["responses"]]
    # 37 prompts are four steps of 8, and 5 that wait: no rank has a batch more than the other, or a shorter one
    assert [[len(batch) for batch in found["pass"]] for found in (first, second)] == [[4] * 4] * 2
    assert len({prompt for found in (first, second) for batch in found["pass"] for prompt in batch}) == 32
    assert runs(way, "write")[0][0]["sampled"] != runs(way, "write")[1][0]["sampled"]      # of the same prompts


@every_way
def test_the_memory_that_is_said_is_that_of_the_process_that_needed_most(runs, way):
    (first, _), (second, _) = runs(way, "memory")
    assert first["own"] < second["own"] <= first["largest"] == second["largest"]


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives freed memory back so eagerly")
@every_way
def test_freed_memory_is_kept_but_where_every_weight_is_made_and_freed_all_the_time(runs, way):
    faults = [found["faults"] for found, _ in runs(way, "memory")]              # pages that the system handed out
    assert min(faults) >= 32 if "zero3" in way else max(faults) < 16, faults    # a page has 2 MB at most


# --------------------------------------------------------------------------------------------- loading and saving


@pytest.mark.parametrize("way", ["one", *WAYS, *(pytest.param(way, marks=long) for way in OFFLOAD)])
def test_what_any_stage_saves_loads_whole_in_one_process(runs, way):
    found, weights = runs(way, "sgd")[0]
    model = AutoModelForCausalLMWithValueHead.from_pretrained(runs.folder / f"{way}-final").eval()
    state = dict(model.state_dict())
    state.pop("lm_head.weight")
    assert distance(state, weights) == 0
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        logits, _, values = model(ids, torch.ones_like(ids))
    assert torch.allclose(logits, torch.tensor(found["logits"]), atol=1e-6)
    assert torch.allclose(values, torch.tensor(found["values"]), atol=1e-6)


@long
def test_a_model_loaded_in_shares_trains_as_one_loaded_whole(runs):
    assert distance(runs("deepspeed_zero3", "loaded")[0][1], runs("one", "empty")[0][1]) < 1e-5


@every_way
def test_a_reward_model_loads_whole_with_one_line_or_with_the_pages_own(runs, way):
    whole = runs("one", "reward")[0][0]["plain"]
    for found, _ in runs(way, "reward"):
        assert found["helper"] == whole
        if way == "deepspeed_zero3":        # launched with zero3_init_flag: true
            assert found["plain"] == 0 and found["page"] == whole
        else:
            assert found["plain"] == whole and "page" not in found


@every_stage
def test_a_deepspeed_config_that_says_something_else_is_refused_with_both_numbers(runs, way):
    for found, _ in runs(way, "conflict"):
        clipping, batch, accumulation = found["messages"]
        assert "gradient_clipping is 0.25" in clipping and "max_grad_norm is 0.5" in clipping
        assert "train_micro_batch_size_per_gpu is 3" in batch and "mini_batch_size is 4" in batch
        assert "gradient_accumulation_steps is 7" in accumulation and "is 1;" in accumulation


# -------------------------------------------------------------------------------------------- optimizers by stage


@long
def test_each_optimizer_runs_under_each_stage_and_the_table_says_so(runs):
    ways = {"DDP": "multi_cpu", "ZeRO-1": STAGES[0], "ZeRO-2": STAGES[1], "ZeRO-3": STAGES[2],
            "ZeRO-3 offload": "deepspeed_zero3_offload"}
    rows = ["| | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for optimizer in OPTIMIZERS:
        (_, expected), = runs("one", optimizer)
        rows.append(f"| {optimizer} | " + " | ".join(cell(runs(way, optimizer), expected) for way in ways.values()) + " |")
    table = HERE / "optimizers_by_stage.md"
    if os.environ.get("WRITE_TABLE"):
        table.write_text("\n".join(rows) + "\n")
    assert table.read_text() == "\n".join(rows) + "\n", "WRITE_TABLE=1 writes it anew"


def cell(ranks, expected):
    """`equal` = all weights are one process's to 1e-4. `runs` = all but 3 % at most: 8-bit Adam rounds blocks of 256, and where a
    share begins elsewhere the blocks are others."""
    (first, weights), (second, _) = ranks
    assert first["steps"] == second["steps"]
    weights, expected = without_key_biases(weights), without_key_biases(expected)
    near = torch.cat([((weights[k] - expected[k]).abs() < 1e-4).flatten() for k in expected]).float().mean()
    return "equal" if near == 1 else "runs" if near > 0.97 else f"{near:.0%} equal"


# ------------------------------------------------------------------------------------------------------- failures


def faulty_reward(folder, fault):
    """A reward function that first runs `at_each_call`, defined by `fault`: it knows its `rank` and the number of `calls`, and may `fail`."""
    (folder / "reward.py").write_text(
        "import os, time\nfrom pathlib import Path\ncalls, here, rank = [], Path(__file__).parent, os.environ.get('RANK')\n"
        "def fail():\n    (here / 'failed').write_text(str(time.time()))\n    raise KeyError('no such review')\n"
        "def score(prompts, responses):\n    calls.append(1)\n    at_each_call()\n    return [0.0] * len(responses)\n"
        + fault)
    return f"{folder / 'reward.py'}:score"


def fails(way, folder, fault):
    """Three steps of scripts/train.py by two processes, of which one fails. -> (what both printed, seconds from the fault to the end)"""
    code, output = execute([*launcher(way), ROOT / "scripts" / "train.py", "--steps", "3", "--batch_size", "4",
                            "--max_new_tokens", "4", "--eval_prompts", "4", "--save_every", "1", "--output_dir", folder / "run",
                            "--reward_fn", faulty_reward(folder, fault)], seconds=150)
    assert code != 0, output[-3000:]
    return output, time.time() - float((folder / "failed").read_text())


def goes_on(folder, way=None):
    """The reward is mended and the run resumed: by one process, or as it was started, which ZeRO needs."""
    faulty_reward(folder, "def at_each_call(): pass\n")
    command = [sys.executable] if way is None else launcher(way)
    code, output = execute([*command, ROOT / "scripts" / "train.py", "--resume", folder / "run"], seconds=150)
    assert code == 0 and (folder / "run" / "summary.json").is_file(), output[-3000:]
    return output


@pytest.mark.parametrize("way", ["multi_cpu", pytest.param("deepspeed_zero3", marks=long)])
def test_an_exception_on_one_rank_stops_all_at_once_says_where_and_keeps_the_last_checkpoint(way, tmp_path):
    # the first call scores the held-out prompts, the third is in the second step
    output, seconds = fails(way, tmp_path, "def at_each_call():\n    if rank == '1' and len(calls) == 3:\n        fail()\n")
    assert seconds < 15
    for rank in (0, 1):         # the reward is checked together, so both know whose it was
        assert f"rank {rank} of 2 fails in step 2, (b) score: ValueError: rank 1: the reward function raised KeyError: 'no such review'" in output
    run = tmp_path / "run"
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert checkpoint.damage(run / "checkpoints" / "step-000001") is None
    kept = (run / "metrics.jsonl").read_text()
    assert len(kept.splitlines()) == 1 and not (run / "final").exists()
    assert "resuming after step 1" in goes_on(tmp_path, None if way == "multi_cpu" else way)
    assert (run / "metrics.jsonl").read_text().startswith(kept) and len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_exception_on_one_rank_during_set_up_stops_all_and_says_where(tmp_path):
    output, seconds = fails("multi_cpu", tmp_path, "if rank == '1':\n    fail()\n")
    assert seconds < 15
    assert "rank 1 of 2 fails in set-up of the reward: ValueError: " in output and "reward.py cannot be loaded: KeyError" in output


@long
def test_an_exception_while_the_model_is_saved_leaves_a_run_that_can_be_resumed(tmp_path):
    """The main process cannot make final/, as there is a file of that name; the other has only to be stopped."""
    block = ("def at_each_call():\n    if rank == '0' and len(calls) == 4:\n        (here / 'run' / 'final').write_text('in the way')\n"
             "        (here / 'failed').write_text(str(time.time()))\n")
    output, seconds = fails("deepspeed_zero2", tmp_path, block)
    assert seconds < 15
    assert re.search("rank 0 of 2 fails in final/: ValueError: .*Not a directory", output) and not (tmp_path / "run" / "summary.json").exists()
    (tmp_path / "run" / "final").unlink()
    assert "resuming after step 3" in goes_on(tmp_path, "deepspeed_zero2")


def test_two_launchers_make_one_run_of_two_machines(runs, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = json.dumps([{"name": "sgd", "do": "train", "settings": {**FULL, "batch_size": 4}}])
    command = [*launcher("multi_node", "--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port)]
    other = subprocess.Popen([str(part) for part in [*command, "--machine_rank", "1", HERE / "worker.py", tmp_path / "node", job]],
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try:
        code, output = execute([*command, "--machine_rank", "0", HERE / "worker.py", tmp_path / "node", job], seconds=100)
        assert code == 0, output[-3000:]
        assert other.wait(timeout=30) == 0
    finally:
        if other.poll() is None:
            end(other)
    assert distance(load_file(tmp_path / "node-sgd-0.safetensors"), runs("one", "sgd")[0][1]) < 1e-5
    assert (tmp_path / "node-sgd-0.json").read_text() == (tmp_path / "node-sgd-1.json").read_text()


@long
def test_a_run_starts_while_another_program_has_the_usual_port(tmp_path):
    """29500 is the launcher's own default; it looks for another one only where somebody answers there."""
    with socket.socket() as other:
        if other.connect_ex(("127.0.0.1", 29500)) != 0:
            other.bind(("", 29500))
        job = json.dumps([{"name": "sgd", "do": "train", "settings": {**FULL, "batch_size": 4}}])
        code, output = execute([*launcher("multi_cpu"), HERE / "worker.py", tmp_path / "busy", job], seconds=100)
    assert code == 0, output[-3000:]


@pytest.mark.parametrize("way, processes", [("single_gpu", 1), ("multi_gpu", 2)])
def test_the_files_for_gpus_start_the_same_run_where_there_is_none(runs, way, processes, tmp_path):
    job = json.dumps([{"name": "sgd", "do": "train", "settings": {**FULL, "batch_size": 8 // processes}}])
    command = launcher(way, "--num_processes", str(processes))
    code, output = execute([*command, HERE / "worker.py", tmp_path / way, job], seconds=100)
    assert code == 0, output[-3000:]
    assert len(list(tmp_path.glob("*.json"))) == processes
    assert distance(load_file(tmp_path / f"{way}-sgd-0.safetensors"), runs("one", "sgd")[0][1]) < 1e-5


GROUPS = """
import os, sys, torch, distributed
from accelerate.state import AcceleratorState
for port in sys.argv[1:]:
    os.environ["MASTER_PORT"] = port
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = distributed.start(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(4, 4))
    distributed.largest_peak_memory(accelerator)
    distributed.end(accelerator)
    del model
"""


def test_a_group_of_processes_ends_though_something_was_summed_a_moment_before(tmp_path):
    """Six groups, one after the other: ended at once, the second or third would wait for ever."""
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
    numbers = [str(server.getsockname()[1]) for server in ports]
    for server in ports:
        server.close()
    machine = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen([sys.executable, "-c", GROUPS, *numbers], env={**machine, "RANK": rank, "LOCAL_RANK": rank}, cwd=tmp_path)
             for rank in "01"]
    try:
        assert [process.wait(timeout=60) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize("target", ["train-multi-gpu", "train-zero1", "train-zero2", "train-zero3", "train-multi-node"])
def test_each_target_is_one_line_to_paste_with_a_number_of_processes(target):
    for flags, number in (((), r"[1-9]\d*"), (("NUM_PROCESSES=3",), "3")):
        shown = subprocess.run(["make", "-n", target, *flags, "ARGS=--steps 7"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        line, = [line for line in shown.stdout.splitlines() if "scripts/train.py" in line]
        match = re.fullmatch(rf"\.venv/bin/accelerate launch --config_file (\S+) .*--num_processes {number} scripts/train\.py --steps 7", line)
        assert match and (ROOT / match[1]).exists(), line


# -------------------------------------------------------------------------------------------------- in one process


def test_seeding_sets_every_generator_and_ranks_differ():
    import random

    import numpy as np
    draws = []
    for rank in (0, 0, 1):
        distributed.seed_everything(5, rank=rank)
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[1] and all(a != b for a, b in zip(draws[0], draws[2]))


def test_no_two_pairs_of_seed_and_rank_share_their_numbers_and_rank_0_has_those_of_the_seed():
    import random
    draws = {}
    for seed in range(12):
        for rank in range(12):
            distributed.seed_everything(seed, rank)
            draws[seed, rank] = (random.random(), float(torch.rand(())))
    for position in (0, 1):
        assert len({draw[position] for draw in draws.values()}) == 144
    torch.manual_seed(5)
    assert float(torch.rand(())) == draws[5, 0][1]


@pytest.mark.parametrize("threads, environment, said", [("2", {}, 1), ("1", {}, 0), ("2", {"GOMP_SPINCOUNT": "4000"}, 0),
                                                       ("2", {"OMP_WAIT_POLICY": "passive"}, 0)])
def test_threads_that_wait_without_sleeping_are_said_once_with_the_remedy(threads, environment, said):
    code = "import distributed; distributed.start(cpu=True); distributed.start(cpu=True)"
    outside = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100,
                          env={**outside, "OMP_NUM_THREADS": threads, **environment})
    assert done.returncode == 0 and done.stderr.count("put GOMP_SPINCOUNT=4000 in front of the command") == said, done.stderr


class Refusal(ValueError):
    stage, batch = None, ()


class TwoRanks:
    """Stands for an accelerator of two processes: the other one failed, or not, with these words and attributes."""
    num_processes, process_index, device = 2, 0, torch.device("cpu")

    def __init__(self, other):
        self.other = other

    def reduce(self, tensor, reduction):
        return tensor + float(self.other is not None)


def joint(monkeypatch, mine, other):
    monkeypatch.setattr(distributed, "gather_lists", lambda accelerator, items: [*items, other])
    with pytest.raises(Refusal) as caught, distributed.together(TwoRanks(other), Refusal):
        if mine is not None:
            raise mine
    return caught.value


def test_an_error_on_one_rank_is_raised_on_all_with_its_attributes_and_a_batch_stays_where_it_is(monkeypatch):
    mine = Refusal("score 3 is nan")
    mine.stage, mine.batch = "scores", torch.ones(2)
    sent = []
    monkeypatch.setattr(distributed, "gather_lists", lambda accelerator, items: sent.extend(items) or [*items, None])
    with pytest.raises(Refusal, match="^rank 0: score 3 is nan$") as caught, distributed.together(TwoRanks(None), Refusal):
        raise mine
    assert caught.value.stage == "scores" and caught.value.batch is mine.batch and caught.value.__cause__ is mine
    assert sent == [("score 3 is nan", {"stage": "scores"})]
    there = joint(monkeypatch, None, ("score 3 is nan", {"stage": "scores"}))       # on a rank where nothing failed
    assert str(there) == "rank 1: score 3 is nan" and there.stage == "scores" and there.batch == ()
    both = joint(monkeypatch, mine, ("score 1 is inf", {"stage": "values"}))
    assert str(both) == "rank 0: score 3 is nan; rank 1: score 1 is inf" and both.stage == "scores"


def test_the_number_of_an_os_error_reaches_every_rank(monkeypatch):
    import errno
    monkeypatch.setattr(distributed, "gather_lists", lambda accelerator, items: [*items, ("no room", {"errno": errno.ENOSPC})])
    with pytest.raises(OSError, match="^rank 1: no room$") as caught, distributed.together(TwoRanks("no room"), OSError):
        pass
    assert caught.value.errno == errno.ENOSPC


def test_a_sum_over_one_process_is_the_tensor_itself():
    accelerator = distributed.start(cpu=True)
    tensor = torch.tensor([1.0, 2.0])
    assert distributed.sum_over_processes(accelerator)(tensor) is tensor
    assert distributed.gather_lists(accelerator, (3, 4)) == [3, 4]


def test_peak_memory_counts_what_was_allocated():
    before = distributed.peak_memory(torch.device("cpu"))
    big = torch.ones(before // 4)                               # as much again as everything so far, in float32
    assert distributed.peak_memory(torch.device("cpu")) > big.nbytes and before > 100e6
    assert distributed.peak_memory(torch.device("cpu")) > 1.2 * before


def test_peak_memory_is_that_of_this_program_not_of_the_one_that_started_it():
    child = [sys.executable, "-c", "import distributed, torch; print(distributed.peak_memory(torch.device('cpu')))"]
    big = torch.ones(10 ** 9 // 4)                              # 1 GB, which a child has until it becomes a program of its own
    found = int(subprocess.run(child, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert 100e6 < found < big.nbytes


@pytest.mark.parametrize("device, cleared", [("cpu", []), ("cuda", ["cuda"])])
def test_the_device_cache_is_emptied_on_devices_that_have_one(monkeypatch, device, cleared):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("cuda"))
    distributed.clear_device_cache(torch.device(device))
    assert calls == cleared


def test_a_tracker_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    import importlib.util
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else original(name, *a))
    with pytest.raises(ValueError, match="pip install wandb"):
        distributed.start(log_with="wandb", cpu=True)
