"""What a run is fed: numbers that are none, files that are not what they should be, text and rewards from anywhere.

Each fault has to end in one sentence that names it, with nothing half done: weights and optimizer as they were, no model half loaded,
no code of a file executed.
"""
import json
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
from safetensors.torch import load_file
from test_distributed import HERE, ROOT, execute, launcher
from test_ppo_core import GOLDEN
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

import rewards
import train
import worker

long = pytest.mark.long
UPDATES = ("loss", "gradients", "new log-probs", "new values")      # found in the update; all else before it


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
            code, output = execute([*launcher(way, "--main_process_port", "0"), HERE / "worker.py", folder / way, json.dumps([job])], seconds=240)
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
    assert first["stage"] == place.removeprefix("new ")
    assert first["moments"] and first["steps_done"] == 0
    message = first["message"]
    rank = "" if way == "one" else ".*rank 1: "
    epoch = ", epoch 2, optimizer step [34]" if place in UPDATES else ""
    sample = {"weights": "the model's weights are not finite, .*mlp.c_fc.bias first", "gradients": r"gradient of .* is not finite, over samples \d, \d"}.get(
        place, rf"sample 1 of {8 // len(found)} \(mini-batch [12]\) (are|is) {'inf|-inf' if number == 'inf' else 'nan'}")
    assert re.match(f"{rank}step {first['step']}{epoch}: .*{sample}", message) and "\n" not in message, message
    assert (first["optimizer steps"] > 0) == (place in UPDATES)
    assert first["then"] is None                                # and the next step is taken


SOMETIMES = """
calls = []
def score(prompts, responses):
    calls.append(1)         # the first call is the evaluation before training, the second step 1
    return [float("inf") if len(calls) == 3 and i == 2 else len(r) / 10 for i, r in enumerate(responses)]
"""


def test_a_bad_batch_stops_the_run_is_kept_and_so_is_the_checkpoint_before(small, tmp_path):
    (tmp_path / "mine.py").write_text(SOMETIMES)
    with pytest.raises(ValueError, match=r"step 2: the scores of sample 2 of 4 \(mini-batch 2\) are inf.*batch is in .*bad_batch.safetensors") as caught:
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
        4e-4, None, 2e-4, 4e-4 * (2 - 2 ** 0.5) / 4)]           # the schedule went on, and ends on time
    first, second = (load_file(tmp_path / "run" / "checkpoints" / f"step-00000{step}" / "model" / "model.safetensors") for step in (2, 4))
    assert not torch.equal(first["transformer.wte.weight"], second["transformer.wte.weight"])


@pytest.mark.parametrize("choice, words", [("stop", "step 1, epoch 1, optimizer step 2: the log-probs of sample . of 4 .* are nan; .*lower the learning rate"),
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
        trainer.save_checkpoint(tmp_path / "checkpoint")
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
    command = [sys.executable] if processes == 1 else launcher("multi_cpu", "--main_process_port", "0")
    started = time.perf_counter()
    code, output = execute([*command, ROOT / "scripts" / "train.py", *flags(small, tmp_path / "run", "--reward_timeout", "2", "--on_bad_batch",
                                                                          "skip", reward=tmp_path / "mine.py")], seconds=200)
    assert code == 1 and time.perf_counter() - started < 100
    assert f"error: rank {processes - 1} of {processes}, step 2, (b) score: the reward function has not returned after 2 s for 4 responses" in output
    assert f"left out: {'rank 1: ' if processes == 2 else ''}step 1: the scores of sample 0 of 4 (mini-batch 1) are nan" in output
    found, = rows(tmp_path / "run")
    assert found == {"step": 1, "ppo/bad_batch": 1.0}
    batch = load_file(tmp_path / "run" / "bad_batch.safetensors")
    assert batch["ranks"].tolist() == [0] * 4 + [1] * 4 * (processes - 1)
    assert batch["scores"].isnan().tolist() == [processes == 1] * 4 + [True] * 4 * (processes - 1)
    if processes == 1:
        assert "Traceback" not in output


def test_a_reward_that_hangs_in_c_and_holds_pythons_lock_ends_the_process_too():
    code = "import re, rewards\nwith rewards.time_limit(0.2, 'unheard', grace=0.5):\n    re.match('(a+)+$', 'a' * 60 + 'b')\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Timeout" in done.stderr and "line 3 in <module>" in done.stderr


def test_a_reward_in_time_leaves_no_clock_behind():
    threads = threading.active_count()
    for seconds in (0, 1):
        with rewards.time_limit(seconds, "never said"):
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
    ("import sys; sys.exit()", "raised SystemExit:")])
def test_what_a_reward_may_not_do_is_one_sentence(body, words, tmp_path):
    (tmp_path / "mine.py").write_text(f"def score(prompts, responses):\n    {body}\n")
    with pytest.raises(ValueError, match=words) as caught:
        rewards.score_texts(rewards.load_reward_fn(f"{tmp_path}/mine.py:score"), list("abcd"), list("efgh"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_reward_timeout_that_makes_no_sense_is_refused(value, small, tmp_path):
    with pytest.raises(ValueError, match=f"reward_timeout is {float(value)}"):
        train.main(flags(small, tmp_path / "run", "--reward_timeout", value))
