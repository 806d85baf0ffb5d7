"""The README's measured tables, printed as Markdown.

    python scripts/bench.py features                      # what each feature costs and gives on the default run: make features
    python scripts/bench.py features --only lion shared   # some rows
    python scripts/bench.py sharing                       # what running the shared layers once saves: make sharing
    python scripts/bench.py stages                        # 1 process, DDP and ZeRO's stages on 2 CPU processes: make stages
    python scripts/bench.py speed                         # time and memory against TRL 0.11.4, then growth: make bench
    python scripts/bench.py growth                        # time and memory against response length and batch size
    python scripts/bench.py profile                       # where a step's time goes, now and by the plain path: make profile

features: each row is scripts/train.py with a few flags, in a process of its own with one thread, so that a row's seconds are its
own and a busy second core disturbs them little. Two rows run side by side. The table and the runs are left in runs/features/.
stages: the same responses per step on 1 and on 2 processes, one thread each; memory is that of the process that needed most. On one
machine without a GPU this shows what each way costs and holds, not how it scales.
sharing: step() of a random model of SmolLM2-135M's shape; the ways take turns, and the median of the rounds counts.
speed: both libraries on the same random weights, prompts, lengths and settings, taking turns as processes of their own (one iteration
to warm up, --iterations measured, --rounds times). Figures are medians over all iterations; a ratio is one of medians, with the least
and the greatest of the rounds beside it, as a machine's speed drifts. TRL goes into a venv of its own, .peer, the first time; --no_peer
leaves it out. On the CPU, whatever else there is. Left in bench/: results.md, results.json, growth.md, growth.png.
growth: W1's model, one epoch, one thread per process, median of 3 iterations; the batch and the mini-batch of 8 are shared out over
the processes. TRL on 1 process.
profile: a workload's step(), with and without what start() does for products and memory, the fused activation, the fused Adam and
what the sampler knew.
"""
import argparse
import datetime
import json
import os
import platform
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


# ---------------------------------------------------------------------------------------------- against TRL 0.11.4

PEER = ["torch==2.13.0", "trl==0.11.4", "transformers==4.46.3", "accelerate==1.1.1", "rich"]     # trl imports rich and does not say so
# layers, weights in a layer's products, weights of lm_head
SHAPES = {"gpt2": (6, 12 * 256 ** 2, 4096 * 256), "gpt2-eos": (6, 12 * 256 ** 2, 4096 * 256),
          "smollm2": (30, 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536, 49152 * 576)}
SMALL = {"model": "gpt2", "batch_size": 64, "mini_batch_size": 16, "query": 8, "response": 24}
LARGE = {"model": "smollm2", "batch_size": 8, "mini_batch_size": 4, "query": 8, "response": 16}
# name: (what it is, its settings, times faster to reach); the memory to reach is 0.6 of the peer's
WORKLOADS = {
    "W1": ("GPT-2, 6 layers, 256 wide; batch 64, response 24", SMALL, 1.8),
    "W2": ("W1, 4 of 6 layers shared", {**SMALL, "shared": 4}, 3.0),
    "W3": ("SmolLM2-135M's shape; batch 8, response 16", LARGE, 1.7),
    "W4": ("W3, 24 of 30 layers shared", {**LARGE, "shared": 24}, 3.0),
    "W5": ("W1, plainppo in bf16", {**SMALL, "bf16": True}, 3.0),
    "W6": ("W1, sampled until EOS; step() on 4 to 48 tokens", {**SMALL, "model": "gpt2-eos", "response": 48, "ragged": True}, 2.0),
}
MEMORY_TARGET = 0.6


def worker(what, settings, python=sys.executable, launch=(), **environment):
    """scripts/bench_worker.py in a process of its own. -> what it measured."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run([*(launch or [str(python)]), str(ROOT / "scripts" / "bench_worker.py"), what, json.dumps(settings)],
                          env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench_worker.py {what} {json.dumps(settings)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peer_python():
    """-> the Python of .peer, made and filled unless its stamp names these very versions."""
    python, stamp = ROOT / ".peer" / "bin" / "python", ROOT / ".peer" / ".installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != "\n".join(PEER):
        print("installing the peer into .peer", flush=True)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ROOT / ".peer")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PEER], check=True)
        stamp.write_text("\n".join(PEER), encoding="utf-8")
    return python


def sides(name, peer=True):
    """Who takes turns on a workload. -> {side: settings}. W5's target is against the peer as it is by default, in fp32."""
    settings = WORKLOADS[name][1]
    both = {"plainppo": {**settings, "library": "ours"}}
    if peer:
        both["TRL"] = {**settings, "library": "trl", "bf16": False}
        if settings.get("bf16"):
            both["TRL in bf16"] = {**settings, "library": "trl"}
    return both


