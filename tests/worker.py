"""One rank of a test run: three steps on its share of a fixed ragged batch. Started by torch.distributed.run, or alone.

    python worker.py OUT.safetensors '{"batch_size": 4, ...}'         # writes OUT-<rank>.safetensors and OUT-<rank>.json
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distributed
from ppo_core import PPOConfig, PPOTrainer
from test_ppo_core import ragged, tiny, tokenizer

TOTAL = 8
LENGTHS, QUERIES = (1, 7, 3, 5, 0, 9, 2, 4), (2, 6, 3, 4, 5, 2, 3, 6)


def main(out, settings):
    accelerator = distributed.start(cpu=True)
    distributed.seed_everything(0)
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = PPOTrainer(PPOConfig(**settings), model, None, tokenizer(), optimizer=optimizer, lr_scheduler=schedule,
                         accelerator=accelerator)
    rank, share = accelerator.process_index, TOTAL // accelerator.num_processes
    mine = slice(rank * share, (rank + 1) * share)
    np.random.seed(rank)                                        # each rank shuffles its own share
    steps = []
    for seed in range(3):
        queries, responses, scores = ragged(LENGTHS, QUERIES, seed)
        stats = trainer.step(queries[mine], responses[mine], scores[mine])
        steps.append({k: v for k, v in stats.items() if not torch.is_tensor(v) and not k.startswith("time/")})
        steps[-1]["objective/kl_dist"] = stats["objective/kl_dist"].tolist()
    weights = accelerator.unwrap_model(trainer.model).state_dict()
    weights.pop("lm_head.weight")                               # tied to the embedding
    save_file({k: v.contiguous() for k, v in weights.items()}, f"{out}-{rank}.safetensors")
    Path(f"{out}-{rank}.json").write_text(json.dumps({"steps": steps, "kl_coef": trainer.kl_ctl.value}))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
