"""trl_names.py: every name and field of TRL 0.11.4, truncated sampling that is also trained, and a trainer with its own seed."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

import ppo_core
import trl_names
from ppo_core import PPOTrainer as PlainTrainer
from test_ppo_core import GOLDEN, distance, ragged, seeded, sgd, tokenizer, weights      # noqa: F401 (seeded: a fixture)
from trl_names import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, kept_tokens, respond_to_batch

# TRL 0.11.4's PPOConfig: each field, its default there, and what it is here: "works", "information", "set" by trainer or
# config, or the sentence with which a value that is not the default is refused.
TRL_FIELDS = {
    "exp_name": (None, "information"), "seed": (0, "works"), "log_with": (None, "works"), "task_name": (None, "information"),
    "model_name": ("gpt2", "information"), "query_dataset": ("stanfordnlp/imdb", "information"),
    "reward_model": ("sentiment-analysis:lvwerra/distilbert-imdb", "information"), "remove_unused_columns": (True, "works"),
    "tracker_kwargs": ({}, "works"), "accelerator_kwargs": ({}, "works"), "project_kwargs": ({}, "works"),
    "tracker_project_name": ("trl", "works"), "push_to_hub_if_best_kwargs": ({}, "nothing is pushed"), "steps": (20000, "information"),
    "learning_rate": (1.41e-5, "works"), "adap_kl_ctrl": (True, "works"), "init_kl_coef": (0.2, "works"), "kl_penalty": ("kl", "works"),
    "target": (6.0, "works"), "horizon": (10000.0, "works"), "gamma": (1.0, "works"), "lam": (0.95, "works"), "cliprange": (0.2, "works"),
    "cliprange_value": (0.2, "works"), "vf_coef": (0.1, "works"), "batch_size": (128, "works"), "forward_batch_size": (None, "works"),
    "mini_batch_size": (128, "works"), "gradient_accumulation_steps": (1, "works"), "world_size": (None, "set"), "ppo_epochs": (4, "works"),
    "max_grad_norm": (None, "works"), "optimize_cuda_cache": (None, "works"), "optimize_device_cache": (False, "works"),
    "early_stopping": (False, "works"), "target_kl": (1.0, "works"), "compare_steps": (1, "information"), "ratio_threshold": (10.0, "works"),
    "use_score_scaling": (False, "works"), "use_score_norm": (False, "works"), "score_clip": (None, "works"), "whiten_rewards": (False, "works"),
    "gradient_checkpointing": (False, "works"), "is_encoder_decoder": (None, "encoder-decoder models"), "is_peft_model": (None, "set"),
    "backward_batch_size": (None, "set"), "global_backward_batch_size": (None, "set"), "global_batch_size": (None, "set"),
    "dataset_num_proc": (None, "information"),
}
OTHER_DEFAULTS = {"mini_batch_size": 128}       # made from batch_size, whose default is that


def model(family="gpt2"):
    return AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "models" / family)


def make(trainer_class=PPOTrainer, family="gpt2", dataset=None, collator=None, lr=0.05, **settings):
    network = model(family)
    config = PPOConfig(**{"batch_size": 4, "ppo_epochs": 2, "adap_kl_ctrl": False, **settings})
    return trainer_class(config, network, None, tokenizer(), dataset, sgd(network, lr), collator)


class Plain(PPOTrainer):
    """PPOTrainer of trl_names.py on the plain trainer's passes."""
    prepare, generate_batch = PlainTrainer.prepare, PlainTrainer.generate_batch

    def mini_batches(self, batch, index):
        return PPOTrainer.mini_batches(self, batch, index) if self.config.truncates else PlainTrainer.mini_batches(self, batch, index)

    def record(self, batch):
        return PPOTrainer.record(self, batch) if self.config.truncates else PlainTrainer.record(self, batch)


# ------------------------------------------------------------------------------------------------------- settings


