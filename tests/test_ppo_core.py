"""ppo_core.py: the maths against independent formulas, and the trainer against what goes wrong elsewhere.

The models are tiny but real (GPT-2 with learned positions, Llama with rotary ones), in float32 on the CPU, so an equality
that holds in exact arithmetic must hold here to a few units of the last digit.
"""
import copy
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import checkpoint
import distributed
from optim import make_optimizer, make_schedule, trainable_parameters
from ppo_core import (LengthSampler, PPOConfig, PPOTrainer, collate, disable_dropout, entropy_from_logits, gae, logprobs_from_logits,
                      masked_mean, masked_var, masked_whiten, policy_loss, sampling_arguments, value_loss)
from reference import create_reference_model
from value_head import AutoModelForCausalLMWithValueHead

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


def tiny(family="gpt2"):
    return AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "models" / family)


def config(**kwargs):
    return PPOConfig(**{"batch_size": 4, "ppo_epochs": 2, "adap_kl_ctrl": False, **kwargs})


def sgd(model, lr=0.05):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def ragged(lengths=(1, 7, 3, 5), query_lengths=(2, 6, 3, 4), seed=0):
    """Queries, responses and scores of different lengths; token 0 and 1 are left to EOS and padding."""
    g = torch.Generator().manual_seed(seed)
    queries = [torch.randint(5, 90, (n,), generator=g) for n in query_lengths[:len(lengths)]]
    responses = [torch.randint(5, 90, (n,), generator=g) for n in lengths]
    return queries, responses, torch.randn(len(lengths), generator=g).tolist()


def make(family="gpt2", optimizer=sgd, trainer_class=PPOTrainer, **kwargs):
    model = tiny(family)
    return trainer_class(config(**kwargs), model, None, tokenizer(), optimizer=optimizer(model))


def weights(trainer):
    return {k: v.clone() for k, v in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}


def distance(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a)


# ------------------------------------------------------------------------------------------------------- settings


def test_batch_size_alone_is_a_valid_config():
    assert PPOConfig(batch_size=30).mini_batch_size == 30
    assert PPOConfig().mini_batch_size == 128


def test_batches_that_do_not_divide_are_refused_with_the_numbers_and_a_remedy():
    with pytest.raises(ValueError, match=r"batch_size \(30\) must be a multiple of mini_batch_size \(8\) x "
                                         r"gradient_accumulation_steps \(1\); try 32"):
        PPOConfig(batch_size=30, mini_batch_size=8)


@pytest.mark.parametrize("kwargs, words", [
    (dict(batch_size=0), "batch_size is 0"), (dict(temperature=0.0), "temperature is 0.0"),
    (dict(score_clip=-0.5), "score_clip is -0.5"), (dict(use_score_norm=True), "turn both on"),
    (dict(kl_penalty="k9"), "'k9'"), (dict(optimize_device_cache=True, optimize_cuda_cache=False), "give one"),
    (dict(optimize_device_cache=False, optimize_cuda_cache=True), "give one")])
def test_settings_that_cannot_work_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        PPOConfig(**kwargs)


def test_the_older_name_of_the_cache_flag_works():
    assert PPOConfig(optimize_cuda_cache=True).optimize_device_cache is True
    assert PPOConfig().optimize_device_cache is PPOConfig(optimize_cuda_cache=False).optimize_device_cache is False


# -------------------------------------------------------------------------------------------------- pure functions


def two_processes(one, other):
    """A `reduce` as process 0 of 2 sees it, for functions that reduce the same quantities in the same order on both."""
    queue = []

    def record(tensor):
        queue.append(tensor)
        return tensor
    other(record)
    return one(lambda tensor: tensor + queue.pop(0))


def test_masked_statistics_equal_numpys():
    x, mask = torch.randn(4, 7) * 3 + 2, (torch.rand(4, 7) < 0.6).long()
    chosen = x[mask.bool()].numpy().astype(np.float64)
    assert float(masked_mean(x, mask)) == pytest.approx(chosen.mean(), rel=1e-6)
    assert float(masked_var(x, mask)) == pytest.approx(chosen.var(ddof=1), rel=1e-5)
    white = masked_whiten(x, mask)[mask.bool()]
    assert float(white.mean()) == pytest.approx(0, abs=1e-6) and float(white.var()) == pytest.approx(1, rel=1e-5)
    assert float(masked_whiten(x, mask, shift_mean=False)[mask.bool()].mean()) == pytest.approx(chosen.mean(), rel=1e-5)


