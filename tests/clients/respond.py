"""The quick start of old: respond_to_batch."""
import sys

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from trl.core import respond_to_batch

model = AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1])
model_ref = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
ppo_config = PPOConfig(batch_size=1, mini_batch_size=1)
query_tensor = torch.tensor([[5, 6, 7]])
response_tensor = respond_to_batch(model, query_tensor)
ppo_trainer = PPOTrainer(ppo_config, model, model_ref, tokenizer)
reward = [torch.tensor(1.0)]
stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], reward)
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