def test_every_field_of_trl_is_a_field_here_with_its_default():
    fields = {field.name: field for field in dataclasses.fields(PPOConfig)}
    assert set(TRL_FIELDS) <= set(fields)
    made = PPOConfig()
    for name, (default, what) in TRL_FIELDS.items():
        if what != "set" and name != "exp_name":
            assert getattr(made, name) == OTHER_DEFAULTS.get(name, default), name


@pytest.mark.parametrize("name", [name for name, (_, what) in TRL_FIELDS.items() if what == "information"])
def test_information_is_read_back(name):
    value = {"steps": 1000, "compare_steps": 5, "dataset_num_proc": 2}.get(name, "something")
    config = PPOConfig(**{name: value})
    assert getattr(config, name) == value and config.to_dict()[name] == value


def test_what_would_do_nothing_is_refused():
    for settings, sentence in (({"push_to_hub_if_best_kwargs": {"repo_id": "x"}}, "is given, but nothing is pushed; upload"),
                               ({"is_encoder_decoder": True}, "encoder-decoder models cannot be trained; use a causal"),
                               ({"top_p": 0.0}, "top_p is 0.0; use"), ({"top_k": -1}, "top_k is -1 and top_p is 1.0; use")):
        with pytest.raises(ValueError, match=sentence):
            PPOConfig(**settings)


def test_settings_that_are_computed():
    config = PPOConfig(batch_size=64, forward_batch_size=8, gradient_accumulation_steps=2, steps=1000)
    assert (config.mini_batch_size, config.backward_batch_size, config.total_ppo_epochs) == (8, 16, 16)
    trainer = make(mini_batch_size=2)
    config = trainer.config
    assert (config.world_size, config.global_batch_size, config.global_backward_batch_size) == (1, 4, 2)
    assert (config.is_encoder_decoder, config.is_peft_model, trainer.is_distributed) == (False, False, False)
    assert trainer.current_device == trainer.accelerator.device
    with pytest.raises(ValueError, match=r"batch_size \(30\) must be a multiple of mini_batch_size \(8\)"):
        PPOConfig(batch_size=30, mini_batch_size=8)


def test_accelerator_and_project_settings_arrive(tmp_path, monkeypatch):
    trainer = make(accelerator_kwargs={"step_scheduler_with_optimizer": False}, project_kwargs={"logging_dir": str(tmp_path / "logs")})
    assert trainer.accelerator.step_scheduler_with_optimizer is False
    assert trainer.accelerator.logging_dir == str(tmp_path / "logs")


def test_tracker_settings_arrive(monkeypatch):
    from accelerate import Accelerator
    seen = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, settings, arguments: seen.append((name, arguments)))
    make(log_with="wandb", tracker_kwargs={"wandb": {"name": "run 1", "mode": "disabled"}}, tracker_project_name="mine")
    (name, arguments), = seen
    assert name == "mine" and arguments["wandb"]["name"] == "run 1" and arguments["wandb"]["mode"] == "disabled"


def test_columns_that_the_model_cannot_take_do_not_reach_the_collator():
    rows = Dataset.from_dict({"input_ids": [[5, 6]] * 8, "query": ["a"] * 8, "review": ["b"] * 8, "label": [1] * 8})
    for remove, expected in ((True, {"input_ids", "query", "label"}), (False, {"input_ids", "query", "label", "review"})):
        trainer = make(dataset=rows, collator=list, remove_unused_columns=remove)
        assert set(next(iter(trainer.dataloader))[0]) == expected


# ------------------------------------------------------------------------------------------------- functions of trl.core


