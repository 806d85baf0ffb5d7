"""What a run is fed: numbers that are none, files that are not what they should be, text and rewards from anywhere.

Each fault has to end in one sentence that names it, with nothing half done: weights and optimizer as they were, no model half loaded,
no code of a file executed.
"""
import dataclasses
import io
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_distributed import HERE, ROOT, execute, launcher
from test_ppo_core import GOLDEN, ragged
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

import checkpoint
import checks
import rewards
import run_folder
import run_inputs
import train
import worker
from value_head import AutoModelForCausalLMWithValueHead, find_value_head

long = pytest.mark.long
# Found in the update; all else before it.
UPDATES = {"first log-probs": ", epoch 1, optimizer step [12]",
           **dict.fromkeys(("loss", "gradients", "new log-probs", "new values"), ", epoch 2, optimizer step [34]")}


WORDS = "a the film story music actor is was feels good bad dull warm bright long short very quite too and".split()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with all that a run needs, tiny: model/, judge/, prompts.txt, mine.py."""
    folder = tmp_path_factory.mktemp("small")
    shutil.copytree(GOLDEN / "models" / "gpt2", folder / "model")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<eos>", "<pad>", "<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    judge = GPT2ForSequenceClassification(GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=40, pad_token_id=1))
    judge.save_pretrained(folder / "judge")
    for name in ("model", "judge"):
        tokenizer.save_pretrained(folder / name)
    lines = [f"the {a} {b} {c}" for a in WORDS[2:6] for b in WORDS[6:9] for c in WORDS[9:15]]
    (folder / "prompts.txt").write_text("\n".join(lines) + "\n")
    (folder / "mine.py").write_text("def score(prompts, responses):\n    return [len(r) / 10 for r in responses]\n")
    return folder


def flags(small, out, *more, steps=4, reward=None):
    return ["--cpu", "--steps", str(steps), "--batch_size", "4", "--mini_batch_size", "2", "--ppo_epochs", "1", "--max_new_tokens", "5",
            "--eval_prompts", "8", "--model_name", str(small / "model"), "--prompts", str(small / "prompts.txt"), "--output_dir", str(out),
            "--reward_fn", f"{reward or small / 'mine.py'}:score", *more]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- bad numbers


def numbers(processes):
    size = 8 // processes
    return {"ppo_epochs": 2, "batch_size": size, "mini_batch_size": 2, "gradient_accumulation_steps": 2 // processes,
            "use_score_scaling": True}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """-> refused(way): what each rank found when NaN and infinity were put into every stage (worker.bad_numbers)."""
    known, folder = {}, tmp_path_factory.mktemp("bad")

    def ranks(way):
        if way not in known and way == "one":
            known[way] = [worker.bad_numbers(numbers(1))[0]]
        elif way not in known:
            job = {"name": "bad", "do": "bad_numbers", "settings": numbers(2)}
            code, output = execute([*launcher(way), HERE / "worker.py", folder / way, json.dumps([job])], seconds=240)
            assert code == 0, output[-3000:]
            known[way] = [json.loads((folder / f"{way}-bad-{rank}.json").read_text()) for rank in (0, 1)]
        return known[way]
    yield ranks
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("place", worker.PLACES)
@pytest.mark.parametrize("way", ["one", "multi_cpu", *(pytest.param(f"deepspeed_zero{stage}", marks=long) for stage in (2, 3))])
def test_a_number_that_is_not_finite_is_refused_by_name_before_it_moves_anything(way, place, number, refused):
    found = [rank[f"{place} {number}"] for rank in refused(way)]
    first = found[0]
    assert all({**one, "same": 0} == {**first, "same": 0} for one in found), found      # all ranks agree, to the letter
    assert all(one["same"] for one in found), "weights or optimizer state are not what they were"
    assert first["stage"] == place.removeprefix("new ").removeprefix("first ")
    assert first["moments"] and first["steps_done"] == 0
    message = first["message"]
    rank = "" if way == "one" else ".*rank 1: "
    epoch = UPDATES.get(place, "")
    sample = {"weights": "the model's weights are not finite, .*mlp.c_fc.bias first",
              "gradients": r"gradient of .* is not finite, over samples \d, \d"}.get(
        place, rf"sample 1 of {8 // len(found)} \(mini-batch [12]\) (are|is) {'inf|-inf' if number == 'inf' else 'nan'}")
    assert re.match(f"{rank}step {first['step']}{epoch}: .*{sample}", message) and "\n" not in message, message
    assert (first["optimizer steps"] > 0) == (place in UPDATES)
    assert first["then"] is None                                # and the next step is taken


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_new_log_probs_that_are_not_finite_are_said_to_be_that_and_not_a_ratio_that_is_not_1(number):
    trainer = worker.make({"batch_size": 8})        # one mini-batch, so the very first forward pass of the update
    worker.spoil_forward(trainer, number, output=0, update="epoch 1")
    stage, message = worker.refusal(trainer)
    assert stage == "log-probs" and "the log-probs of sample 1 of 8 (mini-batch 1) are " in message


def test_an_infinite_ratio_of_finite_log_probs_is_skipped_as_before():
    """exp(100) is too large for float32: a policy that moved too far, and no number is bad."""
    trainer = worker.make({"batch_size": 8, "ppo_epochs": 2}, "adam")
    original = trainer.forward

    def forward(model, rows, **kwargs):
        logprobs, *rest = original(model, rows, **kwargs)
        return (logprobs + 100.0 * ("epoch 2" in trainer.where and torch.is_grad_enabled()), *rest)
    trainer.forward = forward
    assert worker.step(trainer)["ppo/skipped_steps"] == 1


SOMETIMES = """
calls = []
def score(prompts, responses):
    calls.append(1)         # the first call is the evaluation before training, the second step 1
    return [float("inf") if len(calls) == 3 and i == 2 else len(r) / 10 for i, r in enumerate(responses)]
