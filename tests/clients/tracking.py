"""tensorboard, with the folder given through project_kwargs."""
import sys

import torch
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
model = AutoModelForCausalLMWithValueHead.from_pretrained(sys.argv[1])
config = PPOConfig(batch_size=4, log_with="tensorboard", project_kwargs={"logging_dir": sys.argv[3]}, tracker_project_name="mine",
                   accelerator_kwargs={"step_scheduler_with_optimizer": False}, compare_steps=1, world_size=None)
trainer = PPOTrainer(config=config, model=model, tokenizer=tokenizer)
for _ in range(2):
    queries = [torch.tensor([5, 6, 7 + i]).to(trainer.current_device) for i in range(4)]
    responses, ref_responses = trainer.generate(queries, return_prompt=False, generate_ref_response=True, do_sample=True, max_new_tokens=5)
    rewards = [torch.tensor(float(len(r))) for r in responses]
    stats = trainer.step(queries, responses, rewards)
    batch = {"query": ["q"] * 4, "response": tokenizer.batch_decode(responses), "ref_response": tokenizer.batch_decode(ref_responses)}
    trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response", "ref_response"])
trainer.accelerator.end_training()
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