def test_functions_of_trl_core():
    values = torch.randn(5, 7)
    whitened = trl_names.whiten(values)
    assert torch.allclose(whitened, (values - values.mean()) * torch.rsqrt(values.var() + 1e-8))
    assert torch.allclose(trl_names.whiten(values, shift_mean=False), whitened + values.mean(), atol=1e-6)
    assert trl_names.clip_by_value(torch.tensor([-2.0, 0.5, 3.0]), torch.tensor(0.0), torch.tensor(1.0)).tolist() == [0.0, 0.5, 1.0]
    trl_names.set_seed(7)
    first = (torch.rand(1).item(), np.random.rand())
    trl_names.set_seed(7)
    assert first == (torch.rand(1).item(), np.random.rand())
    mask = (torch.rand(5, 7) > 0.3).float()
    chosen = values[mask == 1]
    assert trl_names.masked_mean(values, mask) == pytest.approx(chosen.mean().item())
    rows = torch.stack([row[m == 1].mean() for row, m in zip(values, mask)])
    assert torch.allclose(trl_names.masked_mean(values, mask, 1), rows) and torch.allclose(trl_names.masked_mean(values, mask, axis=1), rows)
    assert trl_names.masked_var(values, mask) == pytest.approx(chosen.var().item())
    assert trl_names.masked_var(values, mask, unbiased=False) == pytest.approx(chosen.var(correction=0).item())
    logits, labels = torch.randn(2, 3, 9), torch.randint(9, (2, 3))
    assert torch.equal(trl_names.logprobs_from_logits(logits, labels), ppo_core.logprobs_from_logits(logits, labels))
    assert torch.equal(trl_names.logprobs_from_logits(logits, labels, gather=False), logits.log_softmax(-1))


@pytest.mark.parametrize("name", ["TextEnvironment", "BestOfNSampler", "top_k_top_p_filtering", "SFTConfig"])
def test_a_name_that_is_not_there_says_what_to_do_instead(name):
    with pytest.raises(ImportError, match=f"^{name} is not there; "):
        exec(f"from trl_names import {name}")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from trl_names import nothing")


def test_respond_to_batch_samples_the_model():
    network, queries = model().eval(), torch.tensor([[5, 6, 7]] * 4000)
    torch.manual_seed(0)
    responses = respond_to_batch(network, queries, txt_len=1)
    assert responses.shape == (4000, 1)
    with torch.no_grad():
        probabilities = network(queries[:1])[0][0, -1].softmax(-1)
    counts = torch.bincount(responses[:, 0], minlength=len(probabilities))
    assert chi_square(counts, probabilities) < 1.35 * len(probabilities)
    assert len(set(respond_to_batch(network, queries, txt_len=1, top_k=3)[:, 0].tolist())) == 3
    assert respond_to_batch(network, queries[:2], txt_len=5, top_p=0.5).shape == (2, 5)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum())


# ------------------------------------------------------------------------------------------------------ top_k, top_p

TRUNCATED = [{"top_k": 5}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.7}, {"top_k": 5, "temperature": 0.7}]
truncated = pytest.mark.parametrize("settings", TRUNCATED)
both = pytest.mark.parametrize("trainer_class", [PPOTrainer, Plain])


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.8}, {"top_p": 0.01}])
def test_the_kept_tokens_are_those_of_transformers(settings):
    from transformers import TopKLogitsWarper, TopPLogitsWarper
    logits = torch.randn(50, 1, 40) * 3
    expected = logits[:, 0]
    if "top_k" in settings:
        expected = TopKLogitsWarper(settings["top_k"])(None, expected)
    if "top_p" in settings:
        expected = TopPLogitsWarper(settings["top_p"])(None, expected)
    assert torch.equal(kept_tokens(logits, **settings)[:, 0], expected > -math.inf)


def test_ties_are_kept_as_transformers_keeps_them():
    from transformers import TopKLogitsWarper, TopPLogitsWarper
    logits = torch.tensor([[[2.0, 1.0, 1.0, 1.0, 0.0]]])
    for top_k in (1, 2, 3, 5, 9):
        assert torch.equal(kept_tokens(logits, top_k=top_k)[:, 0], TopKLogitsWarper(min(top_k, 5))(None, logits[:, 0]) > -math.inf), top_k
    for logits in (logits, torch.zeros(1, 1, 4), torch.randn(50, 1, 20).bfloat16().float()):
        for top_p in (0.01, 0.25, 0.5, 0.9):
            assert torch.equal(kept_tokens(logits, top_p=top_p)[:, 0], TopPLogitsWarper(top_p)(None, logits[:, 0]) > -math.inf), top_p


