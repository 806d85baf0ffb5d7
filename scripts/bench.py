"""The README's measured tables, printed as Markdown.

    python scripts/bench.py features                      # what each feature costs and gives on the default run: make features
    python scripts/bench.py features --only lion shared   # some rows
    python scripts/bench.py sharing                       # what running the shared layers once saves: make sharing
    python scripts/bench.py stages                        # 1 process, DDP and ZeRO's stages on 2 CPU processes: make stages

features: each row is scripts/train.py with a few flags, in a process of its own with one thread, so that a row's seconds are its
own and a busy second core disturbs them little. Two rows run side by side. The table and the runs are left in runs/features/.
stages: the same responses per step on 1 and on 2 processes, one thread each; memory is that of the process that needed most. On one
machine without a GPU this shows what each way costs and holds, not how it scales.
sharing: step() of a random model of SmolLM2-135M's shape; the ways take turns, and the median of the rounds counts.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# name: (what the README calls it, flags). SGD moves by lr x gradient, so it needs another learning rate altogether.
ROWS = {
    "seed0": ("default: Adam, seed 0", "--seed 0"),
    "seed1": ("default, seed 1", "--seed 1"),
    "seed2": ("default, seed 2", "--seed 2"),
    "sgd": ("SGD, learning rate 0.1", "--optimizer sgd --learning_rate 0.1"),
    "adam8bit": ("8-bit Adam", "--optimizer adam8bit"),
    "lion": ("Lion", "--optimizer lion"),
    "scheduler": ("exponential schedule, 10 steps of warm-up", "--lr_scheduler exponential --warmup_steps 10"),
    "shared": ("2 of 4 layers shared", "--num_shared_layers 2"),
    "reference8": ("8-bit reference", "--reference_bits 8"),
    "reference4": ("4-bit reference", "--reference_bits 4"),
    "cache": ("device cache cleared", "--optimize_cuda_cache True"),
    "scores": ("scores scaled, normalised, clipped", "--use_score_scaling --use_score_norm --score_clip 0.5"),
}


def run(command, folder):
    """scripts/train.py, one thread per process. -> (summary.json, median seconds of a step), or the last line of what went wrong."""
    done = subprocess.run([*command, "--output_dir", str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1], None
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    seconds = statistics.median(row["time/rollout"] + row["time/score"] + row["time/ppo/total"] for row in rows)
    return json.loads((folder / "summary.json").read_text()), seconds


def measure(name, steps, folder):
    """Run one row of the feature table. -> its line."""
    title, flags = ROWS[name]
    summary, seconds = run([sys.executable, str(ROOT / "scripts" / "train.py"), *flags.split(), "--steps", str(steps)], folder / name)
    if seconds is None:
        return f"| {title} | failed: {summary} | | | | | |"
    return (f"| {title} | {summary['score before']:.3f} → {summary['score after']:.3f} | {summary['distinct_bigrams before']:.2f} → "
            f"{summary['distinct_bigrams after']:.2f} | {summary['kl']:.1f} | {seconds:.2f} | {summary['peak memory bytes'] / 1e6:.0f} MB | "
            f"{summary['optimizer state bytes'] / 1e6:.1f} MB |")


def features(arguments):
    with ThreadPoolExecutor(max_workers=2) as pool:
        lines = ["| feature | mean score on held-out prompts | distinct bigrams | KL, nats | s per step | peak memory | optimizer state |",
                 "|---|---|---|---|---|---|---|"]
        print("\n".join(lines), flush=True)
        for line in pool.map(lambda name: measure(name, arguments.steps, arguments.output_dir), arguments.only):
            lines.append(line)
            print(line, flush=True)
    (arguments.output_dir / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


WAYS = {"1 process": None, "DDP": "multi_cpu", "ZeRO-1": "deepspeed_zero1", "ZeRO-2": "deepspeed_zero2", "ZeRO-3": "deepspeed_zero3",
        "ZeRO-3 offload": "deepspeed_zero3_offload"}


def stages(arguments):
    """Seconds per step and peak memory of each way to run, on the default model and on SmolLM2-135M's shape with random weights."""
    from transformers import AutoTokenizer
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "2", "--main_process_port", "0"]
    configs = ROOT / "scripts" / "accelerate_configs"
    with tempfile.TemporaryDirectory() as temporary:
        shape = Path(temporary) / "smollm2-shape"
        smollm2_shape(layers=30).save_pretrained(shape)
        AutoTokenizer.from_pretrained(ROOT / "assets" / "review-lm").save_pretrained(shape)
        models = {"default, 64 responses": ("64 32", []),
                  "SmolLM2-135M's shape, 8 responses": ("8 4", ["--model_name", str(shape), "--max_new_tokens", "16"])}
        print("| model | " + " | ".join(WAYS) + " |\n" + "|---" * (len(WAYS) + 1) + "|")
        for model in arguments.only or models:
            sizes, flags = models[model]
            cells = []
            for number, config in enumerate(WAYS.values()):
                script = [str(ROOT / "scripts" / "train.py"), *flags, "--steps", str(arguments.steps), "--eval_prompts", "4", "--save_every", "0",
                          "--batch_size", sizes.split()[config is not None]]
                start = [sys.executable] if config is None else [*launch, "--config_file", str(configs / f"{config}.yaml")]
                summary, seconds = run([*start, *script], Path(temporary) / f"{len(model)}-{number}")
                cells.append(f"failed: {summary}" if seconds is None else f"{seconds:.1f} s, {summary['peak memory bytes'] / 1e9:.2f} GB")
            print(f"| {model} | " + " | ".join(cells) + " |", flush=True)


