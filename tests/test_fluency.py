"""scripts/make_corpus.py and scripts/fluency.py, with the committed models in place of SmolLM2, which no test may fetch."""
import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.logits_process import EpsilonLogitsWarper

import fluency
import make_assets
import make_corpus
import polish_writer
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


def test_the_first_words_of_a_sentence_are_whole():
    tokenizer = AutoTokenizer.from_pretrained(WRITER)
    text = "A xylophone quivers, unforgettably."
    ids = tokenizer(text).input_ids
    found = {tokenizer.decode(ids[:make_assets.first_words(tokenizer, ids, count, least=1)]) for count in range(1, len(ids) + 3)}
    assert found == {"A", "A xylophone", "A xylophone quivers,"}
    assert make_assets.first_words(tokenizer, ids, 4, least=4) == 4, "a prompt has at least so many, whole or not"


def test_the_outside_judge_answers_each_prompt_whatever_stands_beside_it(monkeypatch):
    """With the likeliest token in place of a drawn one, a shorter prompt is padded and still has the answer that it has alone."""
    judge, prompts = fluency.Judge(WRITER), ["The plot is", "A", "This is a film that never"]
    assert judge.answer(prompts) == judge.answer(prompts)
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, num_samples: probabilities.argmax(-1, keepdim=True))
    answers = judge.answer(prompts)
    assert len(set(answers)) == 3 and answers == [judge.answer([prompt])[0] for prompt in prompts]


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