@both
@truncated
def test_recomputed_logprobs_are_those_of_the_sampler(trainer_class, settings):
    """What transformers' generate itself says about the tokens that it drew."""
    trainer = make(trainer_class, **settings)
    query = torch.tensor([5, 6, 7, 8])
    config = trainer.config
    with torch.no_grad():
        out = trainer.model.pretrained_model.generate(
            input_ids=query[None].repeat(4, 1), attention_mask=torch.ones(4, 4, dtype=torch.long), do_sample=True, max_new_tokens=8,
            min_new_tokens=8, top_k=config.top_k, top_p=config.top_p, temperature=config.temperature, pad_token_id=1, eos_token_id=[],
            output_scores=True, return_dict_in_generate=True)
    responses = [row[4:] for row in out.sequences]
    scores = torch.stack(out.scores, 1).log_softmax(-1)                             # (4, 8, V)
    expected = scores.gather(2, torch.stack(responses)[..., None])[..., 0]
    stats = trainer.step([query] * 4, responses, [0.1, 0.2, 0.3, 0.4])
    assert (stats["objective/logprobs"] - expected).abs().max() < 1e-4
    assert expected.isfinite().all() and abs(stats["objective/kl"]) < 1e-4


@both
@truncated
def test_the_ratio_is_1_at_first_and_the_kl_is_finite_later(trainer_class, settings):
    """check_ratio, which is part of step(), raises where the first ratio is not 1."""
    trainer = make(trainer_class, lr=0.1, mini_batch_size=2, **settings)
    kls = []
    for _ in range(4):
        queries = ragged()[0]
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=8)
        kls.append(trainer.step(queries, responses, [0.5, -1.0, 2.0, 0.3])["objective/kl"])
    assert all(math.isfinite(kl) for kl in kls) and abs(kls[0]) < 1e-4 < abs(kls[-1])


def test_plain_and_fast_trainer_agree_on_truncated_sampling():
    results = []
    for trainer_class in (PPOTrainer, Plain):
        trainer = make(trainer_class, top_k=5, mini_batch_size=2)
        for seed in range(3):
            trl_names.set_seed(seed)
            queries = ragged()[0]
            responses = trainer.generate(queries, return_prompt=False, max_new_tokens=8)
            trl_names.set_seed(seed)
            trainer.step(queries, responses, [0.5, -1.0, 2.0, 0.3])
        results.append(weights(trainer))
    assert distance(*results) < 1e-5


