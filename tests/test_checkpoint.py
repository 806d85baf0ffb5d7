"""checkpoint.py: a trainer that is saved and loaded goes on bit for bit; what does not fit is refused before anything changes."""
import copy
import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import checkpoint
import distributed
from optim import SCHEDULES, make_optimizer, make_schedule, trainable_parameters
from ppo_core import PPOTrainer
from test_ppo_core import config, distance, make, ragged, seeded, sgd, tiny, tokenizer, weights     # noqa: F401 (seeded: a fixture)
from value_head import AutoModelForCausalLMWithValueHead


def resumable(optimizer, seed=0):
    distributed.seed_everything(seed)
    model = tiny("bloom")
    made = make_optimizer(optimizer, trainable_parameters(model), 1e-3, adam_learning_rate=1.0)
    return PPOTrainer(config(adap_kl_ctrl=True, use_score_scaling=True, mini_batch_size=2), model, None, tokenizer(), optimizer=made,
                      lr_scheduler=make_schedule("cosine", made, 10))


def some_steps(trainer, count):
    """Rollout and step, with scores from Python's generator. -> everything that a run would show."""
    shown = []
    for _ in range(count):
        queries = ragged()[0]
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=5)
        stats = trainer.step(queries, responses, [random.random() for _ in queries])
        numbers = {k: v for k, v in stats.items() if isinstance(v, float) and not k.startswith("time/")}
        shown.append(([r.tolist() for r in responses], numbers))
    return shown


def test_a_checkpoint_of_another_way_to_run_is_refused_with_both(tmp_path, monkeypatch):
    trainer = resumable("sgd")
    checkpoint.save(trainer, tmp_path / "state")
    monkeypatch.setattr(distributed, "zero_stage", lambda accelerator: 2)
    with pytest.raises(ValueError, match=r"saved by 1 processes with ZeRO-0 \(0 = without\) and this run has 1 with ZeRO-2; launch it as"):
        checkpoint.load(trainer, tmp_path / "state")


def test_a_mixture_of_experts_resumes_too(tmp_path):
    """transformers writes such a model under the hub's older names unless it is told not to; those are not the model's."""
    def trainer():
        torch.manual_seed(0)
        lm = MixtralForCausalLM(MixtralConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                              num_key_value_heads=1, num_local_experts=2, max_position_embeddings=64))
        model = AutoModelForCausalLMWithValueHead.from_pretrained(lm)
        return PPOTrainer(config(), model, None, tokenizer(), optimizer=sgd(model))
    one, twin = trainer(), trainer()
    some_steps(one, 1)
    checkpoint.save(one, tmp_path / "state")
    expected = some_steps(one, 1)
    checkpoint.load(twin, tmp_path / "state")
    assert some_steps(twin, 1) == expected and distance(weights(one), weights(twin)) == 0


torch_schedules = torch.optim.lr_scheduler


def with_schedule(schedule):
    model = tiny("bloom")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return PPOTrainer(config(), model, None, tokenizer(), optimizer=optimizer, lr_scheduler=schedule(optimizer))


def rates(trainer, steps):
    """The learning rates of these steps."""
    found = []
    for _ in range(steps):
        found.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()        # there are no gradients, so it does nothing
        trainer.lr_scheduler.step()
    return found


@pytest.mark.parametrize("schedule", [
    *(lambda o, name=name: make_schedule(name, o, 9, warmup_steps=2) for name in SCHEDULES),
    lambda o: torch_schedules.LambdaLR(o, lambda step: 0.9 ** step), lambda o: torch_schedules.MultiStepLR(o, [2, 4]),
    lambda o: torch_schedules.LambdaLR(o, lambda step: np.cos(0.1 * step)),       # its rates are numpy's float64
    lambda o: torch_schedules.StepLR(o, 2), lambda o: torch_schedules.OneCycleLR(o, 0.1, total_steps=9),
    lambda o: torch_schedules.SequentialLR(o, [torch_schedules.ConstantLR(o, 0.5), torch_schedules.ExponentialLR(o, 0.9)], [3])])
def test_a_restored_schedule_goes_on_where_it_was(schedule, tmp_path):
    one, twin = with_schedule(schedule), with_schedule(schedule)
    rates(one, 1 if schedule.__defaults__ == ("constant",) else 3)      # a constant one changes in its warm-up only
    checkpoint.save(one, tmp_path / "state")
    expected = rates(one, 5)
    assert rates(twin, 5) != expected
    checkpoint.load(twin, tmp_path / "state")
    assert rates(twin, 5) == expected