def useful_flops(settings, sampled, trained):
    """Floating-point operations that an iteration cannot do without. sampled, trained: response tokens of generate(), of step().

    A product with a weight costs 2 per weight and token forward, and 4 backward: 2 for the input's gradient, 2 for the weight's.
      generate:  2 x all layers   x (prompt and response tokens, without each response's last)  + 2 x lm_head x response tokens
      record:    2 x layers not shared x the same tokens + 2 x lm_head x response tokens, for the reference; the policy's part has just
                 been computed by generate, unless step() is given other responses (ragged): then 2 x all layers + 2 x lm_head more
      update:    epochs x (6 x layers not shared x the same tokens + 6 x lm_head x response tokens)
    With shared layers the embeddings are frozen, and with them lm_head, which is tied to them: 4 in place of 6. Left out as small:
    attention's own products, norms, the value head, the softmax. What is done more often than this is not useful.
    """
    layers, block, head = SHAPES[settings["model"]]
    shared, rows, query = settings.get("shared", 0), settings["batch_size"], settings["query"]
    own, tokens = layers - shared, rows * (query - 1) + trained
    generate = 2 * layers * block * (rows * (query - 1) + sampled) + 2 * head * sampled
    record = 2 * own * block * tokens + 2 * head * trained
    if settings.get("ragged"):
        record += 2 * layers * block * tokens + 2 * head * trained
    update = settings.get("epochs", 4) * (6 * own * block * tokens + (4 if shared else 6) * head * trained)
    return generate + record + update