def test_truncated_samples_have_the_truncated_distribution():
    trainer = make(top_k=6)
    query = torch.tensor([5, 6, 7, 8])
    with torch.no_grad():
        logits = trainer.model.eval()(query[None])[0][0, -1]
    probabilities = logits.masked_fill(logits < logits.sort().values[-6], -math.inf).softmax(-1)
    drawn = torch.cat(trainer.generate([query] * 4000, batch_size=1000, return_prompt=False, max_new_tokens=1))
    counts = torch.bincount(drawn, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0 and chi_square(counts[probabilities > 0], probabilities[probabilities > 0]) < 20.5


@pytest.mark.parametrize("settings", [{}, {"top_k": 8}, {"top_p": 0.9}])
def test_the_known_optimum_is_approached_with_truncation_as_without(settings):
    """One token, fixed KL coefficient beta: over the tokens that can be sampled, the optimum is ref * exp(score / beta)."""
    network, beta, query = model(), 0.5, torch.tensor([5, 6, 7, 8])
    config = PPOConfig(batch_size=256, mini_batch_size=256, ppo_epochs=2, adap_kl_ctrl=False, init_kl_coef=beta, vf_coef=0.0, **settings)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    trainer = PPOTrainer(config, network, None, tokenizer(), None, optimizer)
    reward = torch.linspace(-1, 1, 100)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]

    def last_logits(policy):
        with torch.no_grad():
            return policy.eval()(query[None])[0][0, -1]

    reference = last_logits(trainer.ref_model)

    def distance_to_optimum():
        logits = last_logits(network)
        left_out = ~kept_tokens(logits[None, None], None, config.top_k, config.top_p)[0, 0]
        optimum = (reference + reward[:len(reference)] / beta).masked_fill(left_out, -math.inf).softmax(-1)
        return float((logits.masked_fill(left_out, -math.inf).softmax(-1) - optimum).abs().sum())

    start = distance_to_optimum()
    for step in range(70):
        if step == 40:
            optimizer.param_groups[0]["lr"] /= 10
        responses = trainer.generate([query] * 256, batch_size=256, return_prompt=False, max_new_tokens=1)
        trainer.step([query] * 256, responses, [float(reward[response[0]]) for response in responses])
    assert start > 0.9 and distance_to_optimum() < 0.05


def test_other_truncation_than_the_configs_is_refused_with_the_field_to_set():
    queries = ragged()[0]
    with pytest.raises(ValueError, match=r"top_k=50.*set it in PPOConfig\(top_k=\.\.\.\)"):
        make().generate(queries, top_k=50, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"top_k=50.*\(top_k=5\); set it in PPOConfig"):
        make(top_k=5).generate(queries, top_k=50, max_new_tokens=3)
    with pytest.raises(ValueError, match="repetition_penalty=1.1.*leave it out"):
        make(top_k=5).generate(queries, repetition_penalty=1.1, max_new_tokens=3)
    assert make(top_k=5).generate(queries, top_k=5, top_p=1.0, do_sample=True, max_new_tokens=3)
    assert make(top_k=5).generate(queries, top_k=50, allow_other_distribution=True, max_new_tokens=3)


# ----------------------------------------------------------------------------------------------------------- generate


def test_a_list_ends_at_the_tokenizers_eos_whatever_eos_is_given():
    trainer = make()
    eos = trainer.tokenizer.eos_token_id
    for given in (-1, 100_000):
        torch.manual_seed(1)
        responses = trainer.generate([torch.tensor([5, 6, 7])] * 60, batch_size=60, return_prompt=False, max_new_tokens=40, eos_token_id=given)
        assert all(eos not in response[:-1] for response in responses)
        assert any(len(response) < 40 for response in responses), "no response met an EOS, so nothing was tested"


def test_the_eos_tokens_of_the_models_generation_config_end_a_response():
    trainer = make()
    words = [token for token in range(20) if token != trainer.tokenizer.eos_token_id]
    trainer.model.pretrained_model.generation_config.eos_token_id = words
    for query in (torch.tensor([5, 6, 7]), [torch.tensor([5, 6, 7])] * 20):
        responses = trainer.generate(query, batch_size=20, return_prompt=False, max_new_tokens=40)
        assert all(not set(response[:-1].tolist()) & set(words) for response in responses)
    assert any(len(response) > 1 for response in trainer.generate([torch.tensor([5, 6, 7])] * 20, batch_size=20, return_prompt=False,
                                                                  max_new_tokens=40, eos_token_id=(words[0],)))


def test_remove_padding_and_generation_config():
    trainer = make()
    queries = [torch.tensor([5, 6, 7])] * 60
    padded = trainer.generate(queries, batch_size=60, return_prompt=False, remove_padding=False,
                              generation_config=GenerationConfig(max_new_tokens=12, do_sample=True, top_k=0))
    assert {len(response) for response in padded} == {12} and any(trainer.tokenizer.pad_token_id in response for response in padded)
    own = trainer.model.pretrained_model.generation_config
    own._from_model_config = True
    own.output_attentions, own.output_hidden_states, own.return_dict_in_generate = False, False, False
    own.early_stopping, own.length_penalty = True, 1.0
    assert trainer.generate(queries[:2], generation_config=own, max_new_tokens=3)
    with pytest.raises(ValueError, match="num_beams=4"):
        trainer.generate(queries, generation_config=GenerationConfig(num_beams=4))


