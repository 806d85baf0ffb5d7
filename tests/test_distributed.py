"""distributed.py: one process and two real ones (gloo on the CPU) do the same to the same batch."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distributed

HERE = Path(__file__).parent
SETTINGS = {"ppo_epochs": 2, "init_kl_coef": 0.3, "target": 0.05, "horizon": 50.0, "whiten_rewards": True, "max_grad_norm": 0.5,
            "use_score_scaling": True, "use_score_norm": True}


def run(folder, name, processes, **settings):
    """-> weights and book-keeping of each rank after three steps of tests/worker.py in `processes` real processes."""
    command = [sys.executable, str(HERE / "worker.py"), str(folder / name), json.dumps({**SETTINGS, **settings})]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [(load_file(folder / f"{name}-{rank}.safetensors"), json.loads((folder / f"{name}-{rank}.json").read_text()))
            for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return {"1 x 8": run(folder, "one", 1, batch_size=8),
            "2 x 4": run(folder, "two", 2, batch_size=4),
            "2 x 4, accumulated": run(folder, "acc", 2, batch_size=4, mini_batch_size=2, gradient_accumulation_steps=2)}


def test_two_processes_train_as_one_on_the_whole_batch(runs):
    expected, _ = runs["1 x 8"][0]
    for name in ("2 x 4", "2 x 4, accumulated"):
        for weights, _ in runs[name]:
            assert max(float((weights[k] - expected[k]).abs().max()) for k in expected) < 1e-5, name


def test_every_rank_has_the_same_statistics_and_kl_coefficient_to_the_last_bit(runs):
    for name in ("2 x 4", "2 x 4, accumulated"):
        (_, first), (_, second) = runs[name]
        assert first == second, name


def test_statistics_are_those_of_the_whole_batch(runs):
    (_, one), (_, two) = runs["1 x 8"][0], runs["2 x 4"][0]
    assert two["kl_coef"] == pytest.approx(one["kl_coef"], rel=1e-6) and one["kl_coef"] != 0.3
    for step_one, step_two in zip(one["steps"], two["steps"]):
        for key, value in step_one.items():
            assert step_two[key] == pytest.approx(value, rel=1e-4, abs=2e-5), key
        assert step_two["ppo/learning_rate"] == step_one["ppo/learning_rate"]


def test_seeding_sets_every_generator_and_ranks_differ():
    import random

    import numpy as np
    draws = []
    for rank in (0, 0, 1):
        distributed.seed_everything(5, rank=rank)
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[1] and all(a != b for a, b in zip(draws[0], draws[2]))


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
