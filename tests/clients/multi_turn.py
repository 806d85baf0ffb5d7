"""Two turns of a user in one response, batches as tensors, a reward per conversation."""
import sys

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1])
trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=2), model, None, tokenizer)
user = torch.tensor([50, 51])
for _ in range(2):
    queries = [torch.tensor([5, 6, 7 + i]) for i in range(4)]
    talks, masks = [torch.tensor([], dtype=torch.long)] * 4, [torch.tensor([], dtype=torch.long)] * 4
    for turn in range(3):
        contexts = [torch.cat([q, t]) for q, t in zip(queries, talks)]
        answers = trainer.generate(contexts, return_prompt=False, batch_size=2, do_sample=True, max_new_tokens=4)
        talks = [torch.cat([t, a, user] if turn < 2 else [t, a]) for t, a in zip(talks, answers)]
        masks = [torch.cat([m, torch.ones_like(a), torch.zeros_like(user)] if turn < 2 else [m, torch.ones_like(a)])
                 for m, a in zip(masks, answers)]
    stats = trainer.step(queries, talks, [torch.tensor(float(i)) for i in range(4)], response_masks=masks)
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
