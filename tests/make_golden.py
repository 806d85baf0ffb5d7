r"""Runs TRL 0.11.4's PPOTrainer on tiny random models and stores what it did under tests/golden/.

Why: test_golden.py then proves, without TRL installed, that this project trains the way TRL did.
TRL 0.11.4 cannot live beside current transformers, so it gets a virtual environment of its own:

    python -m venv .peer
    .peer/bin/pip install torch==2.13.0 trl==0.11.4 transformers==4.46.3 accelerate==1.1.1 \
        peft==0.13.2 lion-pytorch==0.2.5 rich==15.0.0                   # TRL imports rich without asking for it
    OMP_NUM_THREADS=1 .peer/bin/python tests/make_golden.py             # all cases, about a minute
    OMP_NUM_THREADS=1 .peer/bin/python tests/make_golden.py gpt2_lion   # one case, with the models already stored

It writes
    tests/golden/models/{gpt2,llama,bloom}/   tiny fp32 checkpoints with a value head, saved by TRL itself
    tests/golden/models/gpt2_lora/            new adapters for that GPT-2, which add nothing yet
    tests/golden/tokenizer/                   token "t7" has id 7; 0 is padding, 1 ends a response
    tests/golden/<case>.json                  settings, inputs, every scalar statistic of each step
    tests/golden/<case>.safetensors           per-token log-probs and values, (B, R) right-padded with 0

What no case covers, because TRL 0.11.4 itself is wrong there:
    max_grad_norm                  its parameter list is an iterator: only the first optimizer step is clipped
    use_score_scaling              its running moments raise AttributeError
    ratio_threshold                a skipped mini-batch still moves the weights through the optimizer's momentum
    gradient_accumulation_steps    it averages means of micro-batches: ragged batches then get other weights
    whiten_rewards, ragged totals  see `equal_totals` below
    response_masks, holes          a token masked in the middle counts as value 0, so every advantage before it is wrong
"""

import copy
import importlib.metadata
import json
import re
import sys
import warnings
from pathlib import Path

import lion_pytorch
import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BloomConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

GOLDEN = Path(__file__).resolve().parent / "golden"
VOCAB, PAD, EOS = 97, 0, 1
B = 8           # samples per step()
STEPS = 3
INPUTS = ("queries", "responses", "scores", "response_masks")
SEED = 11       # of the models and of the default case; every case adds its own index
NOISE = 3e-7    # relative weight noise of the repeated runs: a few roundings of fp32
REPEATS = 4

# initializer_range is 10 times the usual one, so that the distributions are far from uniform.
# GPT-2 keeps its default dropout of 0.1: dropout must play no part in PPO, in the rollout or in the update.
# The widths keep the folder small enough to commit.
TOKENS = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.2)
MODELS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=60, n_inner=64, **TOKENS),
    "llama": LlamaConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=48, max_position_embeddings=60, **TOKENS),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, **TOKENS),  # an MLP of 4 x 32 is fixed: 2 layers
}

OPTIMIZERS = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD, "Lion": lion_pytorch.Lion}
SCHEDULERS = {"ExponentialLR": torch.optim.lr_scheduler.ExponentialLR}

