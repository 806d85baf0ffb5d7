"""A dataset with more columns than the model takes, a collator, and the trainer's data loader."""
import sys

import torch
from datasets import Dataset
from transformers import AutoTokenizer, HfArgumentParser
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

config, = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(["--model_name", sys.argv[1], "--batch_size", "4", "--mini_batch_size", "2",
                                                                   "--exp_name", "loader", "--remove_unused_columns", "True", "--seed", "3"])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
rows = Dataset.from_dict({"review": ["t5 t6 t7", "t8 t9"] * 8, "label": [0, 1] * 8})
rows = rows.map(lambda row: {"input_ids": tokenizer.convert_tokens_to_ids(row["review"].split()), "query": row["review"]})
rows.set_format(type="torch")


def collator(data):
    return {key: [row[key] for row in data] for key in data[0]}


trainer = PPOTrainer(config, AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name), None, tokenizer, dataset=rows,
                     data_collator=collator)
for epoch, batch in enumerate(trainer.dataloader):
    assert "review" not in batch and set(batch) == {"input_ids", "label", "query"}
    responses = trainer.generate(batch["input_ids"], return_prompt=False, do_sample=True, max_new_tokens=5)
    batch["response"] = tokenizer.batch_decode(responses)
    rewards = [torch.tensor(float(len(r))) for r in responses]
    stats = trainer.step(batch["input_ids"], responses, rewards)
    trainer.log_stats(stats, batch, rewards)
    if epoch == 1:
        break
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
