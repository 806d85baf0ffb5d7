"""LoRA, no second model, a reward that is a Python function."""
import sys

import torch
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler

name, tokenizer_name = sys.argv[1:3]
config = PPOConfig(model_name=name, steps=100, learning_rate=1e-3, batch_size=8, mini_batch_size=4, task_name="more-fives",
                   optimize_cuda_cache=True, log_with=None, target_kl=0.1, early_stopping=False)
set_seed(config.seed)
tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name, peft_config=lora)
trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer)
lengths = LengthSampler(3, 7)
for epoch in range(min(2, config.total_ppo_epochs)):
    queries = [torch.tensor([5, 6, 7, 8 + i]) for i in range(config.batch_size)]
    responses = []
    for query in queries:
        size = lengths()
        response = trainer.generate(query, do_sample=True, top_k=0.0, top_p=1.0, max_new_tokens=size, pad_token_id=tokenizer.pad_token_id)
        responses.append(response.squeeze()[-size:])
    rewards = [torch.tensor(float((r % 5 == 0).float().mean())) for r in responses]
    stats = trainer.step(queries, responses, rewards)
    trainer.log_stats(stats, {"query": ["q"] * 8, "response": tokenizer.batch_decode(responses)}, rewards)
trainer.save_pretrained(sys.argv[3])
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
