"""An optimizer and a schedule of the script's own, a fixed KL coefficient, shared layers."""
import sys

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1])
ref_model = create_reference_model(model, num_shared_layers=1)
optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, model.parameters()), lr=0.01)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
config = PPOConfig(batch_size=4, mini_batch_size=2, adap_kl_ctrl=False, init_kl_coef=0.1, kl_penalty="full", gradient_accumulation_steps=2,
                   max_grad_norm=1.0, whiten_rewards=True, use_score_scaling=True, use_score_norm=True, score_clip=3.0)
ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, optimizer=optimizer, lr_scheduler=scheduler)
for _ in range(2):
    queries = [torch.randint(5, 90, (4,)) for _ in range(4)]
    responses = ppo_trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=5)
    stats = ppo_trainer.step(queries, responses, [torch.tensor([float(r[0] % 7)]) for r in responses])
assert abs(stats["ppo/learning_rate"] - 0.009) < 1e-9
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
