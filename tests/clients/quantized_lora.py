"""A base in 8 bits under adapters, then the saved adapters loaded again."""
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

name = sys.argv[1].replace("gpt2", "llama")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
base = AutoModelForCausalLM.from_pretrained(name, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
model = AutoModelForCausalLMWithValueHead.from_pretrained(get_peft_model(base, lora))
trainer = PPOTrainer(PPOConfig(batch_size=2, mini_batch_size=1, gradient_accumulation_steps=2), model, tokenizer=tokenizer)
for _ in range(2):
    queries = [torch.tensor([5, 6, 7 + i]) for i in range(2)]
    responses = trainer.generate(queries, return_prompt=False, do_sample=True, max_new_tokens=5)
    stats = trainer.step(queries, responses, [torch.tensor(1.0), torch.tensor(-1.0)])
model.save_pretrained(sys.argv[3])
assert isinstance(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), sys.argv[3]), PeftModel)
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
