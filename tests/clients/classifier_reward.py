"""A sentiment classifier of transformers as the reward, texts in batches."""
import sys

import torch
from transformers import AutoTokenizer, pipeline
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

assets = sys.argv[4]
config = PPOConfig(model_name=f"{assets}/review-lm", query_dataset="reviews", learning_rate=1.41e-5, batch_size=4, mini_batch_size=2, ppo_epochs=1)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ppo_trainer = PPOTrainer(config, model, create_reference_model(model), tokenizer)
device = ppo_trainer.accelerator.device
judge = pipeline("text-classification", model=f"{assets}/review-sentiment", top_k=None, device=device)
generation = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id, "max_new_tokens": 8}
for step in range(2):
    texts = ["the movie is", "a film that", "this is", "an actor who"]
    queries = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    responses = ppo_trainer.generate(queries, return_prompt=False, batch_size=4, **generation)
    answers = [tokenizer.decode(r) for r in responses]
    scores = [{row["label"]: row["score"] for row in rows} for rows in judge([q + a for q, a in zip(texts, answers)])]
    rewards = [torch.tensor(score["POSITIVE"]) for score in scores]
    stats = ppo_trainer.step(queries, responses, rewards)
    ppo_trainer.log_stats(stats, {"query": texts, "response": answers}, rewards, columns_to_log=["query", "response"])
print("RESULT", stats["objective/kl"], stats["ppo/mean_scores"])