class Cosine:
    """A schedule's factor that keeps something in its state."""

    def __init__(self, inside):
        self.inside = inside

    def __call__(self, step):
        return 0.5


UNREADABLE = [lambda: np.float32(0.5), lambda: np.ones(2), lambda: lambda: 0, lambda: len, lambda: threading.Lock(), lambda: Cosine(1)]


@pytest.mark.parametrize("inside", UNREADABLE, ids=["number of numpy", "array", "lambda", "function", "lock", "object"])
def test_a_schedule_that_could_not_be_loaded_is_refused_at_save(inside, tmp_path):
    """Found out when the run is resumed, it would be too late."""
    trainer = with_schedule(lambda o: torch_schedules.LambdaLR(o, Cosine(inside())))
    with pytest.raises(ValueError, match=r"state was not written: the trainer's state \(its schedule, its optimizer\) is more than tensors, text "
                                         r"and Python's numbers, so no run could load it; use float\(...\) on numpy's; .* resume the run") as caught:
        checkpoint.save(trainer, tmp_path / "state")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_an_optimizer_that_could_not_be_loaded_is_refused_at_save(tmp_path):
    trainer = resumable("adam")
    some_steps(trainer, 1)
    checkpoint.save(trainer, tmp_path / "state")
    trainer.optimizer.state[trainer.optimizer.param_groups[0]["params"][-1]]["mine"] = np.float32(1)
    with pytest.raises(ValueError, match="next was not written: the trainer's state"):
        checkpoint.save(trainer, tmp_path / "next")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lion", "adam8bit"])
def test_a_restored_trainer_goes_on_bit_for_bit(optimizer, tmp_path):
    trainer = resumable(optimizer)
    some_steps(trainer, 2)
    checkpoint.save(trainer, tmp_path / "state")
    expected = some_steps(trainer, 3)
    twin = resumable(optimizer, seed=1)
    some_steps(twin, 1)                                         # it stands elsewhere in every respect
    checkpoint.load(twin, tmp_path / "state")
    assert some_steps(twin, 3) == expected and distance(weights(twin), weights(trainer)) == 0
    checkpoint.save(twin, tmp_path / "twin")
    checkpoint.save(trainer, tmp_path / "trainer")
    for name in ("trainer.pt", "random-0.pt", "model/model.safetensors"):
        assert (tmp_path / "twin" / name).read_bytes() == (tmp_path / "trainer" / name).read_bytes(), name


