"""scripts/bench.py: a workload really runs, useful work is counted right, the tables say yes and no where they must, and a
lever that is switched off changes no number."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import bench
import bench_worker
import numpy
import pytest
import torch

SCRIPTS = Path(bench.__file__).parent


def test_a_workload_runs_in_a_process_of_its_own(tmp_path):
    """W1 and its end of text, in small: the responses of a fixed length are full, and all figures are there."""
    bench_worker.models({"folder": str(tmp_path), "names": ["gpt2"]})
    small = {**bench.sides("W1")["fast"], "batch_size": 8, "mini_batch_size": 4, "response": 6, "iterations": 2}
    # from a small process, as `make bench` does: a new one's highest memory begins with its parent's, and pytest's is large by now
    code = f"import bench, json; print(json.dumps(bench.worker('run', {({**small, 'model': str(tmp_path / 'gpt2')})!r}, OMP_NUM_THREADS='1')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout)
    assert [(row["sampled"], row["trained"]) for row in measured["rows"]] == [(48, 48)] * 2 and measured["threads"] == 1
    assert all(math.isfinite(row[part]) and row[part] > 0 for row in measured["rows"] for part in ("generate", "step"))
    weights = 4 * (6 * bench.SHAPES["gpt2"][1] + bench.SHAPES["gpt2"][2])
    assert 0 < measured["imported"] and measured["imported"] + 2 * weights < measured["peak"] < 4e9       # policy, reference, and Adam
    assert measured["versions"]["torch"].startswith("2.") and "trl" not in measured["versions"]


@pytest.mark.long
def test_a_busy_neighbour_is_measured():
    done = subprocess.run([sys.executable, "bench.py", "neighbour", "--iterations", "1"], cwd=SCRIPTS, capture_output=True,
                          text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"\| (alone|beside .*?|the same, .*?) \| (\d+\.\d\d) \|", done.stdout)
    assert len(rows) == 3 and all(float(seconds) > 0 for _, seconds in rows), done.stdout


def test_the_end_of_text_is_never_or_one_token_in_20():
    torch.manual_seed(0)
    ids = torch.randint(10, 4000, (16, 32))
    for logit, low, high in ((-20.0, 0.0, 1e-9), (bench_worker.END_1_IN_20, 0.048, 0.052)):
        with torch.no_grad():
            ends = bench_worker.gpt2(logit).eval()(ids).logits.softmax(-1)[..., 0].mean()
        assert low <= float(ends) < high, float(ends)


@pytest.mark.parametrize("shared, ragged, expected", [
    # 2 rows of 3 prompt tokens, 10 tokens sampled, 7 trained on, 1 epoch. Through the layers: 2 x 2 + 10 = 14 and 2 x 2 + 7 = 11.
    # generate 2 x 3 x 100 x 14 + 2 x 1000 x 10;   record 2 x 3 x 100 x 11 + 2 x 1000 x 7;   update 6 x 3 x 100 x 11 + 6 x 1000 x 7
    (0, False, 8400 + 20000 + 6600 + 14000 + 19800 + 42000),
    # other responses than the sampled ones: record runs the policy too
    (0, True, 8400 + 20000 + 13200 + 28000 + 19800 + 42000),
    # 2 of 3 layers shared: the reference runs 1 layer, the update 1, and lm_head's weights take no gradient
    (2, False, 8400 + 20000 + 2200 + 14000 + 6600 + 28000)])
def test_useful_flops_of_a_case_counted_by_hand(shared, ragged, expected, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "tiny", (3, 100, 1000))
    settings = {"model": "tiny", "batch_size": 2, "query": 3, "shared": shared, "epochs": 1, "ragged": ragged}
    assert bench.useful_flops(settings, sampled=10, trained=7) == expected


def test_the_shapes_are_those_of_the_models():
    with torch.device("meta"):
        big = [("gpt2-124m", bench_worker.gpt2_124m()), ("llama-1.5b", bench.llama_shape(layers=1))]
    for name, model in (("gpt2", bench_worker.gpt2(-20.0)), ("smollm2", bench.smollm2_shape(layers=1)), *big):
        layers = model.transformer.h if "gpt2" in name else model.model.layers
        assert sum(p.numel() for p in layers[0].parameters() if p.ndim == 2) == bench.SHAPES[name][1]
        assert model.lm_head.weight.numel() == bench.SHAPES[name][2] and ("gpt2" not in name or len(layers) == bench.SHAPES[name][0])
        assert bench.KEYS[name] == (layers[0].attn.embed_dim if "gpt2" in name else layers[0].self_attn.k_proj.out_features)


def made_up(workload, side, number, total, peak):
    rows = [{"generate": total / 4, "step": total * 3 / 4 + extra, "sampled": 1000, "trained": 1000}
            for extra in (0.0, 0.0, 0.0, 0.0, 9.0)]
    return {"workload": workload, "side": side, "round": number, "rows": rows, "imported": 100e6, "peak": peak, "threads": 2,
            "versions": {"torch": "2"}}


ABOUT = {"machine": "a machine", "threads": 2, "versions": {"plainppo": {"torch": "2"}}, "date": "today", "command": "this",
         "matrix products, GFLOP/s": {"float32": 100.0, "bfloat16": 400.0}}


def rows_of(table):
    return [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if line.startswith(("| W", "| G"))]


def test_the_table_says_what_was_reached(tmp_path, capsys):
    """W1 is in time and not in memory, W2 the other way round; one slow iteration in five changes no median."""
    runs = [made_up("W1", "fast", 0, 2.0, 700e6), made_up("W1", "TRL", 0, 4.0, 1000e6), made_up("W1", "plain", 0, 5.0, 2000e6),
            made_up("W1", "fast", 1, 2.0, 700e6), made_up("W1", "TRL", 1, 4.4, 1000e6), made_up("W1", "TRL", 2, 4.0, 1000e6),
            made_up("W1", "fast", 2, 2.0, 700e6), made_up("W2", "fast", 0, 2.0, 600e6), made_up("W2", "TRL", 0, 5.9, 1000e6),
            made_up("W5", "fast", 0, 1.0, 600e6), made_up("W5", "TRL", 0, 3.0, 1000e6),
            made_up("W5", "TRL in bf16", 0, 0.5, 1000e6)]
    bench.write_results(tmp_path, ABOUT, runs)
    table, saved = (tmp_path / "results.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert table.strip() in capsys.readouterr().out
    rows = [row for row in rows_of(table) if len(row) == 9]
    assert [row[0][:2] for row in rows] == ["W1", "W2", "W5"]
    assert rows[0][1:] == ["4.00, 1000", "5.00, 2000", "0.80 x, 2.00", "2.00, 700", "2.00 x (2.00 to 2.20)", "0.70 (0.70 to 0.70)",
                           "1.8 x, 0.6", "time yes, memory no"]
    assert rows[1][1:] == ["5.90, 1000", "", "", "2.00, 600", "2.95 x (2.95 to 2.95)", "0.60 (0.60 to 0.60)", "3 x, 0.6",
                           "time no, memory yes"]
    assert rows[2][8] == "time yes, memory yes"
    details = [row for row in rows_of(table) if len(row) == 8]
    assert [row[1] for row in details] == ["fast", "plain", "TRL", "fast", "TRL", "fast", "TRL", "TRL in bf16"]
    assert details[0][2:7] == ["0.50", "1.50", "2.00", "500", "700 (100)"]
    fast = saved["results"]["W5"]["fast"]                   # in bf16, against the machine's bf16
    assert fast["share"] == pytest.approx(bench.useful_flops(bench.SMALL, 1000, 1000) / 1.0 / 400e9)
    assert fast["against"]["TRL in bf16"]["times faster"] == 0.5
    assert len(saved["runs"]) == len(runs) and saved["machine"] == "a machine"


def test_a_table_without_trl_names_no_targets(tmp_path):
    bench.write_results(tmp_path, ABOUT, [made_up("W1", "fast", 0, 2.0, 700e6), made_up("W1", "plain", 0, 5.0, 2000e6)])
    row = rows_of((tmp_path / "results.md").read_text())[0]
    assert row[1:] == ["", "5.00, 2000", "", "2.00, 700", "", "", "", ""]


def test_another_checkout_is_compared_by_ratios_of_medians(tmp_path):
    runs = [made_up("W1", side, number, total, peak) for number, faster in enumerate((1.0, 1.0, 1.25))
            for side, total, peak in (("fast", 2.0, 700e6), ("base", 2.0 * faster, 1000e6))]
    bench.write_base(tmp_path, ABOUT, runs)
    assert rows_of((tmp_path / "base.md").read_text())[0][1:] == [
        "2.00, 1000", "2.00, 700", "1.00 x (1.00 to 1.25)", "0.70 (0.70 to 0.70)"]
    assert list(bench.sides("W5", base="/other")) == ["fast", "base"]
    assert bench.sides("W5", base="/other")["base"]["root"] == "/other" and bench.sides("W5", base="/other")["base"]["bf16"]


# ------------------------------------------------------------------------------------------- on a GPU


def test_bytes_of_a_rollout_counted_by_hand(monkeypatch):
    """2 rows of 3 prompt tokens and 4 new ones, 3 layers of 100 weights, lm_head of 1,000, keys of 10 numbers.

    4 steps x 1,300 weights; the rows read keys and values of 3, 4, 5 and 6 tokens in 3 layers: 2 x 18 x 2 x 10 x 3."""
    monkeypatch.setitem(bench.SHAPES, "tiny", (3, 100, 1000))
    monkeypatch.setitem(bench.KEYS, "tiny", 10)
    settings = {"model": "tiny", "batch_size": 2, "query": 3, "response": 4}
    numbers = 4 * 1300 + 2 * 18 * 2 * 10 * 3
    assert bench.bytes_read(settings, sampled=8) == 4 * numbers
    assert bench.bytes_read({**settings, "bf16": True}, sampled=8) == 2 * numbers


def test_the_share_of_the_memory_rate_decides_whether_generation_reached_its_aim(tmp_path, capsys):
    """Made up as if measured on a GPU: G1's aims for time, memory and generation; W1 has to be twice as fast there."""
    least = bench.bytes_read(bench.MIDDLE, 1000)
    runs = [made_up("G1", "fast", 0, 2.0, 500e6), made_up("G1", "TRL", 0, 4.4, 1000e6), made_up("W1", "fast", 0, 2.0, 500e6),
            made_up("W1", "TRL", 0, 3.9, 1000e6)]
    about = {**ABOUT, "device": "cuda", "card": "A card, driver 1.2, 80 GB"}
    for share, words in ((0.49, "generation no"), (0.51, "generation yes")):
        rate = least / 0.5 / 1e9 / share            # generate() takes 0.5 s
        results = bench.write_results(tmp_path, {**about, "copies, GB/s": rate}, runs, "gpu")
        assert results["G1"]["fast"]["bandwidth"] == pytest.approx(share)
        table = (tmp_path / "gpu.md").read_text()
        rows = {row[0][:2]: row for row in reversed(rows_of(table)) if row[1] not in ("fast", "TRL")}
        assert rows["G1"][-1] == f"time yes, memory yes, {words}" and rows["W1"][-2:] == ["2 x, 0.6", "time no, memory yes"]
        assert "card: A card, driver 1.2, 80 GB; matrix products of 8,192 x 8,192" in table and f"{share:.0%}) |" in table
    runs.append(made_up("G1", "compiled", 0, 2.0, 500e6))
    for row in runs[-1]["rows"]:
        row["generate"] = 0.1
    faster = bench.write_results(tmp_path, {**about, "copies, GB/s": least / 0.5 / 1e9 / 0.49}, runs, "gpu")["G1"]
    assert faster["fast"]["bandwidth"] < 0.5 < faster["compiled"]["bandwidth"] and faster["fast"]["reached"]["generation"]
    assert faster["compiled"]["against"]["TRL"]["times faster"] > faster["fast"]["against"]["TRL"]["times faster"]
    assert not (tmp_path / "results.md").exists()
    assert [bench.target(name, "cuda") for name in ("W1", "W4", "G1", "G4")] == [2, 3, 2, 3] and bench.target("W1", "cpu") == 1.8
    explained = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "profile_lines", lambda settings, device, part: explained.append((settings["model"], device, part)) or ["| a |"])
        results["G1"]["fast"]["reached"]["generation"] = False
        bench.explain_missed(tmp_path / "gpu.md", results)
    assert explained == [("gpt2", "cuda", "step"), ("gpt2-124m", "cuda", "generate")]
    assert "W1 missed its aim for time. Where the time of step() goes:" in (tmp_path / "gpu.md").read_text()


