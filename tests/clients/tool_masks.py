"""A tool answers in the middle of a response; its tokens are masked."""
import sys

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1])
trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=2, ratio_threshold=10.0), model, None, tokenizer)
queries = [torch.tensor([5, 6, 7 + i]) for i in range(4)]
for _ in range(2):
    responses, masks = [], []
    calls = trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=4)
    for query, call in zip(queries, calls):
        answer = torch.tensor([40, 41, 42, 43, 44])
        rest = trainer.generate(torch.cat([query, call, answer]), return_prompt=False, do_sample=True, max_new_tokens=4)[0]
        responses.append(torch.cat([call, answer, rest]))
        masks.append(torch.cat([torch.ones_like(call), torch.zeros_like(answer), torch.ones_like(rest)]))
    stats = trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(0.0)] * 2, masks)
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