def test_bf16_autocast_keeps_the_reference_the_same_model():
    """Policy and reference in the same precision: before any update their KL is 0, also under autocast."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        model = tiny()
        trainer = PPOTrainer(config(), model, None, tokenizer(), optimizer=sgd(model),
                             accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
        stats = trainer.step(*ragged())
        assert float(stats["objective/kl_dist"].abs().max()) < 1e-5
        assert stats["objective/logprobs"].dtype == torch.float32
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)


def test_whitening_of_an_empty_a_one_token_and_a_constant_batch_is_finite():
    for mask in (torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.ones(2, 3)):
        assert torch.isfinite(masked_whiten(torch.full((2, 3), 5.0), mask)).all()


def test_global_mean_is_the_mean_over_all_processes_tokens():
    # The mean of the two processes' means would weigh process 0's single token as much as process 1's twelve.
    a, mask_a = torch.randn(2, 6), torch.zeros(2, 6)
    mask_a[0, 0] = 1
    b, mask_b = torch.randn(2, 6) + 5, torch.ones(2, 6)
    mean = two_processes(lambda r: masked_mean(a, mask_a, r), lambda r: masked_mean(b, mask_b, r))
    together = masked_mean(torch.cat([a, b]), torch.cat([mask_a, mask_b]))
    assert float(mean) == pytest.approx(float(together), rel=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_discounted_sum_of_temporal_differences(gamma, lam):
    lengths = (5, 1, 0, 3)
    mask = (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    rewards, values = torch.randn(4, 5), torch.randn(4, 5)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        v = [*values[i, :n].tolist(), 0.0]
        delta = [float(rewards[i, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):          # equation 16, literally: sum of (gamma lam)^l delta_{t+l}
            expected = sum((gamma * lam) ** l * delta[t + l] for l in range(n - t))
            assert float(advantages[i, t]) == pytest.approx(expected, abs=1e-5)
            assert float(returns[i, t]) == pytest.approx(expected + v[t], abs=1e-5)


def test_policy_loss_by_hand():
    ratio = torch.tensor([[1.0, 1.5, 0.5, 1.5, 0.5]])
    advantages = torch.tensor([[2.0, 1.0, 1.0, -1.0, -1.0]])
    loss, got, clipped = policy_loss(ratio.log(), torch.zeros(1, 5), advantages, cliprange=0.2)
    assert torch.allclose(got, ratio)
    # a good action's ratio counts up to 1.2, a bad one's down to 0.8; never less pessimistic than unclipped
    assert torch.allclose(loss, torch.tensor([[-2.0, -1.2, -0.5, 1.5, 0.8]]))
    assert clipped.tolist() == [[0, 1, 0, 0, 1]]


def test_value_loss_by_hand():
    new, old, returns = torch.tensor([[0.1, 1.0, 1.0]]), torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 0.5]])
    loss, clipped = value_loss(new, old, returns, cliprange_value=0.2)
    assert torch.allclose(loss, 0.5 * torch.tensor([[0.81, 1.8 ** 2, 0.25]])) and clipped.tolist() == [[0, 1, 0]]


def test_logprobs_and_entropy_equal_torchs():
    logits, labels = torch.randn(2, 5, 11) * 4, torch.randint(0, 11, (2, 5))
    d = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(logprobs_from_logits(logits, labels), d.log_prob(labels), atol=1e-5)
    assert torch.allclose(entropy_from_logits(logits), d.entropy(), atol=1e-5)


def test_a_token_that_the_model_rules_out_adds_nothing_to_the_entropy():
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    ruled_out = logits.index_fill(-1, torch.tensor([2, 7]), -torch.inf)
    entropy = entropy_from_logits(ruled_out)
    left = torch.cat([logits[..., :2], logits[..., 3:7], logits[..., 8:]], -1)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=left).entropy(), rtol=1e-12, atol=1e-12)
    expected, = torch.autograd.grad(entropy_from_logits(left).sum(), logits)
    torch.testing.assert_close(torch.autograd.grad(entropy.sum(), logits)[0], expected, rtol=1e-9, atol=1e-12)


def test_the_mask_comes_from_lengths_so_tokens_that_look_like_padding_count():
    queries, responses = [torch.tensor([7, 1, 8])], [torch.tensor([1, 0, 1, 0])]
    for pad in (0, 1):
        batch = collate(queries + [torch.tensor([5])], responses + [torch.tensor([6])], None, pad_token_id=pad)
        assert batch["mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
        assert batch["labels"][0].tolist() == [1, 0, 1, 0] and batch["positions"][0].tolist() == [2, 3, 4, 5]
        assert batch["attention_mask"].tolist() == [[1] * 7, [1, 1] + [0] * 5]


def test_length_sampler_draws_from_its_range_and_refuses_an_empty_one():
    assert {LengthSampler(2, 5)() for _ in range(100)} == {2, 3, 4}
    with pytest.raises(ValueError, match="LengthSampler"):
        LengthSampler(5, 5)


# ---------------------------------------------------------------------------------- the trained is the sampled policy


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_and_values_equal_one_unpadded_row_at_a_time(family, temperature):
    trainer = make(family, temperature=temperature)
    queries, responses, _ = ragged()
    logprobs, values, ref_logprobs, _ = trainer.record(collate(queries, responses, None, 1))
    assert torch.equal(logprobs, ref_logprobs)
    for i, (q, r) in enumerate(zip(queries, responses)):
        with torch.no_grad():
            logits, _, v = trainer.model(torch.cat([q, r])[None])
        logp = (logits / temperature).log_softmax(-1)[0]
        for t in range(len(r)):
            assert float(logprobs[i, t]) == pytest.approx(float(logp[len(q) - 1 + t, r[t]]), abs=2e-5)
            assert float(values[i, t]) == pytest.approx(float(v[0, len(q) - 1 + t]), abs=2e-5)
        assert not logprobs[i, len(r):].any() and not values[i, len(r):].any()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_before_any_update_the_ratio_is_1_and_the_kl_is_0(family):
    trainer = make(family, optimizer=lambda m: sgd(m, lr=0.0), mini_batch_size=2)
    stats = trainer.step(*ragged())
    assert float((stats["ppo/policy/ratio"].log()).abs().max()) < 1e-5
    assert abs(stats["objective/kl"]) < 1e-5 and float(stats["objective/kl_dist"].abs().max()) < 1e-5


def sampled_and_recomputed(trainer, seen):
    """`seen` fills with the sampler's log-probs (B, V), token by token: left-padded, against the right-padded recomputation."""
    # what many checkpoints ship, and what must not leak into the sampler
    trainer.model.pretrained_model.generation_config.update(top_k=5, top_p=0.5, repetition_penalty=1.3, temperature=0.1,
                                                            suppress_tokens=list(range(10, 90)), min_new_tokens=6)
    queries, _, _ = ragged()
    responses = trainer.generate(queries, return_prompt=False, max_new_tokens=6)
    sampler = torch.stack(seen, 1)
    assert any(int(token) >= 10 for response in responses for token in response), "the shipped settings leaked in"
    logprobs, _, _, _ = trainer.record(collate(queries, responses, None, 1))
    for i, response in enumerate(responses):
        for t, token in enumerate(response):
            assert float(logprobs[i, t]) == pytest.approx(float(sampler[i, t, token]), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_recomputed_logprobs_are_the_samplers_own(family, temperature, monkeypatch):
    trainer, seen = make(family, temperature=temperature), []
    original = trainer.model.pretrained_model.generate

    def spy(**kwargs):
        output = original(**kwargs, output_scores=True, return_dict_in_generate=True)
        seen.extend(score.log_softmax(-1) for score in output.scores)
        return output.sequences
    monkeypatch.setattr(trainer.model.pretrained_model, "generate", spy)
    sampled_and_recomputed(trainer, seen)


def test_a_batch_without_one_response_token_is_a_step_too():
    queries, *_ = ragged()
    assert make(ppo_epochs=1).step(queries, [query[:0] for query in queries], [0.0] * 4)["objective/kl"] == 0


@pytest.mark.parametrize("kwargs", [dict(top_k=50), dict(top_p=0.9), dict(temperature=0.5), dict(repetition_penalty=1.2),
                                    dict(min_length=5), dict(min_new_tokens=2), dict(num_beams=4), dict(do_sample=False),
                                    dict(no_repeat_ngram_size=2), dict(some_new_sampler=0.3)])
def test_sampling_from_another_distribution_is_refused_unless_asked_for(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}.*another distribution"):
        sampling_arguments(1.0, {"max_new_tokens": 4, **kwargs})
    allowed = sampling_arguments(1.0, kwargs, allow_other_distribution=True)
    assert kwargs.items() <= allowed.items()


def test_the_usual_trl_generation_settings_are_accepted():
    trainer = make()
    kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 1, "max_new_tokens": 3}
    assert len(trainer.generate(ragged()[0], **kwargs)) == 4


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_left_padding_does_not_change_what_is_generated(family):
    trainer = make(family)
    greedy = dict(max_new_tokens=8, return_prompt=False, do_sample=False, allow_other_distribution=True)
    queries, _, _ = ragged()
    together = trainer.generate(queries, batch_size=4, **greedy)
    alone = [trainer.generate([q], **greedy)[0] for q in queries]
    assert [r.tolist() for r in together] == [r.tolist() for r in alone]


