"""The last part of `make assets`: the review writer learns from those of its own sentences that are good.

    python scripts/polish_writer.py         # after make_corpus.py and make_assets.py; half an hour on 2 cores

Why: a small model that only reads good sentences still gives some probability to words that no good sentence
has: less than a thousandth to each, but there are thousands of them. One such word spoils the rest. Samplers
usually leave them out (epsilon sampling, Hewitt et al. 2022, arXiv 2210.15191). PPO cannot: it must sample
from the distribution that it trains. So the writer itself has to learn it, and from what it writes itself.
How: in each of ROUNDS rounds the writer writes BATCHES x ROWS sentences, without the words below CUT, and a
little hotter than it is, so that its variety stays. Writer and teacher both say how likely each sentence is.
Those with the largest log p_teacher - log p_writer per character are kept: the teacher could have written
them as well. To keep those that the teacher alone finds likely would keep stock phrases, which the writer
finds likely, too. Then the writer is trained on the kept sentences and on as many others. Its target is at
each place the distribution that it wrote with, and in the kept sentences half of it is the word they have.
Source: rejection sampling with the weights p_teacher / p_writer, in the loop of RAFT (Dong et al. 2023, arXiv
2304.06767); soft targets: Hinton et al. 2015, arXiv 1503.02531.
The teacher is make_corpus.py's, not the model that fluency.py judges with. Tested by tests/test_fluency.py.
"""
import argparse
import copy
import os
import random
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "4000")     # see scripts/train.py

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_assets import HELD_OUT, ROOT, first_words, fit, lm_loss, load_sentences, pad_right, save
from make_corpus import TEACHER, is_sentence

import distributed
import speed

WRITER = ROOT / "assets" / "review-lm"
ROUNDS = 3
BATCHES, ROWS = 40, 512         # of sentences that the writer writes in a round
TOKENS = 36                     # at most, after the first words
TEMPERATURE, CUT = 1.1, 1e-3    # of what it writes; the probability below which a word is left out
KEPT = 0.25                     # of the different whole sentences
SHARE = 0.5                     # of the target, that is the kept sentence's own word


def openings(tokenizer, texts, rng):
    """-> ROWS lists: the first 1-8 tokens of human sentences, cut where a word ends."""
    found = []
    while len(found) < ROWS:
        ids = tokenizer(rng.choice(texts)).input_ids
        count = first_words(tokenizer, ids, rng.randint(1, 8), least=1)
        found += [ids[:count]] if count > 0 else []
    return found


def written_with(logits):
    """logits (..., V) -> the probabilities (..., V) that it writes with: hotter, and without the tail."""
    p = (logits.float() / TEMPERATURE).softmax(-1)
    p = p * (p >= p.amax(-1, keepdim=True).clamp(max=CUT))
    return p / p.sum(-1, keepdim=True)


@torch.no_grad()
def loglikelihoods(model, rows, pad_id):
    """rows: lists of token ids. -> for each the log-probability of its tokens after the first."""
    order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), {}
    for start in range(0, len(rows), 64):
        part = order[start:start + 64]
        ids, mask = pad_right([rows[i] for i in part], pad_id)
        logits = model(ids, attention_mask=mask).logits[:, :-1].float()                        # (b, T - 1, V)
        logprobs = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        found.update(zip(part, (logprobs * mask[:, 1:]).sum(1).tolist()))
    return [found[i] for i in range(len(rows))]


@torch.no_grad()
def write(model, tokenizer, teacher, teacher_tokenizer, rng):
    """-> {sentence: log p_teacher - log p_writer, per character}."""
    texts, found = [text for text, _ in load_sentences()[:-HELD_OUT]], {}
    for batch in range(BATCHES):
        coded = tokenizer.pad({"input_ids": openings(tokenizer, texts, rng)}, padding_side="left",
                              return_tensors="pt")
        # transformers' epsilon_cutoff is `written_with`
        rows = model.generate(**coded, do_sample=True, top_k=0, top_p=1.0, temperature=TEMPERATURE,
                              epsilon_cutoff=CUT, max_new_tokens=TOKENS)
        sentences = [text for text, row in zip(tokenizer.batch_decode(rows, skip_special_tokens=True),
                                               rows[:, coded["input_ids"].shape[1]:])
                     if tokenizer.eos_token_id in row and is_sentence(text)]
        theirs = loglikelihoods(teacher, teacher_tokenizer([text + "\n" for text in sentences],
                                                           add_special_tokens=False).input_ids, 0)
        ours = loglikelihoods(model, rows_of(tokenizer, sentences), tokenizer.pad_token_id)
        found.update({text: (their - our) / len(text) for text, their, our in zip(sentences, theirs, ours)})
        print(f"batch {batch + 1}/{BATCHES}: {len(found):,} sentences", flush=True)
    return found


def rows_of(tokenizer, texts):
    """-> the token ids of each text, with EOS behind them."""
    return [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]


def polish(folder, out, number, epochs, learning_rate):
    """Round `number`: train the writer in `folder` on its own sentences, and save it in `out`."""
    distributed.seed_everything(number)
    tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(number)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = copy.deepcopy(before)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0                  # soft targets need no noise
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16).eval()
    found = write(before, tokenizer, teacher, AutoTokenizer.from_pretrained(TEACHER), rng)
    texts = sorted(found, key=found.get, reverse=True)
    kept = int(KEPT * len(texts))
    rows = rows_of(tokenizer, texts[:kept] + rng.sample(texts[kept:], kept))
    rows = [(row, SHARE if i < kept else 0.0) for i, row in enumerate(rows)]

    def loss_of(model, batch):
        ids, mask = pad_right([row for row, _ in batch], tokenizer.pad_token_id)              # (B, T)
        share = torch.tensor([share for _, share in batch])[:, None]                          # (B, 1)
        with torch.no_grad():
            target = written_with(before(ids, attention_mask=mask).logits[:, :-1])        # (B, T - 1, V)
        logprobs = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        own = logprobs.gather(-1, ids[:, 1:, None])[..., 0]                                # (B, T - 1)
        loss = -share * own - (1 - share) * (target * logprobs).sum(-1)
        return (loss * mask[:, 1:]).sum() / mask[:, 1:].sum()

    human = [(row, None) for row in rows_of(tokenizer, [text for text, _ in load_sentences()[-HELD_OUT:]])]
    fit(model.train(), rows, loss_of, lambda m: lm_loss(m, human, tokenizer.pad_token_id), epochs,
        learning_rate, weight_decay=0.0)
    save(model.eval(), tokenizer, out)
    with open(Path(out) / "README.md", "a", encoding="utf-8") as card:
        card.write(f"\nRound {number} of `scripts/polish_writer.py` trained it on {len(rows):,} of "
                   f"{len(found):,} of its own sentences, half of them those that SmolLM2 likes best beside "
                   "it.\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="passes over the sentences")
    parser.add_argument("--learning_rate", type=float, default=4e-4, help="it falls to 0")
    parser.add_argument("--writer", default=WRITER, help="folder of the model to begin with")
    parser.add_argument("--out", default=WRITER, help="folder of the result")
    arguments = parser.parse_args()
    speed.tune_cpu()
    writer = arguments.writer
    for number in range(1, ROUNDS + 1):
        polish(writer, arguments.out, number, arguments.epochs, arguments.learning_rate)
        writer = arguments.out


if __name__ == "__main__":
    main()
