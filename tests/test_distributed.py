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


# ------------------------------------------------------------------------------------------------- checkpoint folders


def filled(folder):
    with distributed.whole_folder(distributed.start(cpu=True), folder) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "weights").write_bytes(bytes(range(256)) * 100)
        (partial / "numbers.json").write_text("{}")
    return folder


def test_a_whole_folder_is_whole_has_the_modes_of_the_umask_and_leaves_nothing_beside_it(tmp_path):
    old = os.umask(0o027)
    try:
        folder = filled(tmp_path / "state")
    finally:
        os.umask(old)
    assert distributed.damage(folder) is None and [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (folder / "sub" / "weights").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_was_not_finished_is_not_there_and_the_next_one_takes_its_place(tmp_path):
    with pytest.raises(KeyError), distributed.whole_folder(distributed.start(cpu=True), tmp_path / "state") as partial:
        (partial / "left over").write_text("from a run that was killed")
        raise KeyError
    assert not (tmp_path / "state").exists()
    assert distributed.damage(filled(tmp_path / "state")) is None and not list(tmp_path.rglob("left over"))


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    folder = filled(tmp_path / "state")
    with pytest.raises(ValueError, match="is there already"):
        filled(folder)
    assert distributed.damage(folder) is None and [path.name for path in tmp_path.iterdir()] == ["state"]


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm, words", [
    (lambda f: flip(f / "sub" / "weights", 1234), "sub/weights is not what was written"),
    (lambda f: (f / "sub" / "weights").write_bytes(b"short"), "has 5 bytes instead of 25600"),
    (lambda f: (f / "numbers.json").unlink(), "numbers.json is missing"),
    (lambda f: (f / "foreign").write_text(""), "foreign is not in its manifest"),
    (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
    (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_damage_is_found_and_named(harm, words, tmp_path):
    folder = filled(tmp_path / "state")
    harm(folder)
    assert words in distributed.damage(folder)


def test_no_flipped_bit_goes_unseen(tmp_path):
    folder = filled(tmp_path / "state")
    for name in ("manifest.json", "numbers.json", "sub/weights"):
        whole = (folder / name).read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 50)):
            for bit in range(8):
                flipped = bytearray(whole)
                flipped[position] ^= 1 << bit
                (folder / name).write_bytes(flipped)
                # white space between the manifest's entries means nothing, so it may change unseen
                same = name == "manifest.json" and same_json(whole, flipped)
                assert same or distributed.damage(folder) is not None, (name, position, bit)
        (folder / name).write_bytes(whole)


def same_json(one, other):
    try:
        return json.loads(one) == json.loads(bytes(other))
    except ValueError:
        return False