def test_a_response_ends_with_its_first_eos_and_an_eos_in_the_prompt_is_kept():
    trainer = make()
    eos = trainer.tokenizer.eos_token_id
    queries = [torch.tensor([5, eos, 7, 8])] * 64
    whole = trainer.generate(queries, batch_size=64, max_new_tokens=40)
    ended = 0
    for sequence in whole:
        assert sequence[:4].tolist() == [5, eos, 7, 8]
        response = sequence[4:].tolist()
        assert len(response) >= 1 and eos not in response[:-1]
        ended += response[-1] == eos
    assert ended > 5 and any(len(s) == 44 for s in whole), "this test wants responses that end early and some that do not"


def test_an_eos_is_trained_on_also_when_it_is_the_padding():
    trainer = make()
    trainer.tokenizer.pad_token = trainer.tokenizer.eos_token
    eos = trainer.tokenizer.eos_token_id
    queries, responses, scores = ragged()
    responses = [torch.cat([r, torch.tensor([eos])]) for r in responses]
    stats = trainer.step(queries, responses, scores)
    assert stats["ppo/policy/advantages"].shape == (sum(len(r) for r in responses),)
    assert float(stats["objective/logprobs"][0, len(responses[0]) - 1]) != 0


def test_generate_takes_and_gives_what_trl_does():
    trainer = make()
    query = torch.tensor([5, 6, 7])
    one = trainer.generate(query, max_new_tokens=4)
    assert one.shape[0] == 1 and one[0, :3].tolist() == [5, 6, 7] and 4 <= one.shape[1] <= 7
    queries, _, _ = ragged()
    np.random.seed(3)
    responses, reference_responses = trainer.generate(queries, length_sampler=LengthSampler(2, 4), batch_size=2,
                                                      return_prompt=False, generate_ref_response=True)
    assert len(responses) == len(reference_responses) == 4 and all(1 <= len(r) <= 3 for r in responses)
    with pytest.raises(ValueError, match="2 dimensions"):
        trainer.generate(torch.ones(2, 3, dtype=torch.long), max_new_tokens=4)
    for bad in ([[1, 2]], [torch.tensor([1]), torch.tensor([], dtype=torch.long)]):
        with pytest.raises(ValueError, match="at least 1 token each"):
            trainer.generate(bad, max_new_tokens=4)