# `config` goes to PPOConfig. Without `optimizer` the trainer builds its own Adam from learning_rate.
# equal_totals: query + response is 10 tokens in every row, so that TRL's right padding is empty. It whitens
# rewards after masking them: padding then holds mean - mean / std instead of 0, and GAE carries that
# back into the response. Only unpadded rows show the arithmetic that was meant.
CASES = {
    "gpt2_default": dict(model="gpt2"),
    "llama_abs_whiten": dict(model="llama", config=dict(kl_penalty="abs", whiten_rewards=True), equal_totals=True),
    "bloom_full": dict(model="bloom", config=dict(kl_penalty="full")),
    # Two samples per mini-batch and three epochs. The short horizon makes the KL coefficient move visibly, and with this
    # seed the KL after the first step is near the target, where the controller's error is not clipped at 0.2.
    "gpt2_coefficients": dict(model="gpt2", config=dict(
        gamma=0.9, lam=0.8, cliprange=0.1, cliprange_value=0.3, vf_coef=0.5, init_kl_coef=0.1, target=0.3,
        horizon=40.0, ppo_epochs=3, mini_batch_size=2), seed=18),
    # This seed runs another number of epochs in each step: 3, 2 and all 4. It would run 2, 3 and 4 if TRL stopped at target_kl,
    # not at 1.5 times target_kl.
    "gpt2_early_stopping": dict(model="gpt2", config=dict(early_stopping=True, target_kl=0.02), seed=21),
    "gpt2_sgd_scheduler": dict(model="gpt2", optimizer=("SGD", dict(lr=0.004, momentum=0.9)),
                               scheduler=("ExponentialLR", dict(gamma=0.5))),
    # Lion takes the sign of each gradient, so rounding decides wherever a gradient is almost 0: few updates, and a
    # seed without such a gradient. A weight decay of 1 is too large for training; here it makes the decay visible.
    "gpt2_lion": dict(model="gpt2", config=dict(ppo_epochs=2, mini_batch_size=8), seed=18,
                      optimizer=("Lion", dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=1.0))),
    "gpt2_response_masks": dict(model="gpt2", response_masks=True, seed=31),
    "gpt2_lora": dict(model="gpt2", lora="gpt2_lora", config=dict(learning_rate=1e-3)),
    "gpt2_shared_layers": dict(model="gpt2", num_shared_layers=2),
    # A fixed coefficient goes here: `target` and `horizon` above only matter with an adaptive one.
    "gpt2_mse": dict(model="gpt2", config=dict(kl_penalty="mse", adap_kl_ctrl=False, init_kl_coef=0.5)),
}


def make_models_and_tokenizer():
    """Saves the checkpoints with TRL's own save_pretrained: our loader has to read that layout."""
    for name, config in MODELS.items():
        torch.manual_seed(SEED)
        trunk = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
        model = AutoModelForCausalLMWithValueHead.from_pretrained(trunk)
        torch.nn.init.normal_(model.v_head.summary.weight, std=0.2)
        torch.nn.init.constant_(model.v_head.summary.bias, 0.3)   # a bias of 0 would hide a bias that is not loaded
        model.save_pretrained(GOLDEN / "models" / name)
    words = {"<pad>": PAD, "<eos>": EOS, **{f"t{i}": i for i in range(2, VOCAB)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), pad_token="<pad>",
                                        eos_token="<eos>", padding_side="right")
    tokenizer.save_pretrained(GOLDEN / "tokenizer")


def make_step_inputs(model, case, generator):
    """One batch: random queries, responses sampled from the current policy, random scores.

    Responses of 1 and of 9 tokens always occur: a one-token response is where shifts by one show.
    Responses are sampled from the policy: the KL estimate is positive on average only on the policy's own text.
    """
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
    response_lengths = [1, 9] + [draw(1, 9) for _ in range(B - 2)]
    query_lengths = [draw(2, 6) for _ in range(B)]
    if case.get("equal_totals"):
        response_lengths = [10 - q for q in query_lengths]                       # 4..8
    inputs = {"queries": [], "responses": [], "scores": [], "response_masks": None}    # the keys of INPUTS
    for row, (q, r) in enumerate(zip(query_lengths, response_lengths)):
        ids = torch.randint(2, VOCAB, (q,), generator=generator)
        inputs["queries"].append(ids.tolist())
        for _ in range(r):
            logits = model(ids[None])[0][0, -1]                                  # (V,)
            logits[[PAD, EOS]] = -torch.inf
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)])
        if row % 3 == 2:
            ids[-1] = EOS                                                        # these responses ended by themselves
        inputs["responses"].append(ids[q:].tolist())
        inputs["scores"].append(round(float(torch.randn((), generator=generator)), 4))
    if case.get("response_masks"):
        inputs["response_masks"] = [mask_of_beginnings(row, r) for row, r in enumerate(response_lengths)]
    return inputs