def sharing(arguments):
    """Seconds of step() with 0, half and 80 % of the layers shared, computed every time and computed once."""
    import logging

    import torch
    sys.path.insert(0, str(ROOT))
    import distributed
    logging.disable(logging.WARNING)        # the responses are random, not sampled, and a step says so: their KL is negative
    from reference import shared_bytes
    accelerator, layers = distributed.start(), arguments.layers
    ways = [(0, False)] + [(count, once) for count in (layers // 2, layers * 4 // 5) for once in (False, True)]
    trainers = [sharing_trainer(accelerator, layers, count, once) for count, once in ways]
    generator = torch.Generator().manual_seed(0)
    queries = list(torch.randint(10, 4000, (8, 8), generator=generator))
    responses = list(torch.randint(10, 4000, (8, 16), generator=generator))
    seconds = [[] for _ in ways]
    for _ in range(arguments.rounds + 1):
        for trainer, times in zip(trainers, seconds):
            times.append(trainer.step(queries, responses, [0.0, 1.0] * 4)["time/ppo/total"])
    medians = [statistics.median(times[1:]) for times in seconds]       # the first round warms up
    print("| layers shared | their pass | s per step | time against nothing shared | saved on weights |\n|---|---|---|---|---|")
    for (count, once), trainer, median in zip(ways, trainers, medians):
        saved = shared_bytes(trainer.model, trainer.ref_model) / 1e6
        how = "once per batch" if once else "every time" if count else "-"
        print(f"| {count} of {layers} | {how} | {median:.2f} | {median / medians[0]:.2f} | {saved:.0f} MB |")


def sharing_trainer(accelerator, layers, count, once):
    """A trainer on SmolLM2-135M's shape with random weights, `layers` deep. once=False: the shared layers run every time."""
    from transformers import AutoTokenizer
    from ppo_core import PPOConfig, PPOTrainer
    from value_head import AutoModelForCausalLMWithValueHead
    model = AutoModelForCausalLMWithValueHead.from_pretrained(smollm2_shape(layers))
    trainer = PPOTrainer(PPOConfig(batch_size=8, mini_batch_size=4), model, None, num_shared_layers=count or None,
                         tokenizer=AutoTokenizer.from_pretrained(ROOT / "assets" / "review-lm"), accelerator=accelerator)
    if not once:
        trainer.trunk.blocks = []
    return trainer


def smollm2_shape(layers):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
                                        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=0,
                                        eos_token_id=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", required=True)
    rows = tables.add_parser("features")
    rows.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows to run; default: all")
    rows.add_argument("--steps", type=int, default=70, help="PPO steps per row")
    rows.add_argument("--output_dir", type=Path, default=Path("runs/features"), help="folder for the runs and table.md")
    share = tables.add_parser("sharing")
    share.add_argument("--rounds", type=int, default=5, help="measured steps of each way")
    share.add_argument("--layers", type=int, default=30, help="depth of the model")
    ways = tables.add_parser("stages")
    ways.add_argument("--steps", type=int, default=5, help="PPO steps of each way")
    ways.add_argument("--only", nargs="+", help="models; default: all")
    arguments = parser.parse_args()
    {"features": features, "sharing": sharing, "stages": stages}[arguments.table](arguments)


if __name__ == "__main__":
    main()