def test_the_reference_response_is_the_references():
    trainer = make()
    other = tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    trainer.ref_model = other
    greedy = dict(max_new_tokens=8, return_prompt=False, do_sample=False, allow_other_distribution=True, batch_size=4)
    policy, ref = trainer.generate(ragged()[0], generate_ref_response=True, **greedy)
    trainer.model = other
    assert [r.tolist() for r in ref] == [r.tolist() for r in trainer.generate(ragged()[0], **greedy)]
    assert [r.tolist() for r in ref] != [r.tolist() for r in policy]


def test_dropout_plays_no_part():
    """A model with every dropout at 0.5 trains exactly as the same model without dropout."""
    results = []
    for rate in (0.0, 0.5):
        model = tiny()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = rate
        own_reference = create_reference_model(model).train()       # a caller may pass it in train mode
        trainer = PPOTrainer(config(), model, own_reference, tokenizer(), optimizer=sgd(model))
        np.random.seed(0)
        trainer.step(*ragged())
        results.append(weights(trainer))
    assert distance(*results) == 0


@pytest.mark.parametrize("family", ["gptj", "opt", "bloom", "llama", "gpt_neox"])
def test_disable_dropout_finds_every_familys_dropout(family):
    from transformers import AutoConfig, AutoModelForCausalLM
    rates = {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5, "attention_dropout": 0.5, "hidden_dropout": 0.5,
             "dropout": 0.5, "activation_dropout": 0.5, "layerdrop": 0.5}
    sizes = {"hidden_size": 32, "n_embd": 32, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 2, "n_head": 2,
             "rotary_dim": 8, "ffn_dim": 64, "intermediate_size": 64, "word_embed_proj_dim": 32, "vocab_size": 97,
             "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    defaults = AutoConfig.for_model(family)
    model_config = AutoConfig.for_model(family, **{k: v for k, v in {**rates, **sizes}.items() if hasattr(defaults, k)})
    model = AutoModelForCausalLM.from_config(model_config)
    ids = torch.randint(5, 90, (2, 6))
    expected = model.eval()(ids).logits
    assert not torch.equal(model.train()(ids).logits, expected), "without dropout there is nothing to find"
    disable_dropout(model)
    assert torch.allclose(model.train()(ids).logits, expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the update


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_accumulated_mini_batches_give_the_update_of_the_large_batch(family):
    results = []
    for mini, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = make(family, mini_batch_size=mini, gradient_accumulation_steps=accumulation)
        np.random.seed(0)
        stats = [trainer.step(*ragged(seed=s)) for s in range(3)]
        results.append((weights(trainer), stats[-1]))
    start = tiny(family).state_dict()
    assert distance(results[0][0], start) > 1e-3
    for got, stats in results[1:]:
        assert distance(results[0][0], got) < 1e-5
        for name in ("ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy", "ppo/returns/var", "objective/kl"):
            assert stats[name] == pytest.approx(results[0][1][name], rel=1e-4, abs=1e-5), name
    # were the loss a mean of means, this would be what accumulation gives: 4 steps of one sample each are not it
    separate = make(family, mini_batch_size=1)
    np.random.seed(0)
    for s in range(3):
        separate.step(*ragged(seed=s))
    assert distance(results[0][0], weights(separate)) > 1e-4


def test_an_update_is_the_gradient_of_the_loss_over_all_tokens():
    """One SGD step, against a loss written out token by token for unpadded rows, with autograd doing the rest."""
    trainer = make(ppo_epochs=1)
    queries, responses, scores = ragged()
    batch = collate(queries, responses, None, 1)
    batch["logprobs"], batch["values"], _, _ = trainer.record(batch)
    rewards = torch.zeros(4, 7)
    for i, r in enumerate(responses):
        rewards[i, len(r) - 1] = scores[i]
    advantages, returns = gae(rewards, batch["values"], batch["mask"], 1.0, 0.95)
    chosen = advantages[batch["mask"].bool()]
    advantages = (advantages - chosen.mean()) / (chosen.var() + 1e-8).sqrt()
    model, total = tiny(), 0.0
    for i, (q, r) in enumerate(zip(queries, responses)):
        logits, _, values = model(torch.cat([q, r])[None])
        for t, token in enumerate(r):
            logp = logits[0, len(q) - 1 + t].log_softmax(-1)[token]
            v = values[0, len(q) - 1 + t]
            total = total - (logp - logp.detach()).exp() * advantages[i, t] + 0.1 * 0.5 * (v - returns[i, t]) ** 2
    (total / 16).backward()
    np.random.seed(0)
    trainer.step(queries, responses, scores)
    after = weights(trainer)
    expected = {name: p.detach() - 0.05 * p.grad for name, p in model.named_parameters()}
    for name, value in expected.items():
        name = name.removeprefix("pretrained_model.")
        assert float((after[name] - value).abs().max()) < 2e-6, name


def test_every_gradient_norm_obeys_max_grad_norm():
    model = tiny()
    trainer = PPOTrainer(config(ppo_epochs=1, max_grad_norm=0.001), model, None, tokenizer(), optimizer=sgd(model, lr=1.0))
    for s in range(4):
        before = weights(trainer)
        stats = trainer.step(*ragged(seed=s))
        after = weights(trainer)
        after.pop("lm_head.weight")         # tied to the embedding: the same numbers twice
        moved = sum(float((after[k] - before[k]).double().square().sum()) for k in after) ** 0.5
        assert stats["ppo/grad_norm"] > 0.001, "nothing to clip"
        assert moved == pytest.approx(0.001, rel=0.02)


def test_empty_and_one_token_responses_train_and_an_empty_one_contributes_nothing():
    queries, responses, scores = ragged(lengths=(0, 1, 1, 8))
    with_empty = make()
    stats = with_empty.step(queries, responses, scores)
    assert all(np.isfinite(v) for v in stats.values() if isinstance(v, float))
    assert all(torch.isfinite(v).all() for v in weights(with_empty).values())
    without = make(batch_size=3)
    without.step(queries[1:], responses[1:], scores[1:])
    assert distance(weights(with_empty), weights(without)) < 1e-5


def test_a_batch_of_empty_responses_changes_nothing():
    queries, responses, scores = ragged(lengths=(0, 0, 0, 0))
    trainer = make()
    before = weights(trainer)
    stats = trainer.step(queries, responses, scores)
    assert distance(weights(trainer), before) == 0 and stats["ppo/skipped_steps"] == stats["ppo/optimizer_steps"]


def test_a_skipped_step_changes_no_parameter_and_no_optimizer_state():
    trainer = make(optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=1e-3))
    trainer.step(*ragged())                                     # Adam now has momentum that would move the weights
    before, state = weights(trainer), copy.deepcopy(trainer.optimizer.state_dict())
    trainer.config.ratio_threshold = 0.5                        # every mean ratio is about 1
    stats = trainer.step(*ragged(seed=1))
    assert stats["ppo/skipped_steps"] == stats["ppo/optimizer_steps"] == 2
    assert distance(weights(trainer), before) == 0
    for a, b in zip(trainer.optimizer.state_dict()["state"].values(), state["state"].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_gradient_checkpointing_recomputes_and_changes_nothing(monkeypatch):
    import torch.utils.checkpoint
    results, calls = [], []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    import transformers.modeling_utils
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", torch.utils.checkpoint.checkpoint, raising=False)
    for on in (False, True):
        trainer = make(gradient_checkpointing=on)
        np.random.seed(0)
        trainer.step(*ragged())
        results.append(weights(trainer))
        assert bool(calls) == on
    assert distance(*results) < 1e-6


def test_gradient_checkpointing_works_with_shared_layers():
    results = []
    for on in (False, True):
        trainer = PPOTrainer(config(gradient_checkpointing=on), tiny(), None, tokenizer(), num_shared_layers=2)
        np.random.seed(0)
        trainer.step(*ragged())
        results.append(weights(trainer))
    assert distance(*results) < 1e-6 and distance(results[0], tiny().state_dict()) > 0


def test_early_stopping_ends_the_epochs():
    steps = {}
    for target in (1e-9, 1e9):
        model = tiny()
        trainer = PPOTrainer(config(ppo_epochs=5, early_stopping=True, target_kl=target), model, None, tokenizer(),
                             optimizer=torch.optim.Adam(model.parameters(), lr=1e-2))
        steps[target] = trainer.step(*ragged())["ppo/optimizer_steps"]
    assert steps[1e9] == 5 and steps[1e-9] < 5


def test_the_scheduler_steps_once_per_step_whatever_the_accumulation():
    for mini, accumulation in ((4, 1), (1, 2)):
        model = tiny()
        optimizer = sgd(model, lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        trainer = PPOTrainer(config(mini_batch_size=mini, gradient_accumulation_steps=accumulation), model, None, tokenizer(),
                             optimizer=optimizer, lr_scheduler=schedule)
        assert [trainer.step(*ragged())["ppo/learning_rate"] for _ in range(3)] == [0.1, 0.05, 0.025]


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "full"])
def test_every_kl_penalty_is_0_at_the_reference_and_positive_after_moving(kind):
    trainer = make(kl_penalty=kind, optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=5e-3))
    first = trainer.step(*ragged())["objective/kl"]
    later = trainer.step(*ragged())
    assert abs(first) < 1e-5
    if kind != "kl":            # one sample of the log-ratio may be negative; the others cannot
        assert float(later["objective/kl_dist"].min()) > 0
    assert later["ppo/mean_non_score_reward"] != 0


