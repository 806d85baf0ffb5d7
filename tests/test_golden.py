"""step() of both trainers trains as TRL 0.11.4's did: the same weights, statistics and mini-batches.

The files under tests/golden/ were written by TRL itself, on tiny random GPT-2, Llama and Bloom models with ragged
queries and responses; tests/make_golden.py made them, and its docstring says how to make them again. Each case is three
calls of step(). Here the same checkpoint is loaded, gets the same inputs, and has to arrive at the same numbers.

Tolerances: torch rounds differently with another padding or another order of a sum, and training amplifies that.
make_golden.py measured by how much (`rounding`), and test_rounding_is_far_below_the_tolerances compares.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import adapters
from optim import Lion
from ppo_core import PPOConfig, PPOTrainer
from reference import create_reference_model
from speed import FastPPOTrainer
from value_head import AutoModelForCausalLMWithValueHead

GOLDEN = Path(__file__).resolve().parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
TRAINERS = {"plain": PPOTrainer, "fast": FastPPOTrainer}
OPTIMIZERS = {"SGD": torch.optim.SGD, "Lion": Lion}
SCHEDULERS = {"ExponentialLR": torch.optim.lr_scheduler.ExponentialLR}

TOKEN_ATOL = 2e-4   # log-probs and values per token after up to 36 updates; they moved by 0.3 to 3
REF_ATOL = 2e-5     # the reference is never trained: only the rounding of one forward pass
STAT_RTOL = 1e-3
STAT_FLOOR = 1e-6   # a few roundings of a mean of numbers around 1
# These are means of signed numbers that almost cancel. Their rounding has the size of the parts, not of the result: log-probs
# around -4 round at 5e-7, summed over up to 9 tokens. The numbers themselves are 1e-3 to 1, so 1e-5 still tells much.
DIFFERENCE_FLOOR = 1e-5
DIFFERENCES = {"objective/kl", "ppo/policy/policykl", "ppo/policy/advantages_mean", "ppo/loss/policy", "ppo/loss/total",
               "ppo/returns/mean", "ppo/val/mean", "ppo/val/vpred", "ppo/val/var_explained"}
# These follow from the inputs and the settings. The KL coefficient moves by 2e-4 in a step, so 1e-3 would not see it move.
EXACT = {"objective/kl_coef": 1e-5, "ppo/learning_rate": 1e-6, "ppo/mean_scores": 1e-6, "ppo/std_scores": 1e-6}


def stat_tolerance(key, expected):
    rtol = 1e-6 if key.startswith("tokens/") else EXACT.get(key, STAT_RTOL)
    floor = DIFFERENCE_FLOOR if key in DIFFERENCES else STAT_FLOOR
    return rtol * abs(expected) + floor


def load(case):
    """-> the settings, inputs and statistics of a case, and its arrays by name."""
    return json.loads((GOLDEN / f"{case}.json").read_text()), load_file(GOLDEN / f"{case}.safetensors")


def build(data, config, kind):
    """Our trainer for a case; kind: a name of TRAINERS. Without an optimizer in the file, the trainer's own default has to be TRL's: Adam."""
    folder = GOLDEN / "models" / data["model"]
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder))
    if data.get("lora"):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wrapped = PeftModel.from_pretrained(base, GOLDEN / "models" / data["lora"], is_trainable=True)
        head, model = model.v_head, adapters.AutoModelForCausalLMWithValueHead.from_pretrained(wrapped)
        model.v_head.load_state_dict(head.state_dict())
    shared = data["num_shared_layers"]
    ref_model = create_reference_model(model) if shared is None and not data.get("lora") else None
    optimizer = scheduler = None
    if data["optimizer"]:
        name, kwargs = data["optimizer"]
        optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad], **kwargs)
    if data["scheduler"]:
        name, kwargs = data["scheduler"]
        scheduler = SCHEDULERS[name](optimizer, **kwargs)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(GOLDEN / "tokenizer"))
    trainer = TRAINERS[kind](PPOConfig(**config), model, ref_model, tokenizer, optimizer=optimizer,
                             num_shared_layers=shared, lr_scheduler=scheduler)
    return trainer, model


def train(data, kind, **changed):
    """-> statistics of the three steps, the model, updates per step, and the next number of numpy's generator."""
    config = {**data["config"], **changed}
    trainer, model = build(data, config, kind)
    updates, stats, counts = [], [], []
    handle = register_optimizer_step_post_hook(lambda *_: updates.append(1))
    # TRL's constructor seeds this generator, ours never does. It gives the order of the samples, epoch by epoch.
    np.random.seed(config["seed"])
    try:
        for step in data["steps"]:
            queries, responses = ([torch.tensor(ids) for ids in step[key]] for key in ("queries", "responses"))
            scores = [torch.tensor(score) for score in step["scores"]]
            masks = step["response_masks"] and [torch.tensor(mask) for mask in step["response_masks"]]
            updates.clear()
            stats.append(trainer.step(queries, responses, scores, response_masks=masks))
            counts.append(len(updates))
    finally:
        handle.remove()
    return stats, model, counts, int(np.random.randint(2**31 - 1))


