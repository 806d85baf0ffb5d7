"""scripts/make_corpus.py and scripts/fluency.py, with the committed models in place of SmolLM2, which no test may fetch."""
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fluency
import make_corpus
from run_folder import Evaluation

ROOT = Path(__file__).resolve().parent.parent
WRITER = ROOT / "assets" / "review-lm"


@pytest.fixture
def writer(monkeypatch):
    texts = (ROOT / "assets" / "review-prompts.txt").read_text(encoding="utf-8").splitlines()
    monkeypatch.setattr(make_corpus, "TEACHER", WRITER)
    monkeypatch.setattr(make_corpus, "HELD_OUT", 200)
    monkeypatch.setattr(make_corpus, "load_sentences", lambda: [(f"{text} and so on", 1.0) for text in texts])
    monkeypatch.setattr(make_corpus, "ROWS", 40)
    writer = make_corpus.Writer()
    writer.model.float()
    writer.newline = writer.tokenizer(".").input_ids[0]         # this model writes no line ends
    return writer


def test_the_likelihood_of_a_written_sentence_is_that_of_the_whole_text(writer):
    """Also after rows have left the batch and its cache."""
    found, opening = writer.write(3), writer.openings(3).shape[1]
    assert 10 < len(found) <= 40
    close = [abs(loss - expected_of(writer, text, opening)) < 1e-3 for text, loss in found]
    assert sum(close) > 0.8 * len(close)        # the others would be cut into other tokens than they were written in


def expected_of(writer, text, opening):
    ids = torch.tensor([writer.tokenizer(text).input_ids + [writer.newline]])
    with torch.no_grad():
        logprobs = writer.model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return -float(logprobs[opening - 1:].sum()) / (ids.shape[1] - 1)


def test_a_batch_is_the_same_whenever_it_is_written(writer):
    first = writer.write(5)
    writer.write(6)
    assert writer.write(5) == first != writer.write(6)


def test_the_sentences_of_the_tests_are_not_used(writer):
    assert len(writer.texts) == len((ROOT / "assets" / "review-prompts.txt").read_text(encoding="utf-8").splitlines()) - 200


@pytest.mark.parametrize("text, good", [
    ("A warm and funny film about a family.", True), ("Too short.", False), ("It never ends and never ends and never ends and never ends.", False),
    ("See https://example.com for the whole of the story.", False), ("It is a film without an end", False), ("Der Film ist sch\u00f6n und gut gemacht.", False),
    ("word " * 40 + ".", False)])
def test_what_is_a_sentence(text, good):
    assert make_corpus.is_sentence(text) is good


def test_unlikely_copied_and_repeated_sentences_are_left_out(writer):
    good, human = "A warm and funny film about a family.", "one two three four five six seven eight nine ten."
    writer.human = make_corpus.runs_of_words(human)
    assert writer.keep([(good, 2.0), (good, 2.0), ("An odd and unlikely film about a family.", 9.0), (f"So {human}", 1.0)]) == [good]
    assert make_corpus.runs_of_words("A b c", 2) == {("a", "b"), ("b", "c")}


def test_bits_per_character_are_those_of_the_response_alone():
    judge, prompt, response = fluency.Judge(WRITER), "The film is", " a warm and funny story."
    tokenizer, model = AutoTokenizer.from_pretrained(WRITER), AutoModelForCausalLM.from_pretrained(WRITER, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(prompt + response).input_ids])
    labels = ids.clone()
    labels[0, :len(tokenizer(prompt).input_ids)] = -100
    expected = model(ids, labels=labels).loss.item() * int((labels != -100).sum()) / math.log(2)
    assert judge.bits(prompt, response) == pytest.approx(expected, rel=1e-4)
    evaluation = Evaluation([prompt, prompt], [response, " "], [0.5, 0.7])
    assert fluency.row("name", evaluation, judge, set()) == f"| name | {expected / len(response):.2f} | 1.00 | 0.0% | 0.600 |"
    copied = fluency.row("name", evaluation, judge, make_corpus.runs_of_words("film is a warm and funny story. yes"))
    assert "| 0.0% |" in copied
    assert "| 100.0% |" in fluency.row("name", evaluation, judge, make_corpus.runs_of_words("the film is a warm and funny story. yes"))