def test_all_sides_of_a_gpu_workload_are_in_bf16():
    assert {side: what["bf16"] for side, what in bench.sides("G1").items()} == {"fast": True, "plain": True, "compiled": True, "TRL": True}
    assert "compiled" not in {**bench.sides("G2"), **bench.sides("W1")}, "with shared layers, or without a GPU, nothing is compiled"
    code = "import json, bench_worker; print(bench_worker.trainer_class(json.loads(input())).__name__)"
    for trainer, name in (("fast", "FastPPOTrainer"), ("compiled", "CompiledPPOTrainer"), ("plain", "PPOTrainer")):
        done = subprocess.run([sys.executable, "-c", code], cwd=bench.ROOT / "scripts", input=json.dumps({"trainer": trainer}), capture_output=True, text=True)
        assert done.stdout == name + "\n", done.stderr[-1000:]
    assert bench.sides("W5")["TRL"]["bf16"] is False and "TRL in bf16" in bench.sides("W5")


def test_a_gpu_is_found_by_nvidia_smi_and_shown_to_the_workers_that_use_it(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.1, 81559 MiB'\necho 'another, 570.1, 1 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench.card() is None             # conftest.py hides all GPUs
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert bench.card() == "NVIDIA H100 80GB HBM3, driver 570.1, 81559 MiB"
    seen = []
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, env, **__: seen.append(env["CUDA_VISIBLE_DEVICES"])
                        or subprocess.CompletedProcess([], 0, "{}", ""))
    bench.worker("rate", {"device": "cuda"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    for device in ("cuda", "cpu"):
        bench.worker("rate", {"device": device})
    assert seen == ["0", "3", ""]
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 9, "no driver", ""))
    assert bench.card() is None