"""


def test_a_bad_batch_stops_the_run_is_kept_and_so_is_the_checkpoint_before(small, tmp_path):
    (tmp_path / "mine.py").write_text(SOMETIMES)
    words = r"step 2: the scores of sample 2 of 4 \(mini-batch 2\) are inf.*batch is in .*bad_batch.safetensors"
    with pytest.raises(ValueError, match=words) as caught:
        train.main(flags(small, tmp_path / "run", "--save_every", "1", reward=tmp_path / "mine.py"))
    assert "\n" not in str(caught.value)
    batch = load_file(tmp_path / "run" / "bad_batch.safetensors")
    assert batch["scores"].tolist()[2] == float("inf") and batch["ranks"].tolist() == [0] * 4
    for name in ("queries", "responses"):
        assert len(batch[f"{name}_lengths"]) == 4 and batch[f"{name}_lengths"].sum() == len(batch[name]) > 0
    with safe_open(tmp_path / "run" / "bad_batch.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "2" and "sample 2 of 4" in file.metadata()["problem"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"] and len(rows(tmp_path / "run")) == 1


def test_a_bad_batch_is_skipped_if_asked_for_and_the_run_goes_on(small, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(SOMETIMES)
    train.main(flags(small, tmp_path / "run", "--save_every", "2", "--on_bad_batch", "skip", reward=tmp_path / "mine.py"))
    out = capsys.readouterr().out
    assert "step    2/4  left out: step 2: the scores of sample 2 of 4" in out
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4] and [row["ppo/bad_batch"] for row in found] == [0, 1, 0, 0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["batches left out"] == 1
    assert [row.get("ppo/learning_rate") for row in found] == [row if row is None else pytest.approx(row) for row in (
        1e-4, None, 5e-5, 1e-4 * (2 - 2 ** 0.5) / 4)]           # the schedule went on, and ends on time
    first, second = (load_file(tmp_path / "run" / "checkpoints" / f"step-00000{step}" / "model" / "model.safetensors") for step in (2, 4))
    assert not torch.equal(first["transformer.wte.weight"], second["transformer.wte.weight"])


@pytest.mark.parametrize("choice, words", [
    ("stop", "step 1, epoch 1, optimizer step 2: the log-probs of sample . of 4 .* are nan; .*lower the learning rate"),
    ("skip", "step 2, rollout: the logits of sample 0 of 4 are not finite, .*lower the learning rate")])
def test_a_policy_that_diverged_ends_the_run_with_one_sentence(choice, words, small, tmp_path):
    """Also where bad batches are skipped: it would spoil all that follow."""
    with pytest.raises(ValueError, match=words):
        train.main(flags(small, tmp_path / "run", "--optimizer", "sgd", "--learning_rate", "1e38", "--on_bad_batch", choice))


def test_weights_that_overflow_end_the_run_whatever_is_said_about_batches(small, tmp_path, monkeypatch):
    original = train.PPOTrainer.step

    def step(trainer, *arguments):
        stats = original(trainer, *arguments)
        if trainer.steps_done == 2:
            trainer.model.pretrained_model.transformer.ln_f.weight.data[3] = float("inf")
        return stats
    monkeypatch.setattr(train.PPOTrainer, "step", step)
    with pytest.raises(ValueError, match="after step 2: the model's weights are not finite, pretrained_model.transformer.ln_f.weight first"):
        train.main(flags(small, tmp_path / "run", "--on_bad_batch", "skip"))


def test_weights_that_are_not_finite_are_not_saved_as_a_checkpoint(small, tmp_path):
    trainer = worker.make({"batch_size": 4})
    with torch.no_grad():
        trainer.model.pretrained_model.transformer.wpe.weight[20] = float("nan")        # a position that no prompt here reaches
    with pytest.raises(ValueError, match=r"after step 0: the model's weights are not finite, pretrained_model.transformer.wpe.weight first"):
        checkpoint.save(trainer, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_logits_that_are_not_finite_are_said_by_generate_with_the_sample():
    trainer = worker.make({"batch_size": 4})
    queries = [torch.tensor([5, 6, 7])] * 3 + [torch.tensor([8, 9])] * 3
    with torch.no_grad():
        trainer.model.pretrained_model.transformer.wpe.weight[2] = 3e38                # finite, but not what comes of it
    with pytest.raises(ValueError, match="rollout: the logits of sample 0 of 6 are not finite, though every weight is; lower the learning rate"):
        trainer.generate(queries, batch_size=2, max_new_tokens=3)
    with torch.no_grad():
        trainer.model.pretrained_model.transformer.wte.weight[9, 0] = float("nan")
    with pytest.raises(ValueError, match="weights are not finite, pretrained_model.transformer.wte.weight first"):
        trainer.generate(queries, max_new_tokens=3)


# ----------------------------------------------------------------------------------------------- rewards that fail


HANGS = """
import os, time
calls = []
def score(prompts, responses):
    calls.append(1)         # the first call is the evaluation before training, the second step 1
    if os.environ.get("RANK", "0") == {rank!r} and len(calls) == 2:
        return [float("nan")] * len(responses)
    if os.environ.get("RANK", "0") == {rank!r} and len(calls) == 3:
        time.sleep(1000)
    return [len(r) / 10 for r in responses]
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_reward_that_hangs_ends_the_run_and_a_bad_batch_before_it_does_not(processes, small, tmp_path):
    """On the last rank; the batch of step 1, NaN there, is left out by all, and of step 2 all stop."""
    (tmp_path / "mine.py").write_text(HANGS.format(rank=str(processes - 1)))
    command = [sys.executable] if processes == 1 else launcher("multi_cpu")
    started = time.perf_counter()
    code, output = execute([*command, ROOT / "scripts" / "train.py", *flags(small, tmp_path / "run", "--reward_timeout", "2", "--on_bad_batch",
                                                                          "skip", reward=tmp_path / "mine.py")], seconds=200)
    assert code == 1 and time.perf_counter() - started < 100
    assert f"error: rank {processes - 1} of {processes}, step 2, (b) score: the reward function has not returned after 2 s" in output
    assert f"left out: {'rank 1: ' if processes == 2 else ''}step 1: the scores of sample 0 of 4 (mini-batch 1) are nan" in output
    found, = rows(tmp_path / "run")
    assert found == {"step": 1, "ppo/bad_batch": 1.0}
    batch = load_file(tmp_path / "run" / "bad_batch.safetensors")
    assert batch["ranks"].tolist() == [0] * 4 + [1] * 4 * (processes - 1)
    assert batch["scores"].isnan().tolist() == [processes == 1] * 4 + [True] * 4 * (processes - 1)
    if processes == 1:
        assert "Traceback" not in output


