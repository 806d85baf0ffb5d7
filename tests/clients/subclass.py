"""A subclass that overrides generate and step."""
import sys

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


class CountingTrainer(PPOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens = 0

    def generate(self, query_tensor, **kwargs):
        responses = super().generate(query_tensor, **{"do_sample": True, "return_prompt": False, **kwargs})
        self.tokens += sum(len(r) for r in responses)
        return responses

    def step(self, queries, responses, scores, response_masks=None):
        stats = super().step(queries, responses, [score - 0.5 for score in scores], response_masks)
        stats["tokens/so_far"] = self.tokens
        return stats


tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1])
trainer = CountingTrainer(PPOConfig(batch_size=4, mini_batch_size=4, forward_batch_size=2), model, None, tokenizer)
for _ in range(2):
    queries = [torch.tensor([5, 6, 7 + i]) for i in range(4)]
    responses = trainer.generate(queries, max_new_tokens=5)
    stats = trainer.step(queries, responses, [torch.tensor(1.0, dtype=torch.float16)] * 4)
assert stats["tokens/so_far"] > 4 and trainer.config.mini_batch_size == 2
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