def mask_of_beginnings(row, length):
    """0 at the last token of every second response and at the last two of every third, where it is long enough for that."""
    mask = [1] * length
    if row % 2 == 1 and length >= 3:
        mask[-1] = 0
    if row % 3 == 0 and length >= 4:
        mask[-2:] = [0, 0]
    return mask


def make_adapters(folder, base):
    """Saves new LoRA adapters. The path of their base is written as seen from the project's folder."""
    torch.manual_seed(SEED)
    adapters = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), adapters).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "tests/golden/models/" + base.name
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "README.md").unlink()


def load_model(case):
    """The model of a case; with `lora` its adapters are trained, and the head is that of the whole model."""
    folder = GOLDEN / "models" / case["model"]
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder))
    if "lora" in case:
        if not (GOLDEN / "models" / case["lora"]).exists():
            make_adapters(GOLDEN / "models" / case["lora"], folder)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
        head = model.v_head.state_dict()
        model = AutoModelForCausalLMWithValueHead.from_pretrained(
            PeftModel.from_pretrained(base, GOLDEN / "models" / case["lora"], is_trainable=True))
        model.v_head.load_state_dict(head)
    return model


def build_trainer(case, seed, noise):
    """The peer's trainer on a fresh load of the model. `noise` perturbs the weights, for the repeated runs."""
    model = load_model(case)
    if noise:
        torch.manual_seed(noise)
        for p in model.parameters():
            p.data *= 1 + NOISE * torch.randn_like(p)
    shared = case.get("num_shared_layers")
    ref_model = create_reference_model(model) if shared is None and "lora" not in case else None
    settings = dict(seed=seed, batch_size=B, mini_batch_size=4, learning_rate=3e-4) | case.get("config", {})
    name, kwargs = case.get("optimizer", (None, None))
    optimizer = OPTIMIZERS[name](model.parameters(), **kwargs) if name else None
    scheduler = None
    if "scheduler" in case:
        scheduler_name, scheduler_kwargs = case["scheduler"]
        scheduler = SCHEDULERS[scheduler_name](optimizer, **scheduler_kwargs)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(GOLDEN / "tokenizer"))
    trainer = PPOTrainer(PPOConfig(**settings), model, ref_model, tokenizer, optimizer=optimizer,
                         num_shared_layers=shared, lr_scheduler=scheduler)
    return trainer, settings


def as_tensors(inputs):
    """The arguments of step(): lists of (Q_i,), (R_i,), () and (R_i,) tensors."""
    queries, responses = ([torch.tensor(ids) for ids in inputs[key]] for key in ("queries", "responses"))
    scores = [torch.tensor(score) for score in inputs["scores"]]
    masks = inputs["response_masks"] and [torch.tensor(mask) for mask in inputs["response_masks"]]
    return queries, responses, scores, masks


def response_part(array, queries, responses):
    """TRL keeps (B, T-1) over query + response. Response token t of row i sits at column Q_i - 1 + t."""
    out = torch.zeros(B, max(map(len, responses)))                               # (B, R)
    for i, (q, r) in enumerate(zip(queries, responses)):
        out[i, : len(r)] = torch.as_tensor(array[i][len(q) - 1 : len(q) - 1 + len(r)])
    return out