def test_a_reward_that_hangs_in_c_and_holds_pythons_lock_ends_the_process_too():
    code = "import re, checks\nwith checks.time_limit(0.2, grace=0.5):\n    re.match('(a+)+$', 'a' * 60 + 'b')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Timeout" in done.stderr and "line 3 in <module>" in done.stderr


def test_a_reward_in_time_leaves_no_clock_behind():
    threads = threading.active_count()
    for seconds in (0, 1):
        with checks.time_limit(seconds):
            assert threading.active_count() == threads + (seconds > 0)
    time.sleep(1.2)
    assert threading.active_count() == threads


@pytest.mark.parametrize("body, words", [
    ("return [1.0] * (len(responses) + 1)", "the reward function returned 5 for 4 responses; return one float for each"),
    ("return [1.0]", "returned 1 for 4 responses"), ("return []", "returned 0 for 4 responses"),
    ("return None", "returned a NoneType for 4 responses"), ("return {r: 1.0 for r in responses}", "returned a dict for 4 responses"),
    ("return (1.0 for _ in responses)", "returned a generator for 4 responses"), ("return 'good'", "returned a str for 4 responses"),
    ("return ['good'] * len(responses)", "score 0 of 4 is 'good', not one number"),
    ("return [[1.0, 2.0]] * len(responses)", r"score 0 of 4 is \[1.0, 2.0\], not one number"),
    ("return [None] * len(responses)", "score 0 of 4 is None, not one number"),
    ("return [float('-inf')] * len(responses)", "score 0 of 4 is -inf"), ("return [1j] * len(responses)", "score 0 of 4 is 1j"),
    ("raise RuntimeError('out of luck')", "raised RuntimeError: out of luck .mine.py, line 2."),
    ("import sys; sys.exit()", "raised SystemExit .mine.py, line 2.")])
