"""The last part of `make assets`: the review writer learns from those of its own sentences that are good.

    python scripts/polish_writer.py         # after make_corpus.py and make_assets.py; 45 minutes on 2 cores

Why: a small model that only reads good sentences still gives some probability to words that no good sentence
has, and when it writes, one such word spoils the rest. So it has to learn from what it writes itself.
How: in each of ROUNDS rounds the writer writes BATCHES x ROWS sentences. Writer and teacher both say how
likely each one is. Those with the largest log p_teacher - log p_writer per character are kept: the teacher
could have written them as well. To keep those that the teacher alone finds likely would keep stock phrases,
which the writer finds likely, too. Then the writer is trained on the kept sentences and on as many of
make_corpus.py's.
Source: rejection sampling with the weights p_teacher / p_writer; the loop is RAFT's (Dong et al. 2023, arXiv
2304.06767). On-policy distillation with a score for each word (Agarwal et al. 2023, arXiv 2306.13649) by PPO
was tried, too: within 5 minutes the sentences became longer, and their grammar worse.
The teacher is make_corpus.py's, not the model that fluency.py judges with. Tested by tests/test_fluency.py.
"""
import argparse
import os
import random
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "4000")     # see scripts/train.py

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_assets import (HELD_OUT, ROOT, first_words, fit_language_model, load_sentences, pad_right,
                         read_corpus, save)
from make_corpus import TEACHER, is_sentence

import distributed
import speed
from ppo_core import PPOConfig
from value_head import AutoModelForCausalLMWithValueHead

WRITER = ROOT / "assets" / "review-lm"
ROUNDS = 3
BATCHES, ROWS = 44, 512         # of sentences that the writer writes in a round
TOKENS = 40                     # at most, of a sentence
KEPT = 0.25                     # of the different whole sentences


def openings(tokenizer, texts, rng):
    """-> ROWS tensors: the first 1-8 tokens of human sentences, cut where a word ends."""
    found = []
    while len(found) < ROWS:
        ids = tokenizer(rng.choice(texts)).input_ids
        count = first_words(tokenizer, ids, rng.randint(1, 8), least=1)
        found += [torch.tensor(ids[:count])] if count > 0 else []
    return found


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


def write(trainer, tokenizer, teacher, teacher_tokenizer, rng):
    """-> {sentence: log p_teacher - log p_writer, per character}."""
    texts, found = [text for text, _ in load_sentences()[:-HELD_OUT]], {}
    for batch in range(BATCHES):
        queries = openings(tokenizer, texts, rng)
        responses = trainer.generate(queries, batch_size=ROWS, return_prompt=False, max_new_tokens=TOKENS)
        rows = [[*query.tolist(), *response.tolist()] for query, response in zip(queries, responses)]
        rows = [row for row in rows if row[-1] == tokenizer.eos_token_id]
        sentences = tokenizer.batch_decode(rows, skip_special_tokens=True)
        coded = teacher_tokenizer([text + "\n" for text in sentences], add_special_tokens=False).input_ids
        theirs = loglikelihoods(teacher, coded, 0)
        ours = loglikelihoods(trainer.model.pretrained_model, rows, tokenizer.pad_token_id)
        found.update({text: (their - our) / len(text)
                      for text, their, our in zip(sentences, theirs, ours) if is_sentence(text)})
        print(f"batch {batch + 1}/{BATCHES}: {len(found):,} sentences", flush=True)
    return found


def polish(folder, out, number, epochs, learning_rate):
    """Round `number`: train the writer in `folder` on the best of its own sentences, and save it in `out`."""
    distributed.seed_everything(number)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder, v_head_init_strategy="zero")
    trainer = speed.FastPPOTrainer(PPOConfig(batch_size=ROWS, mini_batch_size=64), model, None, tokenizer)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16).eval()
    corpus, rng = read_corpus(int(KEPT * BATCHES * ROWS) + HELD_OUT), random.Random(number)
    found = write(trainer, tokenizer, teacher, AutoTokenizer.from_pretrained(TEACHER), rng)
    best = sorted(found, key=found.get, reverse=True)[:int(KEPT * len(found))]
    others = rng.sample(corpus[:-HELD_OUT], len(best))
    curve = fit_language_model(model.pretrained_model.train(), tokenizer, best + others, [corpus[-HELD_OUT:]],
                               epochs, learning_rate)
    save(model.pretrained_model.eval(), tokenizer, out)
    with open(Path(out) / "README.md", "a", encoding="utf-8") as card:
        card.write(f"\nRound {number} of `scripts/polish_writer.py` trained it on {len(best):,} of "
                   f"{len(found):,} of its own sentences, those that SmolLM2 likes best beside it, and on as "
                   f"many of SmolLM2's. Held-out loss on written sentences: {curve[-1][0]:.3f}.\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="passes over the kept sentences")
    parser.add_argument("--learning_rate", type=float, default=5e-4, help="it falls to 0")
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