def test_whitened_rewards_of_padding_do_not_reach_the_returns():
    """Whitening without mean shift turns a reward of 0 into a small number; in padding, GAE must not carry that back."""
    returns = []
    for padding in (0, 4):
        rewards, mask = torch.zeros(4, 3 + padding), torch.zeros(4, 3 + padding)
        rewards[:, 2], mask[:, :3] = torch.tensor([1.0, 2.0, 3.0, 4.0]), 1
        white = masked_whiten(rewards, mask, shift_mean=False)
        assert float(white[0, 0]) != 0
        returns.append(gae(white, torch.zeros_like(white), mask, 1.0, 0.95)[1][:, :3])
    assert torch.allclose(*returns, atol=1e-6)


def test_the_kl_coefficient_follows_its_controller():
    trainer = make(adap_kl_ctrl=True, init_kl_coef=0.3, target=2.0, horizon=100.0)
    stats = trainer.step(*ragged())
    assert stats["objective/kl_coef"] == 0.3                    # what this step used
    assert trainer.kl_ctl.value == pytest.approx(0.3 * (1 - 0.2 * 4 / 100))     # KL 0 is clipped to -0.2 of the error


def test_a_higher_score_becomes_more_likely():
    model = tiny()
    trainer = PPOTrainer(config(init_kl_coef=0.0), model, None, tokenizer(), optimizer=torch.optim.Adam(model.parameters(), lr=3e-3))
    queries = [torch.tensor([5, 6])] * 4
    responses = [torch.tensor([t, t + 1, t + 2]) for t in (10, 20, 30, 40)]
    first = trainer.step(queries, responses, [1.0, -1.0, -1.0, -1.0])["objective/logprobs"].sum(1)
    for _ in range(4):
        last = trainer.step(queries, responses, [1.0, -1.0, -1.0, -1.0])["objective/logprobs"].sum(1)
    assert float(last[0] - first[0]) > 0.5 and all(float(last[i] - first[i]) < 0 for i in (1, 2, 3))