def test_what_a_reward_may_not_do_is_one_sentence(body, words, tmp_path):
    (tmp_path / "mine.py").write_text(f"def score(prompts, responses):\n    {body}\n")
    with pytest.raises(ValueError, match=words) as caught:
        rewards.score_texts(rewards.load_reward_fn(f"{tmp_path}/mine.py:score"), list("abcd"), list("efgh"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_reward_timeout_that_makes_no_sense_is_refused(value, small, tmp_path):
    with pytest.raises(ValueError, match=f"reward_timeout is {float(value)}"):
        train.main(flags(small, tmp_path / "run", "--reward_timeout", value))


# ------------------------------------------------------------------------------------------------------ bad files


def mutate(folder, stranger, names, dice):
    """Spoil one file of `folder` by a seeded `random.Random`. stranger: a file of something else. -> what was done, in words."""
    path = folder / dice.choice(names)
    data = bytearray(path.read_bytes())
    kinds = ["truncate", "flip", "noise", "append", "delete", "foreign", "empty", "spaces", *["value", "key"] * 2 * (path.suffix == ".json")]
    kind = dice.choice(kinds)
    if kind == "truncate":
        data = data[:dice.randrange(len(data))]
    elif kind == "flip":                # half of them in the first 2,000 bytes, where a file says what it is
        data[dice.randrange(dice.choice([len(data), min(len(data), 2000)]))] ^= 1 << dice.randrange(8)
    elif kind == "noise":
        start = dice.randrange(len(data))
        data[start:start + 40] = dice.randbytes(len(data[start:start + 40]))
    elif kind == "append":
        data += dice.randbytes(dice.randrange(1, 40))
    elif kind == "foreign":
        data = bytearray(stranger.read_bytes())
    elif kind == "empty":
        data = bytearray()
    elif kind == "spaces":              # the same JSON; of any other file not the same
        data = data + b"\n  "
    elif kind in ("value", "key"):
        data = bytearray(json.dumps(change(json.loads(data), kind, dice)).encode())
    path.unlink() if kind == "delete" else path.write_bytes(data)
    return f"{kind} in {path.relative_to(folder)}"


def change(tree, kind, dice):
    """One entry of a JSON tree deleted, or its value another: of another type, or out of range."""
    places, todo = [], [tree]
    while todo:
        node = todo.pop()
        for key in (node if isinstance(node, dict) else range(len(node))):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                todo.append(node[key])
    node, key = dice.choice(places)
    if kind == "key":
        del node[key]
    else:
        node[key] = dice.choice([None, "", "x", -1, 0, 1, 7, 0.5, True, [], [1], {}, {"a": 1}, float("inf"), float("nan")])
    return tree


class Target:
    """A copy of `source` that is spoilt again and again. load(folder) reads it; same(what it gave) tells what is accepted: "equal" or
    "unseen", for what nobody can see without a manifest: another number in a foreign file that is sound by itself."""

    def __init__(self, source, stranger, load, judge, names=None):
        self.source, self.stranger, self.load, self.judge = source, stranger, load, judge
        self.names = names or sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())

    def attack(self, folder, seed):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.source, folder)
        done = mutate(folder, self.stranger, self.names, random.Random(seed))
        try:
            found = self.load(folder)
        except ValueError as error:         # anything else, a PanicException included, fails the test
            text = str(error)
            assert type(error) is ValueError and "\n" not in text and len(text) < 900, (done, text)
            assert folder.name in text, f"{done}: the sentence names no file: {text}"
            return "refused"
        verdict = self.judge(folder, found)
        assert verdict in ("equal", "unseen"), (done, verdict)
        return verdict


def judge_model(folder, model):
    """Every tensor is the file's, whatever the file is now: nothing was made up, nothing left out."""
    file, own = load_file(folder / "model.safetensors"), model.state_dict()
    if not all(torch.equal(tensor.float(), own[name].float()) or tensor.isnan().any() for name, tensor in file.items()):
        return "half loaded"
    left = set(own) - set(file) - {"lm_head.weight"}        # tied to the embedding
    if left and not (left == {"v_head.summary.weight", "v_head.summary.bias"}):
        return f"made up: {left}"
    return "unseen"


