"""What each feature costs and gives on the default run: one row of the README's table per feature.

    python scripts/bench.py                      # every row, in full: make features
    python scripts/bench.py --only lion shared   # some rows
    python scripts/bench.py --steps 2            # a quick look

Each row is scripts/train.py with a few flags, in a process of its own with one thread, so that a row's seconds are its own and
a busy second core disturbs them little. Two rows run side by side. The table is printed as Markdown and left, with each
run, in runs/features/.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
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


def measure(name, steps, folder):
    """Run one row. -> its line of the table."""
    title, flags = ROWS[name]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *flags.split(), "--steps", str(steps), "--output_dir", str(folder / name)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        return f"| {title} | failed: {done.stderr.strip().splitlines()[-1]} | | | | | |"
    summary = json.loads((folder / name / "summary.json").read_text())
    rows = [json.loads(line) for line in open(folder / name / "metrics.jsonl", encoding="utf-8")]
    seconds = statistics.median(row["time/rollout"] + row["time/score"] + row["time/ppo/total"] for row in rows)
    return (f"| {title} | {summary['score before']:.3f} → {summary['score after']:.3f} | {summary['distinct_bigrams before']:.2f} → "
            f"{summary['distinct_bigrams after']:.2f} | {summary['kl']:.1f} | {seconds:.2f} | {summary['peak memory bytes'] / 1e6:.0f} MB | "
            f"{summary['optimizer state bytes'] / 1e6:.1f} MB |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows to run; default: all")
    parser.add_argument("--steps", type=int, default=100, help="PPO steps per row")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/features"), help="folder for the runs and table.md")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(max_workers=2) as pool:
        lines = ["| feature | mean score on held-out prompts | distinct bigrams | KL, nats | s per step | peak memory | optimizer state |",
                 "|---|---|---|---|---|---|---|"]
        print("\n".join(lines), flush=True)
        for line in pool.map(lambda name: measure(name, arguments.steps, arguments.output_dir), arguments.only):
            lines.append(line)
            print(line, flush=True)
    (arguments.output_dir / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