@functools.cache
def result(case, kind):
    """One training per case and trainer, shared by the tests below. The global generators are left as they were found."""
    before = np.random.get_state()
    try:
        return train(load(case)[0], kind)
    finally:
        np.random.set_state(before)


def pad(rows):
    """list of (R_i,) -> (B, R), right-padded with 0."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=torch.float32) for row in rows], batch_first=True)


@torch.no_grad()
def score_one_by_one(model, queries, responses):
    """Log-probs and values of the response tokens, (B, R) each, by plain forwards without padding.

    Written without any helper of the project: it must not share a mistake with the code under test.
    """
    model.eval()
    device = next(model.parameters()).device
    logprobs, values = [], []
    for query, response in zip(queries, responses):
        ids = torch.tensor([query + response], device=device)                      # (1, Q + R)
        logits, _, value = model(ids, attention_mask=torch.ones_like(ids))         # (1, Q + R, V), -, (1, Q + R)
        before = slice(len(query) - 1, len(query) + len(response) - 1)             # the position before each token
        logp = logits[0, before].log_softmax(-1)                                   # (R, V)
        logprobs.append(logp.gather(1, ids[0, len(query):, None])[:, 0].cpu())
        values.append(value[0, before].cpu())
    return pad(logprobs), pad(values)


def largest_difference(ours, theirs, where):
    return float(((ours - theirs).abs() * where).max())


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("case", CASES)
def test_trained_policy_and_value_head_equal_trl(case, kind):
    data, arrays = load(case)
    _, model, _, _ = result(case, kind)
    last = data["steps"][-1]
    logprobs, values = score_one_by_one(model, last["queries"], last["responses"])
    assert largest_difference(logprobs, arrays["final/logprobs"], arrays["final/mask"]) < TOKEN_ATOL
    assert largest_difference(values, arrays["final/values"], arrays["final/mask"]) < TOKEN_ATOL


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("case", CASES)
def test_every_scalar_statistic_equals_trl(case, kind):
    data, _ = load(case)
    wrong = []
    for k, (step, ours) in enumerate(zip(data["steps"], result(case, kind)[0])):
        for key, expected in step["stats"].items():
            if key not in ours:
                wrong.append(f"step {k}: {key} is missing")
            elif not abs(float(ours[key]) - expected) <= stat_tolerance(key, expected):   # NaN is wrong too
                wrong.append(f"step {k}: {key} is {float(ours[key]):.8g}, TRL had {expected:.8g}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("case", CASES)
def test_statistics_per_token_and_sample_equal_trl(case, kind):
    data, arrays = load(case)
    for k, (step, ours) in enumerate(zip(data["steps"], result(case, kind)[0])):
        inside = pad([[1] * len(response) for response in step["responses"]])              # (B, R)
        chosen = pad(step["response_masks"]) if step["response_masks"] else inside         # (B, R)
        for name, atol in (("logprobs", TOKEN_ATOL), ("ref_logprobs", REF_ATOL)):
            array = torch.as_tensor(np.asarray(ours[f"objective/{name}"]))
            assert array.shape == inside.shape, f"step {k}: {name} must be (B, R) over the responses"
            assert not (array * (1 - inside)).any(), f"step {k}: {name} must be 0 in the padding"
            assert largest_difference(array, arrays[f"step{k}/{name}"], chosen) < atol, f"step {k}: {name}"
        kl = torch.as_tensor(np.asarray(ours["objective/kl_dist"]))                        # (B,)
        torch.testing.assert_close(kl, arrays[f"step{k}/kl_dist"], atol=TOKEN_ATOL, rtol=STAT_RTOL)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("case", CASES)
def test_as_many_updates_in_the_same_order(case, kind):
    data, _ = load(case)
    _, _, updates, draw = result(case, kind)
    assert updates == data["mini_batches"]
    # Equal only if every epoch drew one permutation of the batch and nothing else used the generator.
    assert draw == data["numpy_draw_after"]


# Changing any of these back to its default must be seen. If not, the case above proves nothing about the setting.
SETTINGS = [("gpt2_coefficients", dict(gamma=1.0)), ("gpt2_coefficients", dict(lam=0.95)),
            ("gpt2_coefficients", dict(cliprange=0.2)), ("gpt2_coefficients", dict(cliprange_value=0.2)),
            ("gpt2_coefficients", dict(vf_coef=0.1)), ("gpt2_coefficients", dict(init_kl_coef=0.2)),
            ("gpt2_coefficients", dict(target=6.0)), ("gpt2_coefficients", dict(horizon=10000.0)),
            ("gpt2_coefficients", dict(ppo_epochs=4)), ("gpt2_coefficients", dict(mini_batch_size=4)),
            ("gpt2_mse", dict(adap_kl_ctrl=True)), ("gpt2_mse", dict(kl_penalty="kl")),
            ("llama_abs_whiten", dict(whiten_rewards=False)), ("llama_abs_whiten", dict(kl_penalty="kl")),
            ("bloom_full", dict(kl_penalty="kl")), ("gpt2_early_stopping", dict(early_stopping=False)),
            ("gpt2_early_stopping", dict(target_kl=0.02 / 1.5)),    # the factor 1.5 forgotten
            ("gpt2_default", dict(seed=0))]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("case, changed", SETTINGS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_a_wrong_setting_would_be_noticed(case, changed, kind):
    data, _ = load(case)
    stats = train(data, kind, **changed)[0]
    far = [key for step, ours in zip(data["steps"], stats) for key, expected in step["stats"].items()
           if abs(float(ours[key]) - expected) > 5 * stat_tolerance(key, expected)]
    assert far


@pytest.mark.parametrize("case", CASES)
def test_golden_files_cover_something(case):
    """Needs no training of ours: TRL's weights and log-probs really moved, on ragged responses that partly end in EOS."""
    data, arrays = load(case)
    assert data["largest_weight_change"] > 1e-3
    moved = (arrays["final/logprobs"] - arrays["step2/ref_logprobs"]).abs() * arrays["final/mask"]
    assert moved.max() > 0.01, "the trained policy is the reference"
    for step in data["steps"]:
        assert len(set(map(len, step["queries"]))) > 1 and len(set(map(len, step["responses"]))) > 1
        ended = [response[-1] == 1 for response in step["responses"]]
        assert any(ended) and not all(ended)


@pytest.mark.parametrize("case", CASES)
def test_rounding_is_far_below_the_tolerances(case):
    """`rounding`: how far TRL's own numbers moved when every weight moved by 3e-7. Otherwise a match would be luck."""
    data, _ = load(case)
    for key, rounding in data["rounding"].items():
        if key in data["steps"][0]["stats"]:
            tolerance = min(stat_tolerance(key, step["stats"][key]) for step in data["steps"])
        else:
            tolerance = TOKEN_ATOL
        assert rounding < tolerance / 2, key


def test_early_stopping_really_stopped():
    data, _ = load("gpt2_early_stopping")
    epochs = PPOConfig(**data["config"]).ppo_epochs
    full = epochs * data["config"]["batch_size"] // data["config"]["mini_batch_size"]
    assert min(data["mini_batches"]) < full
    assert max(data["mini_batches"]) == full, "one step should run all its epochs: never stopping is an answer too"