def speed(arguments):
    """Every workload by both libraries in turn -> results.md and results.json, then growth."""
    python = None if arguments.no_peer else peer_python()
    runs, rates = [], {"float32": 0.0, "bfloat16": 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        worker("models", {"folder": temporary, "names": sorted({WORKLOADS[name][1]["model"] for name in arguments.only})})
        for number in range(arguments.rounds):
            for kind, best in worker("rate", {"size": 2048}).items():
                rates[kind] = max(rates[kind], best)
            for name in arguments.only:
                for side, settings in sides(name, peer=python is not None).items():
                    settings = {**settings, "model": str(Path(temporary) / settings["model"]), "iterations": arguments.iterations}
                    measured = worker("run", settings, sys.executable if side == "plainppo" else python)
                    runs.append({"workload": name, "side": side, "round": number, **measured})
                    total = statistics.median(row["generate"] + row["step"] for row in measured["rows"])
                    print(f"round {number + 1}, {name}, {side}: {total:.2f} s, {measured['peak'] / 1e6:.0f} MB", flush=True)
    versions = {run["side"]: run["versions"] for run in runs}
    about = {"machine": machine(), "threads": runs[0]["threads"], "versions": versions, "matrix products, GFLOP/s": rates,
             "date": datetime.date.today().isoformat(), "command": " ".join(["python scripts/bench.py", *sys.argv[1:]])}
    write_results(arguments.output_dir, about, runs)
    if not arguments.no_growth:
        growth(arguments)


def machine():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8") if line.startswith("model name")] \
        if os.path.exists("/proc/cpuinfo") else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


def figures(name, runs, rates):
    """One workload's runs -> {side: figures}: medians over all iterations, ratios of medians, and [least, greatest] of the rounds."""
    result = {}
    for side, settings in sides(name).items():
        own = [run for run in runs if (run["workload"], run["side"]) == (name, side)]
        rows = [{**row, "total": row["generate"] + row["step"]} for run in own for row in run["rows"]]
        if not rows:
            continue
        each = {key: statistics.median(row[key] for row in rows) for key in ("generate", "step", "total", "sampled", "trained")}
        each.update({key: statistics.median(run[key] for run in own) for key in ("imported", "peak")})
        each["tokens/s"] = each["trained"] / each["total"]
        each["GFLOP/s"] = useful_flops(settings, each["sampled"], each["trained"]) / each["total"] / 1e9
        each["share"] = each["GFLOP/s"] / rates["bfloat16" if settings.get("bf16") else "float32"]
        result[side] = each
        each["rounds"] = [(statistics.median(row["generate"] + row["step"] for row in run["rows"]), run["peak"]) for run in own]
    ours = result["plainppo"]
    for side in [side for side in result if side != "plainppo"]:
        peer, pairs = result[side], list(zip(result[side]["rounds"], ours["rounds"]))
        faster, memory = [a[0] / b[0] for a, b in pairs], [b[1] / a[1] for a, b in pairs]
        peer["against"] = {"times faster": peer["total"] / ours["total"], "of the rounds": [min(faster), max(faster)],
                           "memory": ours["peak"] / peer["peak"], "memory of the rounds": [min(memory), max(memory)]}
    if "TRL" in result:
        against = result["TRL"]["against"]
        ours["reached"] = {"time": against["times faster"] >= WORKLOADS[name][2], "memory": against["memory"] <= MEMORY_TARGET}
    return result


def write_results(folder, about, runs):
    """results.json has everything; results.md, which is also printed, one row per workload and library."""
    rates = about["matrix products, GFLOP/s"]
    results = {name: figures(name, runs, rates) for name in WORKLOADS if any(run["workload"] == name for run in runs)}
    lines = ["| workload | library | generate, s | step, s | total, s | tokens/s | peak memory (after imports), MB | GFLOP/s, useful "
             "(share of the machine's) | plainppo is faster by (rounds) | its share of this memory (rounds) | to reach | reached |",
             "|" + "---|" * 12]
    for name, result in results.items():
        for side, each in result.items():
            against, last = each.get("against"), ["", ""]
            if side == "TRL":
                reached = result["plainppo"]["reached"]
                last = [f"{WORKLOADS[name][2]:g} x, {MEMORY_TARGET:g}",
                        ", ".join(f"{what} {'yes' if reached[what] else 'no'}" for what in ("time", "memory"))]
            compared = [f"{against[ratio]:.2f} ({against[rounds][0]:.2f} to {against[rounds][1]:.2f})" for ratio, rounds in
                        (("times faster", "of the rounds"), ("memory", "memory of the rounds"))] if against else ["", ""]
            lines.append("| " + " | ".join([
                f"{name}: {WORKLOADS[name][0]}" if side == "plainppo" else name, side,
                *(f"{each[key]:.2f}" for key in ("generate", "step", "total")), f"{each['tokens/s']:.0f}",
                f"{each['peak'] / 1e6:.0f} ({each['imported'] / 1e6:.0f})", f"{each['GFLOP/s']:.0f} ({each['share']:.0%})",
                *compared, *last]) + " |")
    versions = "; ".join(f"{side}: " + ", ".join(map(" ".join, each.items())) for side, each in about["versions"].items())
    lines += ["", f"Machine: {about['machine']}, {about['threads']} threads; matrix products of 2,048 x 2,048: "
              f"{rates['float32']:.0f} GFLOP/s in float32, {rates['bfloat16']:.0f} in bf16.", "", f"Versions: {versions}.", "",
              f"{about['date']}, `{about['command']}`"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "results.json").write_text(json.dumps({**about, "results": results, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)


def growth(arguments):
    """Seconds of an iteration and peak memory against response length and batch size -> growth.md and growth.png."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
              str(ROOT / "scripts" / "accelerate_configs" / "multi_cpu.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    points = [("length", 16, length) for length in arguments.lengths] + [("batch", size, 24) for size in arguments.batches]
    runners = ["1 process", "2 processes", *([] if arguments.no_peer else ["TRL"])]
    lines = ["| grows | batch | response | response tokens | logits of them all, MB | "
             + " | ".join(f"{side}: s, peak MB of a process" for side in runners) + " |", "|" + "---|" * (5 + len(runners))]
    curves = {}
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        worker("models", {"folder": temporary, "names": ["gpt2"]})
        for grows, size, length in points:
            cells = []
            for side in runners:
                parts = 2 if side == "2 processes" else 1
                settings = {"library": "trl" if side == "TRL" else "ours", "model": str(Path(temporary) / "gpt2"), "query": 8,
                            "response": length, "batch_size": size // parts, "mini_batch_size": 8 // parts, "epochs": 1, "iterations": 3}
                measured = worker("run", settings, peer_python() if side == "TRL" else sys.executable, launch if parts == 2 else (),
                                  OMP_NUM_THREADS="1")
                seconds = statistics.median(row["generate"] + row["step"] for row in measured["rows"])
                memory = measured["peak"] / 1e6
                curves.setdefault((grows, side), []).append((size * length, seconds, memory))
                cells.append(f"{seconds:.2f}, {memory:.0f}")
            tokens = size * length
            lines.append(f"| {grows} | {size} | {length} | {tokens} | {tokens * 4096 * 4 / 1e6:.0f} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "growth.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_growth(curves, arguments.output_dir / "growth.png")


def plot_growth(curves, path):
    """curves: {(what grows, side): [(response tokens, seconds, MB), ...]}. Two panels over the response tokens of a batch."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), dpi=90)
    styles = {"1 process": "o-", "2 processes": "s--", "TRL": "^:"}
    for (grows, side), points in curves.items():
        tokens, *measured = zip(*sorted(points))
        for panel, values in zip(panels, measured):
            panel.plot(tokens, values, styles[side], color="C0" if grows == "length" else "C1", markersize=4, label=f"{grows} grows, {side}")
    tokens, _, memory = zip(*sorted(point for points in curves.values() for point in points))
    panels[1].plot(tokens, [min(memory) + count * 4096 * 4 / 1e6 for count in tokens], color="grey", linewidth=1,
                   label="if all logits were kept once")
    for panel, title in zip(panels, ("seconds of an iteration", "peak memory of a process, MB")):
        panel.set(xlabel="batch x response length, tokens", title=title, ylim=(0, 1.15 * panel.get_ylim()[1]))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    panels[1].legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)


def profile(arguments):
    """The five operations that take most of a workload's step(), now and by the plain path."""
    with tempfile.TemporaryDirectory() as temporary:
        settings = {**WORKLOADS[arguments.workload][1], "library": "ours", "items": 5}
        settings["batch_size"] = arguments.batch_size or settings["batch_size"]
        worker("models", {"folder": temporary, "names": [settings["model"]]})
        settings["model"] = str(Path(temporary) / settings["model"])
        now, before = [worker("profile", {**settings, "plain": plain}) for plain in (False, True)]
    print(f"Seconds of a step under the profiler: {now['seconds']:.2f} now, {before['seconds']:.2f} by the plain path.\n")
    print("| | now | s itself (share) | plain path | s itself (share) |\n|---|---|---|---|---|")
    for number, pair in enumerate(zip(now["items"], before["items"]), 1):
        cells = [f"`{name}`, {count} times | {seconds:.2f} ({share:.0%})" for name, seconds, share, count in pair]
        print(f"| {number} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", required=True)
    rows = tables.add_parser("features")
    rows.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows to run; default: all")
    rows.add_argument("--steps", type=int, default=60, help="PPO steps per row")
    rows.add_argument("--output_dir", type=Path, default=Path("runs/features"), help="folder for the runs and table.md")
    share = tables.add_parser("sharing")
    share.add_argument("--rounds", type=int, default=5, help="measured steps of each way")
    share.add_argument("--layers", type=int, default=30, help="depth of the model")
    ways = tables.add_parser("stages")
    ways.add_argument("--steps", type=int, default=5, help="PPO steps of each way")
    ways.add_argument("--only", nargs="+", help="models; default: all")
    fast = tables.add_parser("speed")
    fast.add_argument("--only", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="workloads; default: all")
    fast.add_argument("--rounds", type=int, default=3, help="processes of each library on each workload")
    fast.add_argument("--iterations", type=int, default=3, help="measured iterations of each process")
    fast.add_argument("--no_growth", action="store_true", help="stop after the table")
    for table in (fast, tables.add_parser("growth")):
        table.add_argument("--output_dir", type=Path, default=Path("bench"), help="folder for the tables and the plot")
        table.add_argument("--no_peer", action="store_true", help="plainppo alone")
        table.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 512], help="response tokens, at batch 16")
        table.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128, 256], help="batch sizes, at 24 response tokens")
    step = tables.add_parser("profile")
    step.add_argument("--workload", choices=list(WORKLOADS), default="W1", help="whose step()")
    step.add_argument("--batch_size", type=int, help="responses of the step; default: the workload's")
    arguments = parser.parse_args()
    {"features": features, "sharing": sharing, "stages": stages, "speed": speed, "growth": growth,
     "profile": profile}[arguments.table](arguments)


if __name__ == "__main__":
    main()