@pytest.fixture(scope="module")
def targets(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    other = folder / "other.safetensors"
    save_file({"a": torch.ones(3)}, other)
    torch.manual_seed(0)
    trainer = worker.make({"batch_size": 4}, "adam")
    trainer.step(*ragged())
    checkpoint.save(trainer, folder / "checkpoint")
    trainer.step(*ragged(seed=1))
    checkpoint.save(trainer, folder / "next")
    AcceleratorState._reset_state(reset_partial_state=True)
    reader = worker.make({"batch_size": 4}, "adam")
    untouched = worker.everything(reader)

    def load_checkpoint(path):
        try:
            checkpoint.load(reader, path)
        except ValueError:
            assert worker.everything(reader) == untouched, "loaded in part"
            raise
        return worker.everything(reader)
    expected = load_checkpoint(folder / "checkpoint")
    untouched = expected

    train.main(flags(small, folder / "run", steps=1))
    (folder / "prompts").mkdir()
    shutil.copy(small / "prompts.txt", folder / "prompts")
    (folder / "config").mkdir()
    shutil.copy(folder / "run" / "config.json", folder / "config")
    settings = run_inputs.saved_settings(folder / "config", train.RunConfig)
    (folder / "before").mkdir()
    shutil.copy(folder / "run" / "before.json", folder / "before")
    config = train.RunConfig(batch_size=4, eval_prompts=8, max_new_tokens=5, prompts="prompts.txt")
    tokenizer, positions = train.load_tokenizer(small / "model"), GPT2Config(n_positions=60, vocab_size=97)

    def load_prompts(path):
        return sum(run_inputs.load_prompts(path / "prompts.txt", config, tokenizer, 1, positions), [])

    def load_tokenizer(path):
        try:
            return train.load_tokenizer(str(path))("the film is good").input_ids
        except ValueError:
            raise
        except Exception as error:          # a call comes later, in load_prompts, which says the line
            assert "tokenizer" in str(type(error).__module__) or type(error) is Exception, error
            return None

    yield {
        "model": Target(small / "model", other, load_model, judge_model,
                        ["config.json", "model.safetensors", "model.safetensors", "generation_config.json"]),
        "tokenizer": Target(small / "model", other, load_tokenizer, lambda _, found: "unseen", ["tokenizer.json", "tokenizer_config.json"]),
        "judge": Target(small / "judge", other, lambda path: rewards.score_texts(load_judge(path), ["the"], [" film"], finite=False),
                        lambda _, found: "unseen" if len(found) == 1 else found),
        "checkpoint": Target(folder / "checkpoint", folder / "next" / "model" / "model.safetensors", load_checkpoint,
                             lambda _, found: "equal" if found == expected else "another state was loaded"),
        "config": Target(folder / "config", other, lambda path: run_inputs.saved_settings(path, train.RunConfig),
                         lambda _, found: "equal" if found == settings else "other settings"),
        "before": Target(folder / "before", other,
                         lambda path: run_folder.Evaluation.read(path / "before.json") if (path / "before.json").is_file() else None,
                         lambda _, found: "equal" if found is None or found.score == found.score else "no score"),
        "prompts": Target(folder / "prompts", other, load_prompts,
                          lambda _, found: "unseen" if all(len(row["tokens"]) for row in found) else found),
    }
    AcceleratorState._reset_state(reset_partial_state=True)


TARGETS = ["model", "tokenizer", "judge", "checkpoint", "config", "before", "prompts"]


@pytest.mark.parametrize("count", [10, pytest.param(300, marks=long)])
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_refused_in_one_sentence_or_changes_nothing(name, count, targets, tmp_path):
    """7 x 300 seeded mutations in test-long, 7 x 10 in make test."""
    verdicts = [targets[name].attack(tmp_path / name, f"{name} {seed}") for seed in range(count)]
    print(name, {verdict: verdicts.count(verdict) for verdict in set(verdicts)})
    assert len(verdicts) == count and (name == "before" or verdicts.count("refused") > count / 4)
    if name in ("checkpoint", "config"):        # what plainppo writes has sums: nothing is unseen
        assert "unseen" not in verdicts


@pytest.mark.parametrize("layers", [0, 2])
def test_a_reward_model_of_fewer_or_more_layers_than_its_file_is_refused(layers, small, tmp_path):
    shutil.copytree(small / "judge", tmp_path / "judge")
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    (tmp_path / "judge" / "config.json").write_text(json.dumps({**config, "n_layer": layers}))
    with pytest.raises(ValueError, match=f"judge' would be loaded in part: 1[12] tensors .*, transformer.h.{layers // 2}.attn.c_attn"):
        rewards.load_reward_model(tmp_path / "judge")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"files": {"trainer.pt": {"bytes": 1e999, "sha256": "0"}}}', '{"files": {"trainer.pt": []}}'])
def test_json_that_is_no_manifest_or_config_is_said_to_be_none(text, targets, tmp_path):
    shutil.copytree(targets["checkpoint"].source, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="checkpoint cannot be loaded: its manifest.json cannot be read"):
        targets["checkpoint"].load(tmp_path / "checkpoint")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json cannot be read"):
        run_inputs.saved_settings(tmp_path, train.RunConfig)


