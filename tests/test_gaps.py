"""Tokens that the policy did not choose, in the middle of a response: every number is that of the response without them."""
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ppo_core import PPOConfig, PPOTrainer, gae
from rewards import token_rewards
from speed import FastPPOTrainer
from test_ppo_core import GOLDEN, distance, weights
from value_head import AutoModelForCausalLMWithValueHead

CHOSEN = 24             # tokens that the policy chose, in each row


def gae_of_row(rewards, values, gamma, lam):
    """Equation 11 for one response (R,) of which every token counts."""
    advantages, advantage = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        next_value = values[t + 1] if t + 1 < len(rewards) else 0.0
        advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * advantage
        advantages[t] = advantage
    return advantages


def masks_with_gaps(gaps):
    """gaps: list of (place among the chosen tokens, length) -> mask (R,)."""
    mask = []
    for place in range(CHOSEN + 1):
        mask += [0] * sum(length for at, length in gaps if at == place)
        mask += [1] * (place < CHOSEN)
    return torch.tensor(mask)


ONE = [[(place, length)] for place in range(CHOSEN + 1) for length in (1, 5, 20, 50)]
SEVERAL = [[(3, 1), (4, 20)], [(0, 5), (7, 50), (23, 1)], [(1, 1), (2, 1), (3, 1)], [(0, 20), (12, 5), (24, 50)]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.99, 1.0)])
def test_advantages_are_those_of_the_response_with_the_gap_removed(gamma, lam):
    generator = torch.Generator().manual_seed(0)
    rows = [masks_with_gaps(gaps) for gaps in ONE + SEVERAL]
    mask = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    rewards, values = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, row in enumerate(mask.bool()):
        expected = gae_of_row(rewards[i, row], values[i, row], gamma, lam)
        assert (advantages[i, row] - expected).abs().max() < 1e-12
        assert (returns[i, row] - expected - values[i, row]).abs().max() < 1e-12
    assert (advantages * (1 - mask)).abs().max() == 0 and (returns * (1 - mask)).abs().max() == 0


def test_the_score_stands_at_the_last_chosen_token():
    mask = torch.stack([masks_with_gaps([(3, 5)]), masks_with_gaps([(24, 5)])])
    rewards, _ = token_rewards(torch.tensor([1.0, 2.0]), torch.zeros(mask.shape), mask, kl_coef=0.1)
    assert rewards[0].nonzero().tolist() == [[28]] and rewards[1].nonzero().tolist() == [[23]]


def bigram():
    """GPT-2 without layers and positions: logits and value depend on the last token alone."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=100, n_embd=32, n_layer=0, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0)
    language_model = GPT2LMHeadModel(shape)
    torch.nn.init.zeros_(language_model.transformer.wpe.weight).requires_grad_(False)
    torch.nn.init.normal_(language_model.transformer.wte.weight, std=0.3)
    return AutoModelForCausalLMWithValueHead(language_model)


def batch(with_gaps):
    """The last token of each gap is the token before it, so that a bigram model goes on as if there was none."""
    generator = torch.Generator().manual_seed(1)
    queries, responses, masks = [], [], []
    for gaps in ([(3, 5)], [(0, 1), (7, 20)], [], [(1, 50), (6, 1)]):
        query, chosen = torch.randint(5, 90, (4,), generator=generator), torch.randint(5, 90, (9,), generator=generator)
        response, mask = [], []
        for place in range(len(chosen)):
            before = int(chosen[place - 1] if place else query[-1])
            for length in [length for at, length in gaps if at == place and with_gaps]:
                response += torch.randint(5, 90, (length - 1,), generator=torch.Generator().manual_seed(2)).tolist() + [before]
                mask += [0] * length
            response.append(int(chosen[place]))
            mask.append(1)
        queries.append(query)
        responses.append(torch.tensor(response))
        masks.append(torch.tensor(mask))
    return queries, responses, [0.5, -1.0, 2.0, 0.3], masks


@pytest.mark.parametrize("trainer_class", [PPOTrainer, FastPPOTrainer])
@pytest.mark.parametrize("settings", [{}, {"whiten_rewards": True}, {"kl_penalty": "full"}, {"mini_batch_size": 2}])
def test_a_step_is_that_of_the_responses_with_the_gaps_removed(trainer_class, settings):
    results = []
    for with_gaps in (True, False):
        model = bigram()
        config = PPOConfig(**{"batch_size": 4, "ppo_epochs": 2, **settings})
        trainer = trainer_class(config, model, None, AutoTokenizer.from_pretrained(GOLDEN / "tokenizer"),
                                optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05))
        np.random.seed(0)
        queries, responses, scores, masks = batch(with_gaps)
        stats = [trainer.step(queries, responses, scores, masks) for _ in range(2)][-1]
        results.append((weights(trainer), stats))
    (one, gap_stats), (other, plain_stats) = results
    assert distance(bigram().state_dict(), other) > 1e-3 and distance(one, other) < 2e-6
    for name, value in plain_stats.items():
        if isinstance(value, float) and not name.startswith(("time/", "tokens/")):
            assert gap_stats[name] == pytest.approx(value, abs=2e-5), name