def test_the_writer_learns_from_human_and_from_written_sentences(tmp_path, monkeypatch):
    """The held-out sentences are words that no other sentence has, so only what was trained on becomes likely."""
    monkeypatch.setattr(make_assets, "HELD_OUT", 8)
    human = [(f"The {noun} is dull and the plot is thin.", 0.0) for noun in ("film", "movie") * 40]
    written = [f"A {noun} of warm and funny people." for noun in ("story", "tale") * 40]
    human[-8:], written[-8:] = [("Xylophones quiver.", 0.0)] * 8, ["Zebras gallop."] * 8
    curve = make_assets.make_writer(human, written, tmp_path / "review-lm", 25)
    assert len(curve) == 25 and len(curve[-1]) == 2
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "review-lm").float(), AutoTokenizer.from_pretrained(tmp_path / "review-lm")
    losses = [make_assets.lm_loss(model, [(tokenizer(text).input_ids + [tokenizer.eos_token_id], None)], tokenizer.pad_token_id)
              for text in (human[0][0], written[0], human[-1][0], written[-1])]
    assert max(losses[:2]) < min(losses[2:]) - 2, losses
    (tmp_path / "review-sentiment").mkdir()
    make_assets.make_readmes(tmp_path, written, curve, 0.5)
    assert f"| 25 | {curve[-1][0]:.3f} | {curve[-1][1]:.3f} |" in (tmp_path / "review-lm" / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def small_round(monkeypatch):
    texts = (ROOT / "assets" / "review-prompts.txt").read_text(encoding="utf-8").splitlines()
    for name, value in {"ROWS": 24, "BATCHES": 2, "HELD_OUT": 200, "TEACHER": WRITER,
                        "load_sentences": lambda: [(f"{text} and so on", 1.0) for text in texts]}.items():
        monkeypatch.setattr(polish_writer, name, value)


def test_the_writers_sentences_are_weighed_by_what_the_teacher_says_beside_the_writer(small_round):
    """Here the teacher is the writer itself with other weights."""
    tokenizer = AutoTokenizer.from_pretrained(WRITER)
    writer, teacher = (AutoModelForCausalLM.from_pretrained(WRITER, dtype=torch.float32).eval() for _ in range(2))
    with torch.no_grad():
        teacher.transformer.ln_f.weight.mul_(0.7)       # its distribution is flatter
    torch.manual_seed(0)
    found = polish_writer.write(writer, tokenizer, teacher, tokenizer, random.Random(1))
    assert 5 < len(found) <= 48 and all(map(make_corpus.is_sentence, found))

    def likelihood(model, ids):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return float(logprobs.gather(-1, torch.tensor(ids[1:])[:, None]).sum())
    for text, gap in found.items():
        by_hand = likelihood(teacher, tokenizer(text + "\n").input_ids) - likelihood(writer, tokenizer(text).input_ids + [tokenizer.eos_token_id])
        assert by_hand / len(text) == pytest.approx(gap, abs=1e-4)


def test_what_the_writer_writes_with_is_transformers_epsilon_sampling():
    torch.manual_seed(0)
    logits = 4 * torch.randn(5, 300)
    logits[0] = 0.0                 # each has 1 / 300, more than CUT
    logits[1, 7] = 50.0             # one alone
    ours = polish_writer.written_with(logits)
    warped = EpsilonLogitsWarper(polish_writer.CUT)(None, logits / polish_writer.TEMPERATURE).softmax(-1)
    torch.testing.assert_close(ours, warped)
    assert (ours > 0).sum(-1)[:2].tolist() == [300, 1] and 1 < (ours[2] > 0).sum() < 300
    flat = polish_writer.written_with(torch.zeros(1, 2000))     # all are below CUT: the likeliest stay
    torch.testing.assert_close(flat, torch.full((1, 2000), 1 / 2000))


def test_a_round_of_polishing_prefers_the_best_sentences_and_drops_unlikely_words(small_round, tmp_path, monkeypatch):
    found = {f"A warm and funny film about {noun}.": 1.0 for noun in ("love", "war", "a family", "two friends", "money")}
    found.update({f"It is {word} of a plot without end.": 0.0 for word in ("much", "less", "quite", "all", "some", "none", "a lot", "most")})
    monkeypatch.setattr(polish_writer, "write", lambda *rest: found)
    monkeypatch.setattr(polish_writer, "KEPT", 5 / 13)
    polish_writer.polish(WRITER, tmp_path, 1, 40, 4e-3)
    tokenizer, (before, after) = AutoTokenizer.from_pretrained(tmp_path), [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (WRITER, tmp_path)]

    def gain(text):
        rows = [tokenizer(text).input_ids]
        return (polish_writer.loglikelihoods(after, rows, 0)[0] - polish_writer.loglikelihoods(before, rows, 0)[0])
    gains = {text: gain(text) for text in found}
    assert min(gains[text] for text in found if found[text]) > max(gains[text] for text in found if not found[text]) + 1, gains
    for text in ("It is much of a plot without end.", "A warm and funny film about love."):
        ids = torch.tensor([tokenizer(text).input_ids + [tokenizer.eos_token_id]])
        with torch.no_grad():
            old, new = (model(ids).logits.softmax(-1) for model in (before, after))
        tail = polish_writer.written_with(old.log()) == 0
        assert (new * tail)[:, :-1].sum() < 0.7 * (old * tail)[:, :-1].sum(), "the words that it did not write with have become rarer"
        assert new[0, -1, tokenizer.pad_token_id] < 0.01, "padding is not learned"
    assert "Round 1 of `scripts/polish_writer.py` trained it on 10 of 13 of its own" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_corpus_that_is_too_small_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(make_assets, "CORPUS", tmp_path)
    (tmp_path / "00000.json").write_text(json.dumps([f"Sentence {number}." for number in range(20)]))
    assert len(make_assets.read_corpus(20)) == 20
    with pytest.raises(SystemExit, match="holds 20 sentences, and 36 are needed; run scripts/make_corpus.py first"):
        make_assets.read_corpus(36)


def test_the_reward_model_is_compared_with_the_labels_that_are_clear(tmp_path, monkeypatch):
    path = tmp_path / "labels.tsv"
    path.write_text("1\tgood\n0\tbad\n?\tgood and bad\n0\tgood\n", encoding="utf-8")
    monkeypatch.setattr(fluency, "LABELS", path)
    assert fluency.accuracy(lambda prompts, responses: [float("good" in text) for text in prompts]) == (
        "3 of 4 sentences of the default policy are praise or blame by hand; the reward model is right about 2 of them (66.7%).")


def test_the_labelled_sentences_are_200_different_ones():
    rows = [line.split("\t") for line in fluency.LABELS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 200 == len({text for _, text in rows}) and {label for label, _ in rows} == {"0", "1", "?"}


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