def test_scaling_normalising_and_clipping_reach_the_rewards_and_both_scores_are_logged():
    trainer = make(use_score_scaling=True, use_score_norm=True, score_clip=0.5)
    stream = []
    for s in range(3):
        queries, responses, scores = ragged(seed=s)
        scores = [10 * x + 3 for x in scores]
        stream += scores
        stats = trainer.step(queries, responses, scores)
        expected = np.clip((np.array(scores) - np.mean(stream)) / np.std(stream, ddof=1), -0.5, 0.5)
        assert stats["ppo/mean_scores"] == pytest.approx(expected.mean(), abs=1e-5)
        assert stats["ppo/std_scores"] == pytest.approx(expected.std(ddof=1), abs=1e-5)
        assert stats["ppo/mean_raw_scores"] == pytest.approx(np.mean(scores), abs=1e-4)


# ------------------------------------------------------------------------------------- reproducible and well behaved


def test_the_same_seed_gives_the_same_run_and_the_constructor_draws_nothing():
    runs = []
    for _ in range(2):
        distributed.seed_everything(7)
        model = tiny()
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        trainer = PPOTrainer(config(mini_batch_size=2), model, None, tokenizer())
        assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
        queries, _, scores = ragged()
        responses = trainer.generate(queries, max_new_tokens=5, return_prompt=False)
        trainer.step(queries, responses, scores)
        runs.append((weights(trainer), [r.tolist() for r in responses]))
    assert runs[0][1] == runs[1][1] and distance(runs[0][0], runs[1][0]) == 0


