"""The answers of docs/reading.md, computed by the functions that its exercises point to, and found again in its text."""
import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ppo_core import PPOConfig, PPOTrainer, collate, gae, policy_loss
from rewards import AdaptiveKLController
from value_head import AutoModelForCausalLMWithValueHead

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
QUESTIONS, ANSWERS = PAGE.split("<summary>The answers</summary>")


def answer(number):
    """The paragraph of answer `number`, on one line."""
    return " ".join(re.search(rf"^{number}\. (.*?)(?=^\d\. |^</details>)", ANSWERS, re.S | re.M)[1].split())


def test_exercise_1_advantages_and_returns():
    rewards, values, mask = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5), torch.ones(1, 3)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.45125, 0.475, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[0.95125, 0.975, 1.0]]))
    assert "**0.45125, 0.475, 0.5**" in answer(1) and "**0.95125, 0.975, 1.0**" in answer(1)


@pytest.mark.parametrize("advantage, clipped_ratio", [(1.0, 1.3), (-1.0, 0.7)])
def test_exercise_2_share_that_is_clipped(advantage, clipped_ratio):
    ratios = torch.tensor([[0.7, 0.9, 1.1, 1.3]])
    new_logprobs = ratios.log().requires_grad_()
    loss, _, clipped = policy_loss(new_logprobs, torch.zeros(1, 4), torch.full((1, 4), advantage), cliprange=0.2)
    assert float(clipped.mean()) == 0.25 and float(ratios[clipped.bool()]) == pytest.approx(clipped_ratio)
    loss.sum().backward()
    assert (new_logprobs.grad == 0).equal(clipped.bool())
    assert answer(2).count("**0.25**") == 2


def test_exercise_3_column_that_scores_the_second_response_token():
    query, response = torch.tensor([11, 12, 13]), torch.tensor([21, 22, 23, 24])
    batch = collate([query], [response], None, pad_token_id=0)
    column = int(batch["positions"][0, 1])
    assert column == 3 and int(batch["labels"][0, 1]) == 22 == int(batch["input_ids"][0, column + 1])
    assert f"**Column {column}.**" in answer(3)


@pytest.mark.parametrize("kl", [12.0, 120.0])
def test_exercise_4_kl_coefficient(kl):
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10000)
    controller.update(kl, 64)
    assert controller.value == pytest.approx(0.200256, abs=1e-9)
    assert answer(4).count("**0.200256**") == 2


def test_exercise_5_smaller_mini_batches_and_more_accumulation():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "review-lm")
    torch.manual_seed(0)
    language_model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32))
    model = AutoModelForCausalLMWithValueHead(language_model)
    queries = [torch.randint(5, 50, (n,)) for n in (2, 3, 4, 5, 2, 3, 4, 5)]
    responses = [torch.randint(5, 50, (n,)) for n in (1, 7, 2, 6, 3, 5, 4, 4)]
    weights, steps = [], []
    for mini_batch_size, accumulation in ((4, 1), (2, 2)):
        config = PPOConfig(batch_size=8, mini_batch_size=mini_batch_size, gradient_accumulation_steps=accumulation,
                           ppo_epochs=2, learning_rate=0.1)
        policy = copy.deepcopy(model)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
        trainer = PPOTrainer(config, policy, None, tokenizer, optimizer=optimizer)
        np.random.seed(0)
        stats = trainer.step(queries, responses, [float(n) for n in range(8)])
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
        steps.append(stats["ppo/optimizer_steps"] / config.ppo_epochs)
    assert steps == [2, 2] and "**2** per epoch" in answer(5)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (weights[0] - before).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-5)


def test_each_exercise_points_to_a_function_that_exists():
    exercises = re.findall(r"^\*\*\d\. .*?\((.*?)\)", QUESTIONS, re.M)
    assert len(exercises) == 5
    for pointer in exercises:
        *names, file = re.findall(r"`([\w.]+)`", pointer)
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in names:
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), f"{name} is not in {file}"