def test_stopping_criteria_end_a_response_and_an_attention_mask_is_refused():
    class AfterThree(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] >= 6)

    queries = [torch.tensor([5, 6, 7])] * 2
    responses = make().generate(queries, return_prompt=False, max_new_tokens=12, stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert max(len(response) for response in responses) <= 3
    with pytest.raises(ValueError, match="attention_mask=...\\) is made from the lengths"):
        make().generate(queries, attention_mask=torch.ones(2, 3))


# ---------------------------------------------------------------------------------------------------------------- seed


def run(trainer, steps=2):
    shown = []
    for _ in range(steps):
        queries = ragged()[0]
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=6)
        stats = trainer.step(queries, responses, [0.5, -1.0, 2.0, 0.3])
        shown.append(([r.tolist() for r in responses], stats["ppo/loss/policy"]))
    return shown


def test_without_a_seed_the_draws_come_from_the_users_generators():
    results = []
    for users_seed in (1, 1, 2):
        trl_names.set_seed(users_seed)
        results.append(run(make(seed=None, mini_batch_size=2)))
    assert results[0] == results[1] != results[2]


def test_a_seed_in_the_config_repeats_the_run_and_leaves_the_users_generators_alone():
    rows = [{"n": i} for i in range(64)]
    results = []
    for users_seed, seed in ((1, 3), (2, 3), (1, 4)):
        trl_names.set_seed(users_seed)
        trainer = make(seed=seed, mini_batch_size=2, dataset=rows, collator=list)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        shown = run(trainer)
        assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
        results.append((shown, [[row["n"] for row in batch] for batch in trainer.dataloader]))
    assert results[0] == results[1] != results[2] and results[0][1] != results[2][1]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_seeded_trainer_resumes_bit_for_bit(steps, tmp_path):
    import checkpoint
    one, twin = make(seed=3, mini_batch_size=2), make(seed=3, mini_batch_size=2)
    run(one, steps)
    trl_names.set_seed(99)          # the user's generators have no part in it
    checkpoint.save(one, tmp_path / "state")
    drawn, expected = (torch.rand(3).tolist(), np.random.rand(3).tolist()), run(one)
    checkpoint.load(twin, tmp_path / "state")
    assert drawn == (torch.rand(3).tolist(), np.random.rand(3).tolist()), "the user's own draws do not go on"
    assert run(twin) == expected


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", trl_names.TRL_METHODS)
def test_a_subclass_whose_method_nothing_would_call_is_refused(name):
    subclass = type("Mine", (PPOTrainer,), {name: lambda self, *arguments: None})
    with pytest.raises(ValueError, match=f"Mine defines {name}, which nothing would call; override ") as caught:
        make(subclass)
    suggested = str(caught.value).rsplit("override ", 1)[1].split(",")[0]
    assert hasattr(PPOTrainer, suggested)


def test_the_config_of_the_core_is_refused_at_once():
    with pytest.raises(ValueError, match="config is a ppo_core.PPOConfig; give a trl_names.PPOConfig"):
        PPOTrainer(ppo_core.PPOConfig(batch_size=4), model(), None, tokenizer())


def test_out_of_memory_is_not_called_a_wrong_keyword(monkeypatch):
    def full(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trl_names.adapters.value_head.AutoModelForCausalLM, "from_pretrained", full)
    for keywords in ({}, {"device_map": "cpu"}):
        with pytest.raises(torch.OutOfMemoryError):
            AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "models" / "gpt2", **keywords)