def run_case(case, seed, steps=None, noise=0):
    """Three step() calls. Returns what goes into the two files. `steps` of an earlier result: the inputs to use again."""
    trainer, settings = build_trainer(case, seed, noise)
    start = copy.deepcopy(trainer.model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    updates, arrays = [], {}
    train_minibatch = trainer.train_minibatch
    trainer.train_minibatch = lambda *a, **k: (updates.append(1), train_minibatch(*a, **k))[1]
    record = dict(config=settings, mini_batches=[], steps=[])
    # np.random.permutation orders the mini-batches. TRL's constructor has seeded it; here that is in plain sight.
    np.random.seed(seed)
    for k in range(STEPS):
        trainer.model.eval()
        with torch.no_grad():
            inputs = {key: steps[k][key] for key in INPUTS} if steps else make_step_inputs(trainer.model, case, generator)
        queries, responses, scores, masks = as_tensors(inputs)
        updates.clear()
        stats = trainer.step(queries, responses, scores, masks)
        record["mini_batches"].append(len(updates))
        scalars = {key: float(f"{value:.9g}") for key, value in sorted(stats.items())     # 9 digits keep every fp32 bit
                   if np.ndim(value) == 0 and not key.startswith("time/")}
        record["steps"].append({**inputs, "stats": scalars})
        for key in ("logprobs", "ref_logprobs"):
            arrays[f"step{k}/{key}"] = response_part(stats[f"objective/{key}"], queries, responses)
        arrays[f"step{k}/kl_dist"] = torch.as_tensor(stats["objective/kl_dist"])          # (B,)
    record["numpy_draw_after"] = int(np.random.randint(2**31 - 1))                        # tells how many epochs were drawn
    with torch.no_grad():
        model_inputs = trainer.prepare_model_inputs(queries, responses)
        logprobs, _, values, _ = trainer.batched_forward_pass(trainer.model, queries, responses, model_inputs)
    arrays["final/logprobs"] = response_part(logprobs, queries, responses)
    arrays["final/values"] = response_part(values, queries, responses)
    arrays["final/mask"] = response_part(torch.ones_like(values), queries, responses)
    end = trainer.model.state_dict()
    record["largest_weight_change"] = round(max(float((end[key] - start[key]).abs().max()) for key in end), 6)
    return record, arrays


def spread(record, arrays, repeats):
    """How far rounding alone moves each number: the largest change under weight noise of a few fp32 roundings.

    Returned per statistic (over the three steps) and per kind of array. What is left out did not move at all.
    """
    worst = {}
    for other, other_arrays in repeats:
        assert other["mini_batches"] == record["mini_batches"], "the number of mini-batches hangs on rounding"
        for mine, theirs in zip(record["steps"], other["steps"]):
            for key, value in mine["stats"].items():
                worst[key] = max(worst.get(key, 0.0), abs(value - theirs["stats"][key]))
        for name, array in arrays.items():
            key = re.sub(r"step\d", "steps", name)
            worst[key] = max(worst.get(key, 0.0), float((array - other_arrays[name]).abs().max()))
    return {key: float(f"{value:.2g}") for key, value in sorted(worst.items()) if value > 0}


def dump(data, path):
    """JSON with one line per list of numbers: short, and still readable in a diff."""
    text = json.dumps(data, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    path.write_text(text + "\n")


def main(names):
    warnings.simplefilter("ignore")                                      # TRL announces its own removal on every call
    warnings.filterwarnings("error", message="The average ratio")        # no case may skip a mini-batch, see above
    transformers.logging.set_verbosity_error()
    packages = ("torch", "trl", "transformers", "accelerate", "peft", "lion-pytorch", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    if not names:
        make_models_and_tokenizer()
    for index, (name, case) in enumerate(CASES.items()):
        if names and name not in names:
            continue
        seed = case.get("seed", SEED + index)
        record, arrays = run_case(case, seed)
        repeats = [run_case(case, seed, record["steps"], noise) for noise in range(1, REPEATS + 1)]
        rounding = spread(record, arrays, repeats)
        setup = {key: case.get(key) for key in ("model", "lora", "optimizer", "scheduler", "num_shared_layers")}
        dump({"versions": versions, **setup, "rounding": rounding, **record}, GOLDEN / f"{name}.json")
        save_file(arrays, GOLDEN / f"{name}.safetensors")
        moved = float((arrays["final/logprobs"] - arrays["step2/ref_logprobs"]).abs().max())
        print(f"{name:20s} mini-batches {record['mini_batches']}, log-probs moved by {moved:.3f}, "
              f"rounding moves them by {rounding['final/logprobs']:.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