def test_a_bit_of_a_checkpoint_that_flips_is_found_wherever_it_is(targets, tmp_path):
    """Every 97th byte of every file, the manifest too."""
    target = targets["checkpoint"]
    for name in target.names:
        data = (target.source / name).read_bytes()
        for position in range(0, len(data), max(97, len(data) // 10)):
            shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
            shutil.copytree(target.source, tmp_path / "checkpoint")
            (tmp_path / "checkpoint" / name).write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1:])
            with pytest.raises(ValueError, match="checkpoint cannot be loaded: "):
                target.load(tmp_path / "checkpoint")


def test_a_whole_checkpoint_of_another_model_changes_nothing(tmp_path, small):
    from test_ppo_core import make
    AcceleratorState._reset_state(reset_partial_state=True)
    checkpoint.save(make("llama"), tmp_path / "llama")
    trainer = make("gpt2")
    trainer.step(*ragged())                         # other weights than those of the checkpoints below
    before = worker.everything(trainer)
    with pytest.raises(ValueError, match="it is of another model"):
        checkpoint.load(trainer, tmp_path / "llama")
    # the same model, another optimizer's state: refused before the weights are touched
    part = make("gpt2", optimizer=lambda model: torch.optim.SGD(list(model.parameters())[3:], lr=0.1))
    checkpoint.save(part, tmp_path / "part")
    with pytest.raises(ValueError, match="the saved optimizer has groups of"):
        checkpoint.load(trainer, tmp_path / "part")
    assert worker.everything(trainer) == before


def test_a_damaged_final_model_or_run_config_stops_a_run_before_it_begins(small, tmp_path):
    train.main(flags(small, tmp_path / "run", "--save_every", "1", steps=2))
    (tmp_path / "run" / "summary.json").unlink()
    config = (tmp_path / "run" / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(config.replace('"learning_rate": 0.0001', '"learning_rate": 0.0005'))
    with pytest.raises(ValueError, match="config.json is not what the run wrote: its SHA-256 differs"):
        train.main(["--resume", str(tmp_path / "run")])
    (tmp_path / "run" / "config.json").write_text(config)
    (tmp_path / "run" / "before.json").write_text('{"prompts": [')         # is asked for again
    train.main(["--resume", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "before.json").read_text())["prompts"]
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000002", tmp_path / "model")
    data = bytearray((tmp_path / "model" / "trainer.pt").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model" / "trainer.pt").write_bytes(data)
    with pytest.raises(ValueError, match="model cannot be loaded: trainer.pt is not what was written"):
        train.main(flags(small, tmp_path / "other", "--model_name", str(tmp_path / "model")))


# ------------------------------------------------------------------------------------------- nothing is executed


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def bombs(path):
    """One payload, in each form in which a .bin or .pkl file may be."""
    zipped, older = io.BytesIO(), io.BytesIO()
    torch.save({"v_head.summary.weight": Bomb(path), "a": torch.ones(2)}, zipped)
    torch.save({"v_head.summary.weight": Bomb(path)}, older, _use_new_zipfile_serialization=False)
    return {"zip": zipped.getvalue(), "older": older.getvalue(), "pickle": pickle.dumps(Bomb(path))}


BOMB_PLACES = [
    "pytorch_model.bin", "adapter_model.bin", "adapter_model.safetensors", "training_args.bin", "optimizer.bin", "optimizer.pt",
    "scheduler.bin", "random_states_0.pkl", "rng_state.pth", "tokenizer.model", "vocab.pkl", "vocab.bin", "merges.txt", "spiece.model",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "model.safetensors.index.json",
    "pytorch_model.bin.index.json", "custom_generate/generate.py", "data.pkl", "value_head.bin", "v_head.bin",
    "zero/mp_rank_00_model_states.pt", "latest"]


def load_model(path):
    with checks.loading(path):          # as scripts/train.py does
        return AutoModelForCausalLMWithValueHead.from_pretrained(path)


def load_judge(path):
    with checks.loading(path):
        return rewards.load_reward_model(path)


def try_everything(folder):
    """Every way in which plainppo opens a folder. Each may refuse it. -> the sentences."""
    said = []
    for load in (load_model, lambda path: train.load_tokenizer(str(path)), load_judge):
        try:
            load(folder)
        except ValueError as error:
            said.append(str(error))
            assert "\n" not in said[-1]
    return said


@pytest.mark.parametrize("form", ["zip", pytest.param("older", marks=long), pytest.param("pickle", marks=long)])
@pytest.mark.parametrize("source", ["model", "judge"])
def test_a_pickle_is_executed_nowhere_a_loader_looks(source, form, small, tmp_path):
    fired = tmp_path / "fired"
    bomb = bombs(fired)[form]
    pickle.loads(bomb) if form == "pickle" else torch.load(io.BytesIO(bomb), weights_only=False)
    fired.unlink()                              # it is live: this set it off
    for place in BOMB_PLACES:
        folder = tmp_path / source / place.replace("/", "-")
        shutil.copytree(small / source, folder)
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_bytes(bomb)
        if place.startswith("adapter"):
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(small / source)}))
        try_everything(folder)
        (folder / "model.safetensors").unlink()                 # now what lies beside it is all there is
        assert try_everything(folder)
    (folder / "model.safetensors").write_bytes(bomb)            # or it is under that very name
    assert len(try_everything(folder)) >= 2
    assert not fired.exists()