def test_an_unknown_keyword_is_named_and_the_third_argument_is_refused():
    with pytest.raises(ValueError, match="from_pretrained does not know the keyword 'no_such_thing'; leave it out"):
        AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "models" / "gpt2", no_such_thing=1)
    with pytest.raises(ValueError, match="device_map is {'': 0}, which this machine cannot do .*; leave device_map out"):
        AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "models" / "gpt2", device_map={"": 0})
    with pytest.raises(ValueError, match="reward_adapter is given, but a model has one adapter here; load the reward model"):
        AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "models" / "gpt2", reward_adapter="x")
    with pytest.raises(TypeError, match="NoneType"):
        AutoModelForCausalLMWithValueHead.from_pretrained(None)
    for method in (model().push_to_hub, make().push_to_hub):
        with pytest.raises(ValueError, match="push_to_hub is not there; upload what save_pretrained wrote"):
            method("me/mine")
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="attention_mask is the second one here"):
        model()(ids, None, torch.ones_like(ids))
    with pytest.raises(ValueError, match="encoder-decoder models cannot be trained"):
        trl_names.AutoModelForSeq2SeqLMWithValueHead.from_pretrained("google/flan-t5-small")
    with pytest.raises(ValueError, match="training_data_collator is given, but ppo_core.collate"):
        PPOTrainer(PPOConfig(batch_size=4), model(), None, tokenizer(), None, None, None, None, None, lambda rows: rows)


def test_log_stats_logs_numbers_of_any_type_and_distributions(monkeypatch):
    trainer = make()
    stats = {**trainer.step(*ragged()), "mine/float32": np.float32(0.5), "mine/tensor": torch.tensor(0.25, dtype=torch.bfloat16)}
    logged = {}
    trainer.config.log_with = "tensorboard"
    monkeypatch.setattr(trainer.accelerator, "log", lambda values, step: logged.update(values))
    trainer.log_stats(stats, {"query": ["a"] * 4, "response": ["b"] * 4}, torch.tensor([0.5, 1.0, 0.0, 0.5]))
    assert logged["mine/float32"] == 0.5 and logged["mine/tensor"] == 0.25 and isinstance(logged["mine/tensor"], float)
    assert logged["objective/kl_dist"].shape == (4,) and logged["env/reward_dist"].tolist() == [0.5, 1.0, 0.0, 0.5]
    assert logged["env/reward_mean"] == 0.5


def test_a_batch_may_be_tensors_and_scores_of_any_float_type():
    queries, responses = torch.randint(5, 90, (4, 6)), torch.randint(5, 90, (4, 3))
    scores = [torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.float64), torch.tensor(2), 0.5]
    results = []
    for given in ((queries, responses), (list(queries), list(responses))):
        np.random.seed(0)
        trainer = make()
        trainer.step(*given, scores)
        results.append(weights(trainer))
    assert distance(*results) == 0


def test_a_model_card_names_the_settings(tmp_path):
    make(task_name="sentiment").create_model_card(tmp_path / "card", model_name="My model")
    text = (tmp_path / "card" / "README.md").read_text()
    assert text.startswith("# My model\n") and "- task_name: sentiment" in text


def test_the_fields_of_the_core_keep_their_defaults():
    """trl_names adds fields; it takes none away and changes no default but two names."""
    for field in dataclasses.fields(ppo_core.PPOConfig):
        if field.name not in ("reward_model", "tracker_project_name"):
            assert getattr(PPOConfig(), field.name) == getattr(ppo_core.PPOConfig(), field.name), field.name
    json.dumps({name: value for name, value in PPOConfig().to_dict().items()})


def test_the_page_lists_every_field_of_the_config():
    from pathlib import Path
    page = (Path(__file__).resolve().parent.parent / "docs" / "migrating.md").read_text(encoding="utf-8")
    table = page[page.index("## Every field"):page.index("## What is not there")]
    for field in dataclasses.fields(PPOConfig):
        assert f"`{field.name}`" in table, field.name