def test_the_rates_of_this_machine_are_measured_and_both_parts_can_be_profiled(tmp_path):
    rates = bench_worker.rate({"size": 64, "copied": 2 ** 20})
    assert set(rates) == {"float32", "bfloat16", "copy"} and all(math.isfinite(rate) and rate > 0 for rate in rates.values())
    bench_worker.models({"folder": str(tmp_path), "names": ["gpt2"]})
    for part, expected in (("step", "aten::_fused_adam_"), ("generate", "aten::multinomial")):
        found = bench_worker.profile({**bench.sides("W1")["plain"], "batch_size": 4, "mini_batch_size": 4, "response": 5, "epochs": 1,
                                      "model": str(tmp_path / "gpt2"), "items": 1000, "part": part})
        names = {name for name, *_ in found["items"]}
        assert expected in names and found["seconds"] > 0 and ("aten::_fused_adam_" in names) == (part == "step")


# ---------------------------------------------------------------------------------------------- levers


def test_a_lever_is_compared_with_the_run_beside_it(tmp_path):
    first, second, third = "freed memory kept", "lean sampling loop", "fused activations"
    assert bench.lever_turns("W1", [first, second, third]) == [first, None, second, third, None]
    assert bench.lever_turns("W1", ["shared layers run once"]) == [] and bench.lever_turns("W2", ["shared layers run once"])
    # the machine is half as fast in the second round: what a lever saves stays the same
    runs = [made_up("W1", side, number, total * (number + 1), peak) for number in (0, 1)
            for side, total, peak in ((first, 2.0, 800e6), ("fast", 1.0, 600e6), (second, 1.0, 600e6))]
    assert bench.lever_savings(runs, "W1", first) == (pytest.approx(0.5), pytest.approx(0.25))
    assert bench.lever_savings(runs, "W1", second) == (0.0, 0.0) and bench.lever_savings(runs, "W2", first) is None
    bench.write_levers(tmp_path, ABOUT, [*runs, made_up("W2", third, 0, 4.0, 1e9), made_up("W2", "fast", 0, 3.0, 9e8)])
    table = (tmp_path / "levers.md").read_text()
    assert "| lever | W1: time, memory | W2: time, memory |" in table and "| freed memory kept | 50%, 25% | - |" in table
    assert "| fused activations | - | 25%, 10% |" in table
    assert json.loads((tmp_path / "levers.json").read_text())["savings"]["lean sampling loop"] == {"W1": [0.0, 0.0], "W2": None}