@pytest.mark.parametrize("form", ["zip", "older"])
def test_weights_that_are_a_pickle_with_code_are_refused_in_one_sentence(form, small, tmp_path):
    shutil.copytree(small / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(bombs(tmp_path / "fired")[form])
    with pytest.raises(ValueError, match="holds more than tensors, which a pickle could execute, and nothing of it was; get safetensors"):
        load_model(tmp_path / "model")
    # the head of a sharded model is read by our own code
    index = {"metadata": {}, "weight_map": {"v_head.summary.weight": "head.bin"}}
    (tmp_path / "model" / "pytorch_model.bin").rename(tmp_path / "model" / "head.bin")
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(pickle.UnpicklingError):
        find_value_head(str(tmp_path / "model"))
    assert not (tmp_path / "fired").exists()


def test_a_checkpoint_with_a_pickle_in_any_place_is_refused_and_none_is_executed(targets, tmp_path):
    target = targets["checkpoint"]
    for name in [*target.names, "optimizer.bin", "random-0.pkl", "random_states_0.pkl", "model/pytorch_model.bin", "zero/x.pt", "custom.pkl"]:
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(target.source, folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bombs(tmp_path / "fired")["zip"])
        with pytest.raises(ValueError, match="checkpoint cannot be loaded: "):
            target.load(folder)
    assert not (tmp_path / "fired").exists()
    assert {path.suffix for path in target.source.rglob("*") if path.is_file()} == {".json", ".pt", ".safetensors"}


@pytest.mark.parametrize("form", ["zip", "older", "pickle"])
@pytest.mark.parametrize("name", ["trainer.pt", "random-0.pt"])
def test_a_pickle_that_a_checkpoint_vouches_for_is_refused_and_not_executed(name, form, targets, tmp_path):
    """Its manifest has the right sum of it, as a stranger's checkpoint may have."""
    folder, accelerator = tmp_path / "checkpoint", worker.make({"batch_size": 4}).accelerator
    with checkpoint.whole_folder(accelerator, folder) as partial:
        shutil.copytree(targets["checkpoint"].source, partial, dirs_exist_ok=True, ignore=lambda *_: ["manifest.json"])
        (partial / name).write_bytes(bombs(tmp_path / "fired")[form])
    assert checkpoint.damage(folder) is None
    with pytest.raises(ValueError, match=f"checkpoint cannot be loaded: {name} is not a file of plainppo's; use an older one"):
        targets["checkpoint"].load(folder)
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize("source, auto_map", [("model", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}),
                                              ("judge", {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"})])
@pytest.mark.parametrize("known", [False, True])
def test_code_that_a_model_brings_is_not_executed_unless_the_user_says_so(source, auto_map, known, small, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")           # what transformers would ask the terminal
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    for kind in (GPT2Config, GPT2LMHeadModel):      # where transformers notes that a class came with a model, to save its code, too
        monkeypatch.setattr(kind, "_auto_class", None)
    folder = tmp_path / source
    shutil.copytree(small / source, folder)
    code = f"open({str(tmp_path / 'fired')!r}, 'w')\nfrom transformers import GPT2Config as Config, GPT2LMHeadModel as Model\n"
    for name in ("evil.py", "tokenizer_evil.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map, **({} if known else {"model_type": "evil"})}))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "auto_map": {"AutoTokenizer": ["tokenizer_evil.T", None]}}))
    said = try_everything(folder)
    assert not (tmp_path / "fired").exists()
    if not known:
        assert any("brings code of its own, which is executed only where the user says trust_remote_code=True" in text for text in said), said
        if source == "model":
            with pytest.raises(Exception):      # the code is there to be executed, and this says so
                AutoModelForCausalLMWithValueHead.from_pretrained(folder, trust_remote_code=True).missing
            assert (tmp_path / "fired").exists()


def test_the_pins_are_newer_than_the_known_holes():
    pins = re.findall(r"^(torch|transformers)==(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    least = {"torch": (2, 10), "transformers": (5, 3)}      # torch.load(weights_only=True), and code executed from a model's folder
    assert {name for name, *_ in pins} == set(least) and len(pins) == 3
    assert all((int(major), int(minor)) >= least[name] for name, major, minor in pins)


# ------------------------------------------------------------------------------------------------------- bad text


LINES = "".join(f"the {a} {b}\n" for a in WORDS for b in WORDS)


@pytest.mark.parametrize("content, words", [
    (b"", "prompts.txt has 0 prompts: all of its 0 lines are empty; give a text file with one prompt per line"),
    (b"\n\n\n", "has 0 prompts: all of its 3 lines are empty"), (b"  \t \r\n\x0b\n \xc2\xa0 \n", "has 0 prompts: all of its"),
    (b"\xef\xbb\xbf", "has 0 prompts: all of its 0 lines are empty"),
    (LINES.encode() + b"a film\n\nthe caf\xe9\n", f"prompts.txt, line {LINES.count(chr(10)) + 3}: byte 0xe9 is not UTF-8; save the file as UTF-8"),
    (b"\xef\xbb\xbfa film\n\xe9\n", "prompts.txt, line 2: byte 0xe9 is not UTF-8"), (LINES.encode("utf-16"), "prompts.txt, line 1: byte 0xff is not UTF-8"),
    (LINES.encode() + b"the film " * 120_000 + b"\n", f"prompts.txt, line {LINES.count(chr(10)) + 1}: the prompt 'the film .* has 240000 tokens and "
                                                        "max_new_tokens is 5, but the model has 60 positions; shorten one of them"),
    (LINES.encode() + b"the " * 56 + b"\n", "has 56 tokens and max_new_tokens is 5, but the model has 60 positions"),
    ("".join(f"a {word}\n" for word in WORDS[:10]).encode(), "has 10 different prompts but a step takes 64 .batch_size x processes. and 8 are kept"),
    (("the film\n" * 500).encode(), "has 1 different prompts but a step takes 64")])
def test_prompts_that_cannot_be_trained_on_are_said_before_anything_is_computed(content, words, small, tmp_path, monkeypatch):
    monkeypatch.setattr(train.PPOTrainer, "generate", lambda *a, **k: pytest.fail("something was computed"))
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        train.main(flags(small, tmp_path / "run", "--batch_size", "64", "--mini_batch_size", "32", "--prompts", str(tmp_path / "prompts.txt")))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def prompts_of(path, small, tokenizer=None):
    config = train.RunConfig(batch_size=4, eval_prompts=8, max_new_tokens=5, prompts=str(path))
    return run_inputs.load_prompts(path, config, tokenizer or train.load_tokenizer(small / "model"), 1, GPT2Config(n_positions=60, vocab_size=97))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_and_any_line_end_change_no_prompt(end, mark, small, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(mark + LINES.replace("\n", end).encode())
    train_side, judged = prompts_of(tmp_path / "prompts.txt", small)
    assert [row["text"] for row in train_side + judged] == LINES.splitlines()


def test_a_prompt_without_tokens_or_with_a_strangers_token_is_said_by_its_line(small, tmp_path):
    tokenizer = train.load_tokenizer(small / "model")
    (tmp_path / "prompts.txt").write_text(LINES + "\n\u200b\n")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.normalizer = normalizers.Replace("\u200b", "")
    number = LINES.count("\n") + 2
    with pytest.raises(ValueError, match=f"line {number}: .* has no tokens; leave it out"):
        prompts_of(tmp_path / "prompts.txt", small, PreTrainedTokenizerFast(tokenizer_object=words))
    tokenizer.add_tokens([f"word{i}" for i in range(200)])
    (tmp_path / "prompts.txt").write_text(LINES + "the word150\n")
    with pytest.raises(ValueError, match=f"line {number - 1}: 'the word150' has token 173 but the model has 97: the tokenizer is another model's"):
        prompts_of(tmp_path / "prompts.txt", small, tokenizer)


def test_a_tokenizer_that_fails_on_a_line_is_said_with_that_line(small, tmp_path):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[missing]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "prompts.txt").write_text("a film\nthe unknown\n")
    with pytest.raises(ValueError, match="line 2: the tokenizer cannot read it .Exception: WordLevel error: .*leave it out"):
        prompts_of(tmp_path / "prompts.txt", small, PreTrainedTokenizerFast(tokenizer_object=words))


def test_a_buffer_of_older_days_is_left_out_and_a_layer_too_many_is_not(small, tmp_path):
    """The files of gpt2 on the hub name their tensors from the inner model and keep each layer's causal mask."""
    shutil.copytree(small / "model", tmp_path / "model")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    save_file({**weights, "h.1.attn.bias": torch.ones(1), "h.1.attn.old_buffer": torch.ones(1), "pooler.dense.weight": torch.ones(1)},
              tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model")
    assert torch.equal(model.pretrained_model.transformer.h[1].ln_1.weight, weights["h.1.ln_1.weight"])
    save_file({**weights, "h.4.ln_1.weight": torch.ones(1)}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model' would be loaded in part: 1 tensors of its weights .*, h.4.ln_1.weight first"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "model")