def test_scores_may_be_ints_floats_or_tensors():
    results = []
    for scores in ([1, 0, 2, 3], [1.0, 0.0, 2.0, 3.0], [torch.tensor(float(x)) for x in (1, 0, 2, 3)],
                   [torch.tensor([x]) for x in (1, 0, 2, 3)], torch.tensor([1, 0, 2, 3])):
        trainer = make()
        np.random.seed(0)
        trainer.step(*ragged()[:2], scores)
        results.append(weights(trainer))
    assert all(distance(results[0], other) == 0 for other in results[1:])


def test_a_tokenizer_without_a_pad_token_uses_eos_and_says_so(caplog):
    tok = tokenizer()
    tok.pad_token = None
    with caplog.at_level(logging.WARNING):
        trainer = PPOTrainer(config(), tiny(), None, tok)
    assert "no pad token" in caplog.text and tok.pad_token == tok.eos_token
    trainer.step(*ragged())


def test_the_default_optimizer_is_adam_over_what_is_trainable():
    trainer = PPOTrainer(config(learning_rate=0.123), tiny(), None, tokenizer(), num_shared_layers=2)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.Adam and optimizer.param_groups[0]["lr"] == 0.123
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == \
        {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert not all(p.requires_grad for p in trainer.model.parameters())


def test_the_device_cache_is_cleared_between_phases_only_if_asked(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "clear_device_cache", lambda device: calls.append(device))
    make().step(*ragged())
    assert not calls
    make(optimize_cuda_cache=True).step(*ragged())
    assert len(calls) == 2


def test_response_masks_leave_tokens_out():
    """Masked tokens get no gradient: changing their ids changes nothing but what follows sees; here nothing follows."""
    queries, responses, scores = ragged()
    masks = [torch.ones_like(r) for r in responses]
    masks[1][-2:] = 0
    results = []
    for replace in (False, True):
        if replace:
            responses = [r.clone() for r in responses]
            responses[1][-2:] = 50
        trainer = make()
        np.random.seed(0)
        trainer.step(queries, responses, scores, response_masks=masks)
        results.append(weights(trainer))
    assert distance(*results) < 1e-6


def test_statistics_and_saved_files_serialise(tmp_path):
    trainer = make()
    stats = trainer.step(*ragged())
    json.dumps({k: v for k, v in stats.items() if not torch.is_tensor(v)})
    trainer.save_pretrained(tmp_path / "final")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "final")
    assert distance(weights(trainer), again.state_dict()) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "final").eos_token == trainer.tokenizer.eos_token


def test_the_dataset_is_shuffled_into_batches():
    rows = [{"n": i} for i in range(10)]
    trainer = PPOTrainer(config(), tiny(), None, tokenizer(), dataset=rows, data_collator=list)
    seen = [[row["n"] for row in batch] for batch in trainer.dataloader]
    assert [len(batch) for batch in seen] == [4, 4] and len({n for b in seen for n in b}) == 8


