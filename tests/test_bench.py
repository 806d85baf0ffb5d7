"""scripts/bench.py: a workload really runs, useful work is counted right, and the table says yes and no where it must."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import bench
import bench_worker
import pytest
import torch

SCRIPTS = Path(bench.__file__).parent


def test_a_workload_runs_in_a_process_of_its_own(tmp_path):
    """W1 and its end of text, in small: the responses of a fixed length are full, and all figures are there."""
    bench_worker.models({"folder": str(tmp_path), "names": ["gpt2"]})
    small = {**bench.sides("W1")["plainppo"], "batch_size": 8, "mini_batch_size": 4, "response": 6, "iterations": 2}
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
    for name, model in (("gpt2", bench_worker.gpt2(-20.0)), ("smollm2", bench.smollm2_shape(layers=1))):
        layers = model.transformer.h if name == "gpt2" else model.model.layers
        assert sum(p.numel() for p in layers[0].parameters() if p.ndim == 2) == bench.SHAPES[name][1]
        assert model.lm_head.weight.numel() == bench.SHAPES[name][2] and (name != "gpt2" or len(layers) == bench.SHAPES[name][0])


def made_up(workload, side, number, total, peak):
    rows = [{"generate": total / 4, "step": total * 3 / 4 + extra, "sampled": 1000, "trained": 1000} for extra in (0.0, 0.0, 0.0, 0.0, 9.0)]
    return {"workload": workload, "side": side, "round": number, "rows": rows, "imported": 100e6, "peak": peak, "threads": 2,
            "versions": {"torch": "2"}}


def test_the_table_says_what_was_reached(tmp_path, capsys):
    """W1 is in time and not in memory, W2 the other way round; one slow iteration in five changes no median."""
    runs = [made_up("W1", "plainppo", 0, 2.0, 700e6), made_up("W1", "TRL", 0, 4.0, 1000e6),
            made_up("W1", "plainppo", 1, 2.0, 700e6), made_up("W1", "TRL", 1, 4.4, 1000e6), made_up("W1", "TRL", 2, 4.0, 1000e6),
            made_up("W1", "plainppo", 2, 2.0, 700e6), made_up("W2", "plainppo", 0, 2.0, 600e6), made_up("W2", "TRL", 0, 5.9, 1000e6),
            made_up("W5", "plainppo", 0, 1.0, 600e6), made_up("W5", "TRL", 0, 3.0, 1000e6), made_up("W5", "TRL in bf16", 0, 0.5, 1000e6)]
    about = {"machine": "a machine", "threads": 2, "versions": {"plainppo": {"torch": "2"}}, "date": "today", "command": "this",
             "matrix products, GFLOP/s": {"float32": 100.0, "bfloat16": 400.0}}
    bench.write_results(tmp_path, about, runs)
    table, saved = (tmp_path / "results.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert table.strip() in capsys.readouterr().out
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if line.startswith("| W")]
    assert [row[1] for row in rows] == ["plainppo", "TRL"] * 3 + ["TRL in bf16"] and all(len(row) == 12 for row in rows)
    assert rows[1][8:] == ["2.00 (2.00 to 2.20)", "0.70 (0.70 to 0.70)", "1.8 x, 0.6", "time yes, memory no"]
    assert rows[3][8:] == ["2.95 (2.95 to 2.95)", "0.60 (0.60 to 0.60)", "3 x, 0.6", "time no, memory yes"]
    assert rows[5][11] == "time yes, memory yes" and rows[6][8:] == ["0.50 (0.50 to 0.50)", "0.60 (0.60 to 0.60)", "", ""]
    assert rows[0][2:6] == ["0.50", "1.50", "2.00", "500"] and rows[0][6] == "700 (100)"
    ours = saved["results"]["W5"]["plainppo"]                   # in bf16, against the machine's bf16
    assert ours["share"] == pytest.approx(bench.useful_flops(bench.SMALL, 1000, 1000) / 1.0 / 400e9)
    assert len(saved["runs"]) == len(runs) and saved["machine"] == "a machine"