@pytest.mark.parametrize("item", ["model", "optimizer", "lr_scheduler", "kl_coef", "score_moments", "steps_done", "python", "numpy", "torch"])
def test_every_saved_item_is_needed(item, tmp_path):
    """What is not restored shows: the run that follows is another one. So nothing in a checkpoint is there for show."""
    trainer = resumable("adam")
    some_steps(trainer, 2)
    checkpoint.save(trainer, tmp_path / "state")
    expected = (some_steps(trainer, 2), trainer.steps_done)
    twin = resumable("adam", seed=1)
    some_steps(twin, 1)
    kept = {"model": weights(twin), "optimizer": copy.deepcopy(twin.optimizer.state_dict()), "kl_coef": twin.kl_ctl.value, "steps_done": 1,
            "lr_scheduler": copy.deepcopy(twin.lr_scheduler.state_dict()), "score_moments": twin.score_moments.state_dict(),
            "python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}[item]
    checkpoint.load(twin, tmp_path / "state")
    {"model": twin.model.load_state_dict, "optimizer": twin.optimizer.load_state_dict, "torch": torch.set_rng_state,
     "lr_scheduler": twin.lr_scheduler.load_state_dict, "kl_coef": lambda value: setattr(twin.kl_ctl, "value", value),
     "score_moments": twin.score_moments.load_state_dict, "steps_done": lambda value: setattr(twin, "steps_done", value),
     "python": random.setstate, "numpy": np.random.set_state}[item](kept)
    assert (some_steps(twin, 2), twin.steps_done) != expected


def test_a_checkpoint_of_another_model_or_optimizer_or_a_damaged_one_is_refused(tmp_path):
    trainer = resumable("adam")
    some_steps(trainer, 1)
    checkpoint.save(trainer, tmp_path / "state")
    with pytest.raises(ValueError, match="it is of another model"):
        checkpoint.load(make("gpt2"), tmp_path / "state")
    model = tiny("bloom")
    few = torch.optim.Adam(list(model.parameters())[:3])
    with pytest.raises(ValueError, match=r"groups of \[\d+\] parameters but this one has \[3\]"):
        checkpoint.load(PPOTrainer(config(), model, None, tokenizer(), optimizer=few), tmp_path / "state")
    weights_file = tmp_path / "state" / "model" / "model.safetensors"
    flipped = bytearray(weights_file.read_bytes())
    flipped[-100] ^= 1
    weights_file.write_bytes(flipped)
    before = weights(trainer)
    with pytest.raises(ValueError, match="cannot be loaded: model/model.safetensors is not what was written"):
        checkpoint.load(trainer, tmp_path / "state")
    assert distance(weights(trainer), before) == 0


# ------------------------------------------------------------------------------------------------- whole folders


def filled(folder):
    with checkpoint.whole_folder(distributed.start(cpu=True), folder) as partial:
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
    assert checkpoint.damage(folder) is None and [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (folder / "sub" / "weights").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_was_not_finished_is_not_there_and_the_next_one_takes_its_place(tmp_path):
    with pytest.raises(KeyError), checkpoint.whole_folder(distributed.start(cpu=True), tmp_path / "state") as partial:
        (partial / "left over").write_text("from a run that was killed")
        raise KeyError
    assert not (tmp_path / "state").exists()
    assert checkpoint.damage(filled(tmp_path / "state")) is None and not list(tmp_path.rglob("left over"))


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    folder = filled(tmp_path / "state")
    with pytest.raises(ValueError, match="is there already"):
        filled(folder)
    assert checkpoint.damage(folder) is None and [path.name for path in tmp_path.iterdir()] == ["state"]


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
    assert words in checkpoint.damage(folder)


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
                assert same or checkpoint.damage(folder) is not None, (name, position, bit)
        (folder / name).write_bytes(whole)


def same_json(one, other):
    try:
        return json.loads(one) == json.loads(bytes(other))
    except ValueError:
        return False


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    """The optimizer is another one: the weights, which would have fitted, and every number stay as they were."""
    trainer = resumable("adam")
    some_steps(trainer, 1)
    checkpoint.save(trainer, tmp_path / "state")
    model = tiny("bloom")
    other = PPOTrainer(config(), model, None, tokenizer(), optimizer=torch.optim.Adam(list(model.parameters())[:3]))
    before = weights(other)
    with pytest.raises(ValueError, match="parameters but this one has"):
        checkpoint.load(other, tmp_path / "state")
    assert distance(weights(other), before) == 0 and other.steps_done == 0


def test_a_schedule_that_was_not_saved_cannot_be_restored(tmp_path):
    model = tiny("bloom")
    optimizer = make_optimizer("sgd", trainable_parameters(model), 1e-3)
    checkpoint.save(PPOTrainer(config(), model, None, tokenizer(), optimizer=optimizer), tmp_path / "state")
    with pytest.raises(ValueError, match="saved by a trainer with 0 lr_scheduler and this one has 1"):
        checkpoint.load(resumable("sgd"), tmp_path / "state")


@pytest.mark.parametrize("remove", [lambda place: checkpoint.remove(place / "step-000001"),
                                    lambda place: checkpoint.remove_old(distributed.start(cpu=True), place, 1),
                                    lambda place: checkpoint.newest_whole(place)])
def test_a_folder_that_cannot_be_removed_is_one_sentence_and_nothing_whole_is_lost(remove, tmp_path, monkeypatch):
    for number in (1, 2):
        filled(tmp_path / f"step-00000{number}")
    (tmp_path / "step-000003.partial").mkdir()

    def rmtree(path, **_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(ValueError, match=r"step-00000\d.* cannot be removed: .*Input/output error.*; remove it by hand, and resume the run"):
        remove(tmp_path)
    assert checkpoint.damage(tmp_path / "step-000002") is None


SLOW = """
import hashlib, sys, time
from pathlib import Path
import checkpoint, distributed
accelerator = distributed.start(cpu=True, timeout=3)
original = checkpoint.sha256
def sha256(path):                   # 7 s for a file of 14 parts
    work = original(path)
    while True:
        try:
            yield next(work)
        except StopIteration as ended:
            return ended.value
        time.sleep(0.5)
checkpoint.sha256 = sha256
place = Path(sys.argv[1])
with checkpoint.whole_folder(accelerator, place / "step-000001") as partial:
    if accelerator.is_main_process:
        (partial / "weights").write_bytes(bytes(14 << 20))
newest = checkpoint.newest_whole(place, accelerator=accelerator)
assert newest == str(place / "step-000001"), newest
distributed.end(accelerator)
"""


def test_processes_wait_for_a_large_checkpoint_longer_than_for_a_sum(tmp_path):
    """Its sums take 7 s, twice, and no process waits for another for more than 3 s."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    machine = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
               "PYTHONPATH": str(Path(checkpoint.__file__).parent)}
    ranks = [subprocess.Popen([sys.executable, "-c", SLOW, tmp_path], env={**machine, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                              stderr=subprocess.PIPE) for rank in "01"]
    try:
        said = [process.communicate(timeout=100)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], said
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_disk_that_is_full_in_torch_save_is_the_systems_error(size):
    """torch says RuntimeError: unexpected pos 704 vs 598."""
    with pytest.raises(OSError) as caught:
        checkpoint.write_state({"weights": torch.zeros(size)}, Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC


def test_the_files_of_a_checkpoint_and_what_they_hold(tmp_path):
    trainer = resumable("adam")
    some_steps(trainer, 1)
    checkpoint.save(trainer, tmp_path / "state")
    state = torch.load(tmp_path / "state" / "trainer.pt", weights_only=True)
    assert set(state) == {"steps_done", "kl_coef", "score_moments", "lr_scheduler", "scaler", "zero_stage", "processes", "optimizer"}
    assert set(state["optimizer"]) == {"state", "param_groups"}
    drawn = torch.load(tmp_path / "state" / "random-0.pt", weights_only=True)
    assert set(drawn) == {"python", "numpy", "torch"} and len(drawn["numpy"][1]) == 624
    names = {str(path.relative_to(tmp_path / "state")) for path in (tmp_path / "state").iterdir()}
    assert names == {"manifest.json", "trainer.pt", "random-0.pt", "model"}


def vouched_for(folder, change):
    """A checkpoint in which something was changed, with a manifest that fits the change."""
    with checkpoint.whole_folder(distributed.start(cpu=True), folder.with_name("changed")) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        (partial / "manifest.json").unlink()
        change(partial)
    return folder.with_name("changed")


@pytest.mark.parametrize("change, words", [
    (lambda f: (f / "trainer.pt").rename(f / "trainer.json"), "it has no trainer.pt; use an older checkpoint, or the version of plainppo that saved"),
    (lambda f: (f / "random-0.pt").unlink(), "it has no random-0.pt"),
    (lambda f: torch.save({"steps_done": 1}, f / "trainer.pt"), "its trainer.pt has no kl_coef; use an older checkpoint"),
    (lambda f: torch.save({"python": 1}, f / "random-0.pt"), "its random-0.pt has no numpy"),
    (lambda f: (f / "trainer.pt").write_bytes(b""), "trainer.pt is not a file of plainppo's"),
    (lambda f: (f / "trainer.pt").write_bytes((f / "trainer.pt").read_bytes()[:-300]), "trainer.pt is not a file of plainppo's"),
    (lambda f: (f / "trainer.pt").write_text("{}"), "trainer.pt is not a file of plainppo's")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_checkpoint_of_another_form_is_refused_by_what_is_missing(change, words, tmp_path):
    """The first is what an older version wrote: trainer.json."""
    trainer = resumable("adam")
    some_steps(trainer, 1)
    checkpoint.save(trainer, tmp_path / "state")
    some_steps(trainer, 1)
    before = (weights(trainer), trainer.steps_done, torch.get_rng_state())
    folder = vouched_for(tmp_path / "state", change)
    with pytest.raises(ValueError, match=f"changed cannot be loaded: {words}") as caught:
        checkpoint.load(trainer, folder)
    assert "\n" not in str(caught.value) and distance(weights(trainer), before[0]) == 0
    assert trainer.steps_done == before[1] and torch.equal(torch.get_rng_state(), before[2])