def test_reference_copies_given_explicitly_equal_the_default_one():
    results = []
    for explicit in (True, False):
        model = tiny()
        ref = create_reference_model(model) if explicit else None
        trainer = PPOTrainer(config(), model, ref, tokenizer(), optimizer=sgd(model))
        np.random.seed(0)
        trainer.step(*ragged())
        results.append(weights(trainer))
    assert distance(*results) == 0


def test_an_accelerator_that_would_divide_every_gradient_is_refused():
    from accelerate import Accelerator
    model = tiny()
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4 and would divide"):
        PPOTrainer(config(), model, None, tokenizer(), optimizer=sgd(model), accelerator=Accelerator(cpu=True, gradient_accumulation_steps=4))


def test_gradients_of_what_is_not_trained_do_not_pile_up():
    model = tiny()
    trainer = PPOTrainer(config(ppo_epochs=4), model, None, tokenizer(), optimizer=torch.optim.SGD(model.v_head.parameters(), lr=0.0))
    norms, take_step = [], distributed.take_step
    distributed.take_step = lambda *args: (norms.append(take_step(*args)), norms[-1])[1]
    try:
        stats = trainer.step(*ragged())
    finally:
        distributed.take_step = take_step
    assert len(norms) == 4 and max(norms) == pytest.approx(min(norms), rel=1e-4)
    assert stats["ppo/grad_norm"] == pytest.approx(norms[0], rel=1e-4)          # a mean over optimizer steps, not a sum
    assert all(p.grad is None for p in model.parameters())


def test_a_tracker_needs_no_accelerator_of_ones_own(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=False)
    trainer = PPOTrainer(config(log_with="tensorboard"), tiny(), None, tokenizer())
    trainer.log_stats(trainer.step(*ragged()), {"query": list("abcd"), "response": list("efgh")}, [1.0] * 4)
    trainer.accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=False)
    assert list((tmp_path / "runs").rglob("events.out.tfevents*"))


REVIEW_LM = Path(__file__).resolve().parent.parent / "assets" / "review-lm"     # 4 bits need 64 entries to a row at least


def review_lm(bits=None):
    keywords = {} if bits is None else {"device_map": "auto", f"load_in_{bits}bit": True}
    return AutoModelForCausalLMWithValueHead.from_pretrained(REVIEW_LM, **keywords)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_reference_is_left_as_it_was_and_its_offset_is_said_once(bits, caplog):
    model, reference = review_lm(), review_lm(bits)
    ids = torch.randint(5, 90, (2, 6))
    with torch.no_grad():
        before = reference(ids, torch.ones_like(ids))[0]
    trainer = PPOTrainer(config(), model, reference, tokenizer(), optimizer=sgd(model))
    assert trainer.ref_model is reference
    with caplog.at_level(logging.WARNING):
        stats = [trainer.step(*ragged(seed=i)) for i in range(2)]
    said = [r.getMessage() for r in caplog.records if "rounded copy" in r.getMessage()]
    assert len(said) == 1 and f"{stats[0]['objective/kl']:.4f} nats" in said[0] and abs(stats[0]["objective/kl"]) > 1e-3
    with torch.no_grad():
        assert torch.equal(reference(ids, torch.ones_like(ids))[0], before)


def test_all_phases_are_timed():
    stats = make().step(*ragged())
    phases = [stats[f"time/ppo/{name}"] for name in ("forward_pass", "compute_rewards", "compute_advantages", "optimize_step",
                                                      "calc_stats")]
    assert min(phases) > 0 and sum(phases) == pytest.approx(stats["time/ppo/total"], rel=0.05)


def test_statistics_reach_tensorboard_and_wandb(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):       # as on a machine without an account: nothing is asked, nothing sent
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("tensorboard", "wandb"):
        AcceleratorState._reset_state(reset_partial_state=False)
        model = tiny()
        trainer = PPOTrainer(config(log_with=name), model, None, tokenizer(), optimizer=sgd(model),
                             accelerator=distributed.start(log_with=name, project_dir=str(tmp_path), cpu=True))
        for _ in range(2):
            stats = trainer.step(*ragged())
            trainer.log_stats(stats, {"query": list("abcd"), "response": list("efgh")}, [1.0, 2.0, 3.0, 4.0])
        if name == "wandb":
            summary = trainer.accelerator.get_tracker("wandb").run.summary
            assert summary["env/reward_mean"] == 2.5 and summary["game_log"]["nrows"] == 4
        trainer.accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=False)
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("objective/kl")] == [1, 2]
