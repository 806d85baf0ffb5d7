"""lam_value, critic_warmup_steps, value_learning_rate and scores per token: off they change nothing, on they do what they say."""
import numpy as np
import pytest
import torch

from optim import trainable_parameters
from ppo_core import BadNumbers, PPOTrainer, gae
from speed import FastPPOTrainer
from test_ppo_core import config, distance, make, ragged, seeded, tiny, tokenizer, weights      # noqa: F401 (seeded: a fixture)

both = pytest.mark.parametrize("trainer_class", [PPOTrainer, FastPPOTrainer])


def test_lam_value_is_the_lambda_of_the_returns_alone():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor([6, 3, 1, 0])[:, None]).long()
    advantages, returns = gae(rewards, values, mask, 0.99, 0.9, lam_value=1.0)
    assert torch.equal(advantages, gae(rewards, values, mask, 0.99, 0.9)[0])
    for row, n in enumerate((6, 3, 1)):         # lambda 1: the discounted sum of the rewards that follow
        expected = [sum(0.99 ** (k - t) * float(rewards[row, k]) for k in range(t, n)) for t in range(n)]
        assert returns[row, :n].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(gae(rewards, values, mask, 0.99, 0.9, lam_value=0.9)[1], gae(rewards, values, mask, 0.99, 0.9)[1])


@both
def test_lam_value_in_a_step(trainer_class):
    stats = {}
    for lam_value in (None, 0.95, 1.0):
        np.random.seed(0)
        stats[lam_value] = make(trainer_class=trainer_class, lam_value=lam_value).step(*ragged())
    assert stats[None]["ppo/returns/mean"] == stats[0.95]["ppo/returns/mean"] != stats[1.0]["ppo/returns/mean"]
    assert torch.equal(stats[None]["ppo/policy/advantages"], stats[1.0]["ppo/policy/advantages"])


@both
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_in_the_warm_up_the_value_head_alone_moves(trainer_class, kind):
    model = tiny()
    optimizer = (torch.optim.SGD(model.parameters(), lr=0.05) if kind == "sgd" else torch.optim.Adam(model.parameters(), lr=1e-3))
    trainer = trainer_class(config(critic_warmup_steps=2), model, None, tokenizer(), optimizer=optimizer)
    start, errors = weights(trainer), []
    for step in range(3):
        errors.append(trainer.step(*ragged())["ppo/val/error"])
        now = weights(trainer)
        moved = {name for name in now if not torch.equal(now[name], start[name])}
        if step < 2:
            assert moved == {"v_head.summary.weight", "v_head.summary.bias"}, step
    assert len(moved) > 10 and errors[1] < errors[0]


@both
def test_the_value_head_may_have_a_learning_rate_of_its_own(trainer_class):
    model = tiny()
    trainer = trainer_class(config(learning_rate=1e-3, value_learning_rate=0.0), model, None, tokenizer())
    start = weights(trainer)
    trainer.step(*ragged())
    now = weights(trainer)
    assert torch.equal(now["v_head.summary.weight"], start["v_head.summary.weight"]) and distance(now, start) > 1e-4
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 0.0]


def test_a_value_learning_rate_that_the_given_optimizer_does_not_have_is_refused():
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"value_learning_rate is 0.5 but the optimizer that is given has learning rates \[0.1\]; give it"):
        PPOTrainer(config(value_learning_rate=0.5), model, None, tokenizer(), optimizer=optimizer)
    optimizer = torch.optim.SGD(trainable_parameters(model, 0.5), lr=0.1)
    assert PPOTrainer(config(value_learning_rate=0.5), model, None, tokenizer(), optimizer=optimizer)


@both
def test_scores_per_token_are_the_score_where_they_stand_at_the_last_token(trainer_class):
    queries, responses, scores = ragged()
    at_the_end = [torch.cat([torch.zeros(len(r) - 1), torch.tensor([score])]) for r, score in zip(responses, scores)]
    results = []
    for given in (scores, at_the_end):
        np.random.seed(0)
        trainer = make(trainer_class=trainer_class)
        stats = trainer.step(queries, responses, given)
        results.append((weights(trainer), stats["ppo/mean_scores"], stats["ppo/returns/mean"]))
    assert distance(results[0][0], results[1][0]) < 1e-6 and results[0][1:] == pytest.approx(results[1][1:], abs=1e-6)


def test_a_score_of_each_token_is_its_reward():
    queries, responses, _ = ragged()
    scores = [torch.arange(len(r), dtype=torch.float32) for r in responses]
    trainer = make(init_kl_coef=0.0, gamma=0.0, lam=0.0)       # then a return is the reward of this token alone
    stats = trainer.step(queries, responses, scores)
    assert stats["ppo/returns/mean"] == pytest.approx(float(torch.cat(scores).mean()), abs=1e-6)
    assert stats["ppo/mean_scores"] == pytest.approx(np.mean([float(s.sum()) for s in scores]), abs=1e-6)


def test_wrong_scores_per_token_are_one_sentence():
    queries, responses, scores = ragged()
    per_token = [torch.zeros(len(r)) for r in responses]
    masks = [torch.ones_like(r) for r in responses]
    masks[1][2] = 0
    rewarded = [score.clone() for score in per_token]
    rewarded[1][2] = 1.0
    for given, more, settings, sentence in (
            ([*per_token[:3], torch.zeros(9)], (), {}, r"score 3 of 4 is a tensor of shape \(9,\) and its response has 5 tokens; give one"),
            ([*per_token[:3], 0.5], (), {}, "score 3 of 4 is 0.5 and its response has 5 tokens"),
            (rewarded, (masks,), {}, "score 1 is not 0 at a token whose response_mask is 0"),
            (per_token, (), {"score_clip": 1.0}, "use_score_scaling and score_clip are made for 1 per response")):
        with pytest.raises(ValueError, match=sentence):
            make(**settings).step(queries, responses, given, *more)


def test_a_score_that_is_not_finite_at_a_chosen_token_is_named_as_one():
    queries, responses, _ = ragged()
    scores, masks = [torch.zeros(len(r)) for r in responses], [torch.ones_like(r) for r in responses]
    masks[1][2], scores[1][3] = 0, float("nan")
    with pytest.raises(BadNumbers, match="the scores of sample 1 of 4 .* are nan"):
        make().step(queries, responses, scores, masks)


def test_scores_per_token_are_logged_as_their_sum(monkeypatch):
    queries, responses, _ = ragged()
    scores, trainer, logged = [torch.ones(len(r)) for r in responses], make(), {}
    stats = trainer.step(queries, responses, scores)
    trainer.config.log_with = "tensorboard"
    monkeypatch.setattr(trainer.accelerator, "log", lambda values, step: logged.update(values))
    trainer.log_stats(stats, {"query": ["a"] * 4, "response": ["b"] * 4}, scores)
    assert logged["env/reward_mean"] == np.mean([len(r) for r in responses])


@pytest.mark.parametrize("name, value", [("lam_value", 1.5), ("critic_warmup_steps", -1), ("value_learning_rate", -0.1)])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be between 0 and"):
        config(**{name: value})
