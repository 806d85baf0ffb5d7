"""Sentences of movie reviews, written by SmolLM2-135M for the small review writer to learn from.

    python scripts/make_corpus.py                       # goes on where it stopped
    OMP_NUM_THREADS=1 python scripts/make_corpus.py --first 52          # beside it: one process per core

Why: the 9,405 human sentences are 300,000 tokens, too few to learn English from. A model of 135 M parameters
that did learn English reads them once, and then writes as many more as are wanted; a model of a few million
parameters learns from both (Kim & Rush 2016, sequence-level distillation, arXiv 1606.07947; Eldan & Li 2023,
TinyStories, arXiv 2305.07759).
How: the teacher is trained on TAUGHT human sentences, once each, which teaches it their style and where they
end. It then continues their first words. Sentences are left out that are no plain English, that the teacher
itself finds unlikely, that it wrote before, or that have WORDS words in a row from a human sentence. Nothing
is learned or taken from the sentences that the models are tested on. Batch number n is drawn with seed n, so
that the same batches come out in whatever pieces they are made, on one machine.
make_assets.py trains the writer on the result. Tested by tests/test_fluency.py.
"""
import argparse
import json
import math
import random
import re
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from make_assets import (CACHE, CORPUS, HELD_OUT, SEED, fit, lm_loss, load_sentences, make_smollm2, pad_right,
                         read_corpus)

TEACHER = CACHE / "review-teacher"
TAUGHT = 4800           # sentences that the teacher is trained on
ROWS = 512              # sentences of a batch
TOKENS = 40             # at most, of a sentence
TEMPERATURE, TOP_K = 0.8, 100
WORDS = 8               # in a row, of a human sentence: a copy
LIKELY = 3.2            # nats per token, at most, of a sentence that is kept


def make_teacher():
    """Train SmolLM2 on TAUGHT human sentences, once each, into TEACHER. A sentence ends with a line end."""
    if TEACHER.exists():
        return
    make_smollm2(CACHE / "smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(CACHE / "smollm2-135m")
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    rows = [(tokenizer(text, add_special_tokens=False).input_ids + newline, rating)
            for text, rating in load_sentences()]
    train, held_out = rows[:-HELD_OUT][:TAUGHT], rows[-HELD_OUT:]
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(CACHE / "smollm2-135m", dtype=torch.float32)

    def loss_of(model, batch):
        ids, mask = pad_right([row for row, _ in batch], 0)
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss

    loss, = fit(model, train, loss_of, lambda m: lm_loss(m, held_out, 0), epochs=1, lr=3e-4)
    print(f"held-out loss of the teacher: {loss:.3f} nats per token", flush=True)
    partial = TEACHER.with_suffix(".partial")
    model.bfloat16().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(TEACHER)


def is_sentence(text):
    """Whether a text is one whole sentence, or a few short ones, of plain English words."""
    words = text.split()
    return (5 <= len(words) <= 35 and text[-1] in ".!?\"'" and text.isascii()
            and not re.search(r"https?:|www\.|[#@*_<>\[\]{}|\\=]|\bAI\b", text)
            and len(set(words)) >= 0.6 * len(words))


def runs_of_words(text, count=WORDS):
    """-> set of all runs of `count` words in a text."""
    words = text.lower().split()
    return {tuple(words[i:i + count]) for i in range(len(words) - count + 1)}


class Writer:
    """Writes batch number n."""

    def __init__(self):
        self.tokenizer = AutoTokenizer.from_pretrained(TEACHER)
        self.model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16).eval()
        self.newline = self.tokenizer("\n", add_special_tokens=False).input_ids[-1]
        self.texts = [text for text, _ in load_sentences()[:-HELD_OUT]]
        self.human = set().union(*map(runs_of_words, self.texts))

    def openings(self, number):
        """-> (ROWS, O): the first words of human sentences; all of O tokens, so that nothing is padded."""
        rng = random.Random(number)
        count, rows = rng.choice([1, 1, 2, 2, 3, 3, 4, 5, 6]), []
        while len(rows) < ROWS:
            ids = self.tokenizer(rng.choice(self.texts), add_special_tokens=False).input_ids
            if len(ids) > count and self.tokenizer.decode(ids[count]).startswith(" "):
                rows.append(ids[:count])
        return torch.tensor(rows)

    @torch.no_grad()
    def write(self, number):
        """-> list of texts, and of their negative log-likelihoods per token."""
        torch.manual_seed(number)
        ids, cache = self.openings(number), DynamicCache(config=self.model.config)
        live, sentences, losses = torch.arange(ROWS), ids.tolist(), torch.zeros(ROWS)
        ended = torch.zeros(ROWS, dtype=torch.bool)
        for _ in range(TOKENS):
            logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()   # (b, V)
            best, tokens = logits.topk(TOP_K)
            picked = (best / TEMPERATURE).softmax(-1).multinomial(1)                                  # (b, 1)
            ids = tokens.gather(1, picked)
            losses[live] += (logits.logsumexp(-1) - best.gather(1, picked)[:, 0]) * ~ended[live]
            ended[live] |= ids[:, 0] == self.newline
            for row, token in zip(live.tolist(), ids[:, 0].tolist()):
                if not ended[row]:
                    sentences[row].append(token)
            going_on = ~ended[live]
            if not going_on.any():
                break
            if going_on.float().mean() < 0.75:      # the rows that have ended leave the batch
                index = going_on.nonzero()[:, 0]
                cache.batch_select_indices(index)
                live, ids = live[index], ids[index]
        return [(self.tokenizer.decode(sentence).strip(), float(loss) / len(sentence))
                for sentence, loss, whole in zip(sentences, losses, ended) if whole]

    def keep(self, written):
        """-> the texts that are worth learning from."""
        return [text for text, loss in dict(written).items()
                if loss <= LIKELY and is_sentence(text) and runs_of_words(text).isdisjoint(self.human)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="how long to write")
    parser.add_argument("--first", type=int, default=0, help="batch to begin with: for several processes")
    parser.add_argument("--batches", type=int, default=105, help="how many, of which some may be there")
    arguments = parser.parse_args()
    make_teacher()
    CORPUS.mkdir(parents=True, exist_ok=True)
    writer, started = Writer(), time.monotonic()
    for number in range(arguments.first, arguments.first + arguments.batches):
        path, begun = CORPUS / f"{number:05d}.json", time.monotonic()
        if path.exists():
            continue
        if begun - started > 60 * arguments.minutes:
            break
        texts = writer.keep(writer.write(number))
        path.with_suffix(".partial").write_text(json.dumps(texts), encoding="utf-8")
        path.with_suffix(".partial").rename(path)
        words, seconds = sum(len(text.split()) for text in texts), time.monotonic() - begun
        print(f"batch {number}: {len(texts)} of {ROWS} sentences, {words} words, {seconds:.0f} s", flush=True)
    texts = read_corpus()
    print(f"{len(texts):,} sentences, {sum(len(text.split()) for text in texts):,} words")


if __name__ == "__main__":
    main()