def test_bench_knows_the_levers_of_its_worker():
    assert list(bench_worker.LEVERS) == list(bench.MEASURED_ON)
    assert {name for names in bench.MEASURED_ON.values() for name in names} <= set(bench.ALL_WORKLOADS)
    with pytest.raises(AttributeError, match="up to date"):
        bench_worker.set_existing(bench, "no_such_name", None)


def fixed_step(trainer_class, shared):
    """Two steps of a tiny model on the same responses. -> numbers that any change of the maths would move."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    import distributed
    from ppo_core import PPOConfig
    from value_head import AutoModelForCausalLMWithValueHead
    torch.manual_seed(0)
    numpy.random.seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
                                       eos_token_id=0))
    trainer = trainer_class(PPOConfig(batch_size=8, mini_batch_size=4, learning_rate=1e-3),
                            AutoModelForCausalLMWithValueHead.from_pretrained(model), None,
                            AutoTokenizer.from_pretrained(bench.ROOT / "assets" / "review-lm"), num_shared_layers=shared,
                            accelerator=distributed.start())
    settings = {"batch_size": 8, "query": 5, "response": 12}
    for queries, responses, scores in bench_worker.batches(settings, 4096, 2):
        stats = trainer.step(queries, responses, scores)
    # a step on what this trainer sampled, in which the recalled results are used: ended rows and all
    sampled = trainer.generate(queries, return_prompt=False, max_new_tokens=6, batch_size=8, eos_token_id=list(range(400)))
    assert all(len(row) == 6 or row[-1] < 400 for row in sampled) and any(len(row) < 6 for row in sampled)
    assert trainer.step(queries, sampled, scores)["ppo/policy/ratio_mean"] == pytest.approx(1.0, abs=0.2)
    return [stats[name] for name in ("ppo/loss/total", "ppo/policy/entropy", "objective/kl", "ppo/val/error", "ppo/grad_norm")]


@pytest.fixture(scope="module")
def whole():
    import speed
    return {shared: fixed_step(speed.FastPPOTrainer, shared) for shared in (None, 1)}


@pytest.mark.parametrize("lever", list(bench.MEASURED_ON))
def test_a_lever_that_is_off_changes_no_number(lever, whole, monkeypatch):
    import speed
    changed = []

    def change(holder, name, value):
        assert hasattr(holder, name)
        changed.append(name)
        monkeypatch.setattr(holder, name, value)

    without = bench_worker.switch_off(lever, speed, change)
    assert len(changed) == 1 and issubclass(without, speed.FastPPOTrainer)
    for shared, expected in whole.items():
        assert fixed_step(without, shared) == pytest.approx(expected, rel=1e-4, abs=1e-6)
