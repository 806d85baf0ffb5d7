"""Measures and prints the tables of docs/measurements.md, as Markdown.

    python scripts/bench.py features                    # cost and effect of each feature: make features
    python scripts/bench.py features --only lion shared # some rows
    python scripts/bench.py sharing                     # what running shared layers once saves: make sharing
    python scripts/bench.py stages                      # 1 process, DDP and ZeRO on 2 processes: make stages
    python scripts/bench.py speed                       # TRL 0.11.4, plain, fast; then growth: make bench
    python scripts/bench.py speed --base FOLDER         # the fast trainer against that of another checkout
    python scripts/bench.py levers                      # what each lever of speed.py saves: make levers
    python scripts/bench.py growth                      # time, memory against response length and batch size
    python scripts/bench.py profile                     # where a step's time goes: make profile
    python scripts/bench.py neighbour                   # generate() beside a busy program, and GOMP_SPINCOUNT

features: each row is a run of scripts/train.py with some flags. Two rows run side by side, each with one
    thread, so that they disturb each other little. The table and the runs are left in runs/features/.
sharing: step() of a random model with the shape of SmolLM2-135M. All ways run in one process and take turns;
    the median of the rounds counts.
stages: the same number of responses per step on 1 and on 2 processes, one thread each. The memory is that of
    the process that needed most. Without a GPU this shows what each way costs, and not how it scales.
speed: all sides have the same random weights, prompts, lengths and settings, and take turns, each in a
    process of its own. In each of --rounds rounds, a side runs one iteration to warm up and --iterations that
    are measured. Figures are medians over all iterations. A ratio is one of medians; beside it are the least
    and the greatest ratio of a round, because the speed of a machine drifts. The first call installs TRL into
    a virtual environment of its own, .peer; --no_peer leaves TRL out. Leaves results.md, results.json,
    growth.md and growth.png in bench/. Where there is a GPU, they run on it (--device cpu: not), with four
    workloads more. Then it leaves gpu.md and gpu.json, with the share of the memory's rate that generate()
    reaches, and below the table a profile of each workload that missed its aim; growth is left out. A machine
    without a package index takes TRL from a folder of wheels: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER make bench
speed --base: in place of TRL and the plain trainer, the fast trainer of another checkout of this project.
    Leaves base.md and base.json in bench/.
levers: the fast trainer without one lever of speed.py, in turn with the whole one, on the workloads that have
    what it saves. Leaves levers.md and levers.json in bench/.
growth: W1's model, one epoch, one thread per process, median of 3 iterations. Two processes divide the batch,
    and the mini-batch of 8, between them. TRL runs on 1 process.
profile: step() of one workload, by the fast trainer after tune_cpu(), and by the plain trainer without it.
levers, growth and neighbour use the CPU only; speed and profile use a GPU if there is one.
"""
import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# name: (what the table calls it, flags). SGD moves by lr x gradient, so it needs another learning rate.
ROWS = {
    "seed0": ("default: Adam, seed 0", "--seed 0"),
    "seed1": ("default, seed 1", "--seed 1"),
    "seed2": ("default, seed 2", "--seed 2"),
    "sgd": ("SGD, learning rate 0.1", "--optimizer sgd --learning_rate 0.1"),
    "adam8bit": ("8-bit Adam", "--optimizer adam8bit"),
    "lion": ("Lion", "--optimizer lion"),
    "scheduler": ("exponential schedule, 10 steps of warm-up",
                  "--lr_scheduler exponential --warmup_steps 10"),
    "shared": ("2 of 4 layers shared", "--num_shared_layers 2"),
    "reference8": ("8-bit reference", "--reference_bits 8"),
    "reference4": ("4-bit reference", "--reference_bits 4"),
    "cache": ("device cache cleared", "--optimize_cuda_cache True"),
    "scores": ("scores scaled, normalised, clipped", "--use_score_scaling --use_score_norm --score_clip 0.5"),
}


def run(command, folder):
    """Run scripts/train.py with one thread per process. -> its summary, the median seconds of a step.

    If it fails: -> the last line of its errors, None.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--output_dir", str(folder)], env=environment, capture_output=True,
                          text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1], None
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    seconds = statistics.median(row["time/rollout"] + row["time/score"] + row["time/ppo/total"]
                                for row in rows)
    return json.loads((folder / "summary.json").read_text()), seconds


def measure(name, steps, folder):
    """Run one row of the feature table. -> its line of the table."""
    title, flags = ROWS[name]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *flags.split(), "--steps", str(steps)]
    summary, seconds = run(command, folder / name)
    if seconds is None:
        return f"| {title} | failed: {summary} | | | | | |"
    bigrams = f"{summary['distinct_bigrams before']:.2f} → {summary['distinct_bigrams after']:.2f}"
    scores = f"{summary['score before']:.3f} → {summary['score after']:.3f}"
    return (f"| {title} | {scores} | {bigrams} | {summary['kl']:.1f} | {seconds:.2f} | "
            f"{summary['peak memory bytes'] / 1e6:.0f} MB | "
            f"{summary['optimizer state bytes'] / 1e6:.1f} MB |")


def features(arguments):
    """Print a line for each row of ROWS, two rows at a time -> table.md."""
    def measure_row(name):
        return measure(name, arguments.steps, arguments.output_dir)

    with ThreadPoolExecutor(max_workers=2) as pool:
        lines = ["| feature | mean score on held-out prompts | distinct bigrams | KL, nats | s per step | "
                 "peak memory | optimizer state |", "|" + "---|" * 7]
        print("\n".join(lines), flush=True)
        for line in pool.map(measure_row, arguments.only):
            lines.append(line)
            print(line, flush=True)
    (arguments.output_dir / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


WAYS = {"1 process": None, "DDP": "multi_cpu", "ZeRO-1": "deepspeed_zero1", "ZeRO-2": "deepspeed_zero2",
        "ZeRO-3": "deepspeed_zero3", "ZeRO-3 offload": "deepspeed_zero3_offload"}


def launcher(config):
    """-> the command that starts a script on 2 processes. config: a file of accelerate_configs, by name."""
    return [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
            str(ROOT / "scripts" / "accelerate_configs" / f"{config}.yaml"), "--num_processes", "2"]


def stages(arguments):
    """Print seconds per step and peak memory of each of WAYS, for two models.

    They are the default model, and one with random weights and the shape of SmolLM2-135M.
    """
    from transformers import AutoTokenizer
    with tempfile.TemporaryDirectory() as temporary:
        shape = Path(temporary) / "smollm2-shape"
        smollm2_shape(layers=30).save_pretrained(shape)
        AutoTokenizer.from_pretrained(ROOT / "assets" / "review-lm").save_pretrained(shape)
        # model: (batch size on 1 process, on each of 2 processes), flags
        models = {"default, 64 responses": ((64, 32), []),
                  "SmolLM2-135M's shape, 8 responses": (
                      (8, 4), ["--model_name", str(shape), "--max_new_tokens", "16"])}
        print("| model | " + " | ".join(WAYS) + " |\n" + "|---" * (len(WAYS) + 1) + "|")
        for model in arguments.only or models:
            sizes, flags = models[model]
            cells = []
            for number, config in enumerate(WAYS.values()):
                script = [str(ROOT / "scripts" / "train.py"), *flags, "--steps", str(arguments.steps),
                          "--eval_prompts", "4", "--save_every", "0", "--ppo_epochs", "2",
                          "--batch_size", str(sizes[config is not None])]
                start = [sys.executable] if config is None else launcher(config)
                summary, seconds = run([*start, *script], Path(temporary) / f"{len(model)}-{number}")
                cells.append(f"failed: {summary}" if seconds is None else
                             f"{seconds:.1f} s, {summary['peak memory bytes'] / 1e9:.2f} GB")
            print(f"| {model} | " + " | ".join(cells) + " |", flush=True)


def sharing(arguments):
    """Print seconds of step() with 0, half and 80 % of the layers shared, run every time or once a batch."""
    import logging

    import torch
    sys.path.insert(0, str(ROOT))
    import distributed
    import speed
    from reference import shared_bytes
    # The responses are random and not sampled from the model, so each step would warn of a negative KL.
    logging.disable(logging.WARNING)
    speed.tune_cpu()
    accelerator, layers = distributed.start(), arguments.layers
    ways = [(0, False)] + [(count, once) for count in (layers // 2, layers * 4 // 5)
                           for once in (False, True)]
    trainers = [sharing_trainer(accelerator, layers, count, once) for count, once in ways]
    generator = torch.Generator().manual_seed(0)
    queries = list(torch.randint(10, 4000, (8, 8), generator=generator))
    responses = list(torch.randint(10, 4000, (8, 16), generator=generator))
    seconds = [[] for _ in ways]
    for _ in range(arguments.rounds + 1):
        for trainer, times in zip(trainers, seconds):
            times.append(trainer.step(queries, responses, [0.0, 1.0] * 4)["time/ppo/total"])
    medians = [statistics.median(times[1:]) for times in seconds]       # the first round warms up
    print("| layers shared | their pass | s per step | time against nothing shared | saved on weights |\n"
          "|" + "---|" * 5)
    for (count, once), trainer, median in zip(ways, trainers, medians):
        saved = shared_bytes(trainer.model, trainer.ref_model) / 1e6
        how = "once per batch" if once else "every time" if count else "-"
        print(f"| {count} of {layers} | {how} | {median:.2f} | {median / medians[0]:.2f} | {saved:.0f} MB |")


def sharing_trainer(accelerator, layers, count, once):
    """-> a fast trainer of a random model with SmolLM2-135M's shape, `layers` deep, `count` of them shared.

    once=False: the shared layers run every time.
    """
    from transformers import AutoTokenizer

    from ppo_core import PPOConfig
    from speed import FastPPOTrainer
    from value_head import AutoModelForCausalLMWithValueHead
    model = AutoModelForCausalLMWithValueHead.from_pretrained(smollm2_shape(layers))
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "review-lm")
    trainer = FastPPOTrainer(PPOConfig(batch_size=8, mini_batch_size=4), model, None, tokenizer,
                             num_shared_layers=count or None, accelerator=accelerator)
    if not once:
        trainer.trunk.blocks = []
    return trainer


def smollm2_shape(layers):
    """-> a language model with random weights and the shape of SmolLM2-135M, `layers` deep (there: 30)."""
    return random_llama(layers, vocab_size=49152, hidden_size=576, intermediate_size=1536,
                        num_attention_heads=9, num_key_value_heads=3)


def llama_shape(layers):
    """-> the same for a Llama with the sizes of Qwen2.5-1.5B (there: 28 layers)."""
    return random_llama(layers, vocab_size=151936, hidden_size=1536, intermediate_size=8960,
                        num_attention_heads=12, num_key_value_heads=2)


def random_llama(layers, **sizes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=True, bos_token_id=0,
                                        eos_token_id=0, **sizes))


# ----------------------------------------------------------------------------------------- against TRL 0.11.4

PRODUCT = {"cpu": 2048, "cuda": 8192}       # rows of the matrices whose product is measured
# trl imports rich, but does not list it among its requirements.
PEER = ["torch==2.13.0", "trl==0.11.4", "transformers==4.46.3", "accelerate==1.1.1", "rich"]
# model: (layers, weights in the matrix products of a layer, weights of lm_head)
SHAPES = {"gpt2": (6, 12 * 256 ** 2, 4096 * 256), "gpt2-eos": (6, 12 * 256 ** 2, 4096 * 256),
          "smollm2": (30, 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536, 49152 * 576),
          "gpt2-124m": (12, 12 * 768 ** 2, 50257 * 768),
          "llama-1.5b": (28, 2 * 1536 ** 2 + 2 * 1536 * 256 + 3 * 1536 * 8960, 151936 * 1536)}
# model: numbers in the keys of one token in one layer; the values are as many
KEYS = {"gpt2": 256, "gpt2-eos": 256, "smollm2": 192, "gpt2-124m": 768, "llama-1.5b": 256}
SMALL = {"model": "gpt2", "batch_size": 64, "mini_batch_size": 16, "query": 8, "response": 24}
LARGE = {"model": "smollm2", "batch_size": 8, "mini_batch_size": 4, "query": 8, "response": 16}
# name: (what it is, its settings, how many times faster than TRL it is to be)
WORKLOADS = {
    "W1": ("GPT-2, 6 layers, 256 wide; batch 64, response 24", SMALL, 1.8),
    "W2": ("W1, 4 of 6 layers shared", {**SMALL, "shared": 4}, 3.0),
    "W3": ("SmolLM2-135M's shape; batch 8, response 16", LARGE, 1.7),
    "W4": ("W3, 24 of 30 layers shared", {**LARGE, "shared": 24}, 3.0),
    "W5": ("W1, plainppo in bf16", {**SMALL, "bf16": True}, 3.0),
    "W6": ("W1, sampled until EOS; step() on 4 to 48 tokens",
           {**SMALL, "model": "gpt2-eos", "response": 48, "ragged": True}, 2.0),
}
# for levers alone: two of them save nothing where responses are short
LONG = {"W7": ("W1's model; batch 16, response 512, 1 epoch",
               {**SMALL, "batch_size": 16, "response": 512, "epochs": 1}, None)}
MIDDLE = {"model": "gpt2-124m", "batch_size": 64, "mini_batch_size": 16, "query": 32, "response": 128,
          "bf16": True}
GREAT = {**MIDDLE, "model": "llama-1.5b", "batch_size": 32, "mini_batch_size": 4}
# on a GPU alone. All sides are in bf16.
ON_GPU = {
    "G1": ("GPT-2 124M's shape in bf16; batch 64, response 128", MIDDLE, 2.0),
    "G2": ("G1, 8 of 12 layers shared", {**MIDDLE, "shared": 8}, 3.0),
    "G3": ("a Llama of 1.5 billion in bf16; batch 32, response 128", GREAT, 2.0),
    "G4": ("G3, 22 of 28 layers shared", {**GREAT, "shared": 22}, 3.0),
}
ALL_WORKLOADS = {**WORKLOADS, **LONG, **ON_GPU}
OURS = ("fast", "plain", "compiled")
MEMORY_TARGET = 0.6         # of TRL's peak memory
BANDWIDTH_TARGET = 0.5      # of the memory's rate, by generate() on a GPU, for G1, compiled or not


def target(name, device):
    """-> how many times faster than TRL the workload `name` is to be. On a GPU: 3 with shared layers, else 2.
    """
    _, settings, on_cpu = ALL_WORKLOADS[name]
    return on_cpu if device == "cpu" else 3.0 if settings.get("shared") else 2.0


def card():
    """-> name, driver and memory of the GPU as nvidia-smi prints them; None where there is none to use."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    done = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total",
                           "--format=csv,noheader"], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    name, driver, memory = lines[0].split(", ")
    return f"{name}, driver {driver}, {memory}"


def worker(what, settings, python=sys.executable, launch=(), **environment):
    """Run the task `what` of scripts/bench_worker.py in a process of its own. -> its measurements.

    GOMP_SPINCOUNT: as in scripts/train.py, because of busy programs beside the bench. None = not set.
    settings["device"]: "cuda" shows it the first GPU that the user can see; otherwise it sees none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "CUDA_VISIBLE_DEVICES": visible if settings.get("device") == "cuda" else "",
                   "GOMP_SPINCOUNT": "4000", **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    script = [str(ROOT / "scripts" / "bench_worker.py"), what, json.dumps(settings)]
    done = subprocess.run([*(launch or [str(python)]), *script], env=environment, capture_output=True,
                          text=True)
    if done.returncode:
        sys.exit(f"bench_worker.py {what} {json.dumps(settings)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peer_python():
    """-> the Python of .peer. If its stamp does not name the versions of PEER, they are installed first."""
    python, stamp = ROOT / ".peer" / "bin" / "python", ROOT / ".peer" / ".installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != "\n".join(PEER):
        print("installing the peer into .peer", flush=True)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ROOT / ".peer")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PEER],
                       check=True)
        stamp.write_text("\n".join(PEER), encoding="utf-8")
    return python


def sides(name, peer=True, base=None):
    """-> {side: settings} of the sides that take turns on the workload `name`.

    base: the folder of another checkout; then its fast trainer is the only other side.
    """
    settings = ALL_WORKLOADS[name][1]
    ours = {**settings, "library": "ours"}
    if base is not None:
        return {"fast": {**ours, "trainer": "fast"}, "base": {**ours, "trainer": "fast", "root": str(base)}}
    result = {"fast": {**ours, "trainer": "fast"}, "plain": {**ours, "trainer": "plain"}}
    if name in ON_GPU and not settings.get("shared"):       # with shared layers nothing is compiled
        result["compiled"] = {**ours, "trainer": "compiled"}
    if peer:
        # In W5, too, the target is against TRL in float32, its default.
        result["TRL"] = {**settings, "library": "trl", "bf16": name in ON_GPU}
        if settings.get("bf16") and name not in ON_GPU:
            result["TRL in bf16"] = {**settings, "library": "trl"}
    return result


def useful_flops(settings, sampled, trained):
    """-> floating-point operations that an iteration needs at least.

    sampled, trained: response tokens of generate() and of step(). In the forward pass, a product with a
    weight costs 2 operations per weight and token. In the backward pass it costs 4: 2 for the gradient of the
    input, 2 for that of the weight. "Tokens" are prompt and response without the last token of each response.
      generate:  2 x all layers x tokens + 2 x lm_head x response tokens
      record:    2 x layers not shared x tokens + 2 x lm_head x response tokens, for the reference. The
                 policy's part is known from generate. It costs 2 x all layers x tokens + 2 x lm_head x
                 response tokens more if step() is given other responses (ragged).
      update:    epochs x (6 x layers not shared x tokens + 6 x lm_head x response tokens)
    With shared layers the embeddings are frozen, and with them lm_head, which is tied to them: then 4 and not
    6. Left out because they are small: attention's own products, norms, the value head, the softmax.
    """
    layers, block, head = SHAPES[settings["model"]]
    shared, rows, query = settings.get("shared", 0), settings["batch_size"], settings["query"]
    unshared, tokens = layers - shared, rows * (query - 1) + trained
    generate = 2 * layers * block * (rows * (query - 1) + sampled) + 2 * head * sampled
    record = 2 * unshared * block * tokens + 2 * head * trained
    if settings.get("ragged"):
        record += 2 * layers * block * tokens + 2 * head * trained
    update = settings.get("epochs", 4) * (6 * unshared * block * tokens
                                          + (4 if shared else 6) * head * trained)
    return generate + record + update


def bytes_read(settings, sampled):
    """-> bytes that generate() reads at least: each step all weights of matrix products, and the keys and
    values so far of each row. In bf16 a number has 2 bytes, otherwise 4. sampled: tokens.
    """
    layers, block, head = SHAPES[settings["model"]]
    size, mean = 2 if settings.get("bf16") else 4, sampled / settings["batch_size"]
    weights = settings["response"] * (layers * block + head)
    # A row's first token reads those of its prompt, the second one more, and so on.
    cached = sampled * (settings["query"] + (mean - 1) / 2) * 2 * KEYS[settings["model"]] * layers
    return size * (weights + cached)


def take_turns(arguments, plan):
    """Run --rounds rounds of all sides of each workload. -> runs, rates.

    plan: function(workload) -> list of (side, settings, Python), in the order in which they run.
    runs: one dict per process. rates: {precision: the best GFLOP/s of a matrix product in any round}, and
    "copy": the best GB/s that a copy in memory reads and writes.
    """
    runs, rates = [], {"float32": 0.0, "bfloat16": 0.0, "copy": 0.0}
    device = getattr(arguments, "device", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        models = sorted({ALL_WORKLOADS[name][1]["model"] for name in arguments.only})
        worker("models", {"folder": temporary, "names": models})
        for number in range(arguments.rounds):
            for kind, best in worker("rate", {"size": PRODUCT[device], "device": device}).items():
                rates[kind] = max(rates[kind], best)
            for name in arguments.only:
                for side, settings, python in plan(name):
                    settings = {**settings, "model": str(Path(temporary) / settings["model"]),
                                "iterations": arguments.iterations, "device": device}
                    # Another checkout must only be read, so Python writes no bytecode into it.
                    measured = worker("run", settings, python, PYTHONDONTWRITEBYTECODE="1")
                    runs.append({"workload": name, "side": side, "round": number, **measured})
                    total = statistics.median(map(iteration_seconds, measured["rows"]))
                    memory = measured["peak"] / 1e6
                    print(f"round {number + 1}, {name}, {side}: {total:.2f} s, {memory:.0f} MB", flush=True)
    return runs, rates


def iteration_seconds(row):
    return row["generate"] + row["step"]


def about_this_run(runs, rates, device="cpu"):
    """-> what is saved with a table: the machine, the versions, the date, the command."""
    versions = {run["side"]: run["versions"] for run in runs}
    products = {name: rate for name, rate in rates.items() if name != "copy"}
    return {"machine": machine(), "device": device, "card": card() if device == "cuda" else None,
            "threads": runs[0]["threads"], "versions": versions,
            "matrix products, GFLOP/s": products, "copies, GB/s": rates["copy"],
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python scripts/bench.py", *sys.argv[1:]])}


def speed(arguments):
    """TRL, the plain and the fast trainer in turn -> results.md and results.json; then growth.

    With --base: the fast trainer and that of another checkout in turn -> base.md and base.json.
    """
    base = arguments.base and arguments.base.resolve()
    if base is not None and not (base / "ppo_core.py").exists():
        sys.exit(f"--base {base} holds no ppo_core.py; give the folder of a checkout of this project")
    peer = None if arguments.no_peer or base is not None else peer_python()

    def plan(name):
        return [(side, settings, peer if side.startswith("TRL") else sys.executable)
                for side, settings in sides(name, peer is not None, base).items()]

    arguments.device = arguments.device or ("cuda" if card() else "cpu")
    on_gpu = arguments.device == "cuda"
    arguments.only = arguments.only or [*WORKLOADS, *(ON_GPU if on_gpu else [])]
    runs, rates = take_turns(arguments, plan)
    about = about_this_run(runs, rates, arguments.device)
    if base is not None:
        write_base(arguments.output_dir, about, runs)
        return
    results = write_results(arguments.output_dir, about, runs, "gpu" if on_gpu else "results")
    if on_gpu:
        explain_missed(arguments.output_dir / "gpu.md", results)
    elif not arguments.no_growth:
        growth(arguments)


def explain_missed(path, results):
    """Add to the file `path`, and print, a profile of each workload of `results` that missed an aim."""
    for name, result in results.items():
        missed = [what for what, reached in result["fast"].get("reached", {}).items() if not reached]
        for part in dict.fromkeys("generate" if what == "generation" else "step" for what in missed):
            aims = " and ".join(missed)
            lines = ["", f"{name} missed its aim for {aims}. Where the time of {part}() goes:", "",
                     *profile_lines(ALL_WORKLOADS[name][1], "cuda", part)]
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
            print("\n".join(lines), flush=True)


def machine():
    """-> processor, cores, memory and system of this machine, in one line."""
    names = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 ** 30
    processor = names[0] if names else platform.processor()
    return f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"


# ------------------------------------------------------------------------------------ results of a comparison


def medians(runs, settings, rates):
    """The runs of one side on one workload -> its figures, as medians over all iterations.

    "rounds" holds the median seconds and the peak bytes of each round.
    """
    rows = [{**row, "total": iteration_seconds(row)} for run in runs for row in run["rows"]]
    result = {key: statistics.median(row[key] for row in rows)
              for key in ("generate", "step", "total", "sampled", "trained")}
    result.update({key: statistics.median(run[key] for run in runs) for key in ("imported", "peak")})
    result["tokens/s"] = result["trained"] / result["total"]
    result["GFLOP/s"] = useful_flops(settings, result["sampled"], result["trained"]) / result["total"] / 1e9
    result["share"] = result["GFLOP/s"] / rates["bfloat16" if settings.get("bf16") else "float32"]
    if rates.get("copy"):
        result["GB/s"] = bytes_read(settings, result["sampled"]) / result["generate"] / 1e9
        result["bandwidth"] = result["GB/s"] / rates["copy"]
    result["rounds"] = [(statistics.median(map(iteration_seconds, run["rows"])), run["peak"]) for run in runs]
    return result


def against(result, peer):
    """Figures of two sides -> how many times faster `result` is, and its share of the peer's memory.

    Beside each ratio: the least and the greatest ratio of a round.
    """
    pairs = list(zip(peer["rounds"], result["rounds"]))
    faster = [theirs[0] / ours[0] for theirs, ours in pairs]
    memory = [ours[1] / theirs[1] for theirs, ours in pairs]
    return {"times faster": peer["total"] / result["total"], "of the rounds": [min(faster), max(faster)],
            "memory": result["peak"] / peer["peak"], "memory of the rounds": [min(memory), max(memory)]}


def figures(name, runs, rates, base=None, device="cpu"):
    """The runs of the workload `name` -> {side: figures}.

    For the trainers of OURS, "against" holds a comparison with each side that is none of them.
    """
    result = {}
    for side, settings in sides(name, base=base).items():
        side_runs = [run for run in runs if (run["workload"], run["side"]) == (name, side)]
        if side_runs:
            result[side] = medians(side_runs, settings, rates)
    for side in [side for side in OURS if side in result]:
        others = [other for other in result if other not in OURS]
        result[side]["against"] = {other: against(result[side], result[other]) for other in others}
    if "TRL" in result:
        compared = result["fast"]["against"]["TRL"]
        result["fast"]["reached"] = {"time": compared["times faster"] >= target(name, device),
                                     "memory": compared["memory"] <= MEMORY_TARGET}
        if name == "G1":
            best = max(result[side]["bandwidth"] for side in ("fast", "compiled") if side in result)
            result["fast"]["reached"]["generation"] = best >= BANDWIDTH_TARGET
    return result


def ratio_cells(compared):
    """The result of against() -> two cells such as "1.80 x (1.75 to 1.90)" and "0.60 (0.59 to 0.61)"."""
    spread, memory_spread = compared["of the rounds"], compared["memory of the rounds"]
    return [f"{compared['times faster']:.2f} x ({spread[0]:.2f} to {spread[1]:.2f})",
            f"{compared['memory']:.2f} ({memory_spread[0]:.2f} to {memory_spread[1]:.2f})"]


def comparison_table(results, device="cpu"):
    """-> lines: a row for each workload, with time and memory of TRL, the plain and the fast trainer."""
    lines = ["| workload | TRL 0.11.4: s, MB | plain: s, MB | "
             "plain is faster than TRL by, share of its memory | fast: s, MB "
             "| fast is faster than TRL by (rounds) | share of its memory (rounds) | to reach | reached |",
             "|" + "---|" * 9]
    for name, result in results.items():
        cells = {side: f"{figure['total']:.2f}, {figure['peak'] / 1e6:.0f}"
                 for side, figure in result.items()}
        compared = {side: result[side].get("against", {}).get("TRL") for side in ("plain", "fast")
                    if side in result}
        plain, reached = compared.get("plain"), result["fast"].get("reached")
        lines.append("| " + " | ".join([
            f"{name}: {ALL_WORKLOADS[name][0]}", cells.get("TRL", ""), cells.get("plain", ""),
            f"{plain['times faster']:.2f} x, {plain['memory']:.2f}" if plain else "", cells["fast"],
            *(ratio_cells(compared["fast"]) if compared["fast"] else ["", ""]),
            f"{target(name, device):g} x, {MEMORY_TARGET:g}" if reached else "",
            ", ".join(f"{what} {'yes' if yes else 'no'}" for what, yes in (reached or {}).items())]) + " |")
    return lines


def detail_table(results):
    """-> lines: a row for each workload and side."""
    rated = any("bandwidth" in figure for result in results.values() for figure in result.values())
    lines = ["| workload | side | generate, s | step, s | total, s | tokens/s | "
             "peak memory (after imports), MB | GFLOP/s, useful (share of the machine's) |"
             + " GB/s that generate() reads at least (share of a copy's) |" * rated,
             "|" + "---|" * (8 + rated)]
    for name, result in results.items():
        for side, figure in result.items():
            seconds = [f"{figure[part]:.2f}" for part in ("generate", "step", "total")]
            memory = f"{figure['peak'] / 1e6:.0f} ({figure['imported'] / 1e6:.0f})"
            rate = f"{figure['GFLOP/s']:.0f} ({figure['share']:.0%})"
            cells = [name, side, *seconds, f"{figure['tokens/s']:.0f}", memory, rate]
            if rated:
                cells.append(f"{figure['GB/s']:.0f} ({figure['bandwidth']:.0%})")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def about_lines(about):
    rates = about["matrix products, GFLOP/s"]
    versions = "; ".join(f"{side}: " + ", ".join(map(" ".join, packages.items()))
                         for side, packages in about["versions"].items())
    size = f"{PRODUCT[about.get('device', 'cpu')]:,}"
    copies = about.get("copies, GB/s")
    return ["", f"Machine: {about['machine']}, {about['threads']} threads; "
            + (f"card: {about['card']}; " if about.get("card") else "")
            + f"matrix products of {size} x {size}: "
            f"{rates['float32']:.0f} GFLOP/s in float32, {rates['bfloat16']:.0f} in bf16"
            + (f"; a copy reads and writes {copies:.0f} GB/s" if copies else "") + ".", "",
            f"Versions: {versions}.", "",
            f"{about['date']}, `{about['command']}`"]


def write_table(folder, name, lines, data):
    """Print the lines, and leave them in <name>.md and the data in <name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)


def write_results(folder, about, runs, file="results"):
    """results.json has all figures; results.md, which is also printed, the two tables. -> the figures."""
    rates = {**about["matrix products, GFLOP/s"], "copy": about.get("copies, GB/s")}
    device = about.get("device", "cpu")
    measured = [name for name in ALL_WORKLOADS if any(run["workload"] == name for run in runs)]
    results = {name: figures(name, runs, rates, device=device) for name in measured}
    lines = [*comparison_table(results, device), "", *detail_table(results), *about_lines(about)]
    write_table(folder, file, lines, {**about, "results": results, "runs": runs})
    return results


def write_base(folder, about, runs):
    """The fast trainer against another checkout -> base.md and base.json."""
    measured = [name for name in ALL_WORKLOADS if any(run["workload"] == name for run in runs)]
    results = {name: figures(name, runs, about["matrix products, GFLOP/s"], base="") for name in measured}
    lines = ["| workload | base: s, MB | fast: s, MB | faster than base by (rounds) | "
             "share of its memory (rounds) |", "|" + "---|" * 5]
    for name, result in results.items():
        cells = [f"{figure['total']:.2f}, {figure['peak'] / 1e6:.0f}"
                 for figure in (result["base"], result["fast"])]
        ratios = ratio_cells(result["fast"]["against"]["base"])
        lines.append("| " + " | ".join([f"{name}: {ALL_WORKLOADS[name][0]}", *cells, *ratios]) + " |")
    write_table(folder, "base", [*lines, *about_lines(about)], {**about, "results": results, "runs": runs})


# ---------------------------------------------------------------------------------------------- levers

# lever: the workloads on which it is measured, because they have what it saves. It leaves the others alone.
MEASURED_ON = {
    "float32 products by oneDNN": ("W1", "W3"), "freed memory kept": ("W1", "W3"),
    "fused activations": ("W1", "W6"), "even sizes": ("W6",), "lean sampling loop": ("W1", "W4"),
    "one random number per token": ("W1",), "cache with room": ("W4", "W7"),
    "finished rows dropped": ("W6",), "sampler's results used again": ("W1", "W2"),
    "shared layers run once": ("W2", "W4"), "rows of like length, trimmed": ("W6",),
    "mini-batches halved": ("W6",),
    "logits in chunks": ("W7",),
    "log-prob and entropy in one pass": ("W1", "W2")}


def lever_turns(name, levers):
    """The order of a round on one workload. -> list of levers; None, the whole trainer, is beside each."""
    fitting = [lever for lever in levers if name in MEASURED_ON[lever]]
    order = []
    for first in range(0, len(fitting), 2):
        order += [fitting[first], None, *fitting[first + 1:first + 2]]
    return order


def levers(arguments):
    """The fast trainer with one lever off, in turn with the whole one -> levers.md and levers.json."""
    def plan(name):
        settings = ALL_WORKLOADS[name][1]
        settings = {**settings, "library": "ours", "trainer": "fast"}
        return [(lever or "fast", {**settings, "without": lever}, sys.executable)
                for lever in lever_turns(name, arguments.levers)]

    runs, rates = take_turns(arguments, plan)
    write_levers(arguments.output_dir, about_this_run(runs, rates), runs)


def lever_savings(runs, name, lever):
    """-> (share of the time, share of the peak memory) that a lever saves; None where it did not run.

    Each run without it is compared with the run of the whole trainer beside it, in the same round; the median
    of the rounds counts.
    """
    found = [run for run in runs if run["workload"] == name]
    times, memory = [], []
    for place, run in enumerate(found):
        if run["side"] == lever:
            whole = next(found[near] for near in (place + 1, place - 1)
                         if 0 <= near < len(found) and found[near]["side"] == "fast"
                         and found[near]["round"] == run["round"])
            seconds = [statistics.median(map(iteration_seconds, side["rows"])) for side in (whole, run)]
            times.append(1 - seconds[0] / seconds[1])
            memory.append(1 - whole["peak"] / run["peak"])
    return (statistics.median(times), statistics.median(memory)) if times else None


def write_levers(folder, about, runs):
    names = [name for name in ALL_WORKLOADS if any(run["workload"] == name for run in runs)]
    used = [lever for lever in MEASURED_ON if any(run["side"] == lever for run in runs)]
    savings = {lever: {name: lever_savings(runs, name, lever) for name in names} for lever in used}
    lines = ["Time and memory that a lever saves: the fast trainer, against the same with this lever off.",
             "",
             "| lever | " + " | ".join(f"{name}: time, memory" for name in names) + " |",
             "|" + "---|" * (1 + len(names))]
    for lever, saved in savings.items():
        cells = [f"{saved[name][0]:.0%}, {saved[name][1]:.0%}" if saved[name] else "-" for name in names]
        lines.append(f"| {lever} | " + " | ".join(cells) + " |")
    versions = {"plainppo": runs[0]["versions"]}
    write_table(folder, "levers", [*lines, *about_lines({**about, "versions": versions})],
                {**about, "versions": versions, "savings": savings, "runs": runs})


# ----------------------------------------------------------------------------------------- growth and profile


def growth_point(side, model, size, length):
    """Iterations of one side, of `size` responses of `length` tokens -> median seconds, peak bytes."""
    parts = 2 if side == "2 processes" else 1
    settings = {"library": "trl" if side == "TRL" else "ours", "trainer": "fast", "model": model, "query": 8,
                "response": length, "batch_size": size // parts, "mini_batch_size": 8 // parts, "epochs": 1,
                "iterations": 3}
    python = peer_python() if side == "TRL" else sys.executable
    measured = worker("run", settings, python, launcher("multi_cpu") if parts == 2 else (),
                      OMP_NUM_THREADS="1")
    return statistics.median(map(iteration_seconds, measured["rows"])), measured["peak"]


def growth(arguments):
    """Seconds and peak memory against response length and batch size -> growth.md and growth.png."""
    points = [("length", 16, length) for length in arguments.lengths]
    points += [("batch", size, 24) for size in arguments.batches]
    runners = ["1 process", "2 processes", *([] if arguments.no_peer else ["TRL"])]
    lines = ["| grows | batch | response | response tokens | logits of them all, MB | "
             + " | ".join(f"{side}: s, peak MB of a process" for side in runners) + " |",
             "|" + "---|" * (5 + len(runners))]
    curves = {}
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        worker("models", {"folder": temporary, "names": ["gpt2"]})
        for grows, size, length in points:
            cells, tokens = [], size * length
            for side in runners:
                seconds, memory = growth_point(side, str(Path(temporary) / "gpt2"), size, length)
                curves.setdefault((grows, side), []).append((tokens, seconds, memory / 1e6))
                cells.append(f"{seconds:.2f}, {memory / 1e6:.0f}")
            logits = f"{tokens * 4096 * 4 / 1e6:.0f}"
            columns = [grows, str(size), str(length), str(tokens), logits, *cells]
            lines.append("| " + " | ".join(columns) + " |")
            print(lines[-1], flush=True)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "growth.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_growth(curves, arguments.output_dir / "growth.png")


def plot_growth(curves, path):
    """curves: {(what grows, side): [(response tokens of a batch, seconds, MB), ...]} -> two panels."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), dpi=90)
    styles = {"1 process": "o-", "2 processes": "s--", "TRL": "^:"}
    for (grows, side), points in curves.items():
        tokens, *measured = zip(*sorted(points))
        for panel, values in zip(panels, measured):
            panel.plot(tokens, values, styles[side], color="C0" if grows == "length" else "C1", markersize=4,
                       label=f"{grows} grows, {side}")
    tokens, _, memory = zip(*sorted(point for points in curves.values() for point in points))
    panels[1].plot(tokens, [min(memory) + count * 4096 * 4 / 1e6 for count in tokens], color="grey",
                   linewidth=1, label="if all logits were kept once")
    for panel, title in zip(panels, ("seconds of an iteration", "peak memory of a process, MB")):
        panel.set(xlabel="batch x response length, tokens", title=title, ylim=(0, 1.15 * panel.get_ylim()[1]))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    panels[1].legend(fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path)


def profile(arguments):
    """The five operations that take most of a workload's step(), by the fast trainer and by the plain one."""
    settings = dict(ALL_WORKLOADS[arguments.workload][1])
    settings["batch_size"] = arguments.batch_size or settings["batch_size"]
    print("\n".join(profile_lines(settings, arguments.device or ("cuda" if card() else "cpu"), "step")))


def profile_lines(settings, device, part):
    """-> lines of Markdown: what takes most of the time of `part`, "step" or "generate", on a workload."""
    with tempfile.TemporaryDirectory() as temporary:
        settings = {**settings, "library": "ours", "items": 5, "device": device, "part": part}
        worker("models", {"folder": temporary, "names": [settings["model"]]})
        settings["model"] = str(Path(temporary) / settings["model"])
        now, plain = [worker("profile", {**settings, "trainer": trainer}) for trainer in ("fast", "plain")]
    lines = [f"Seconds of a {part} under the profiler: {now['seconds']:.2f} now, "
             f"{plain['seconds']:.2f} by the plain path.", "",
             "| | now | s itself (share) | plain path | s itself (share) |", "|---|---|---|---|---|"]
    for number, pair in enumerate(zip(now["items"], plain["items"]), 1):
        cells = [f"`{name}`, {count} times | {seconds:.2f} ({share:.0%})"
                 for name, seconds, share, count in pair]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return lines


def neighbour(arguments):
    """Seconds of generate() alone, and beside one busy program without and with GOMP_SPINCOUNT."""
    settings = {**SMALL, "batch_size": 8, "mini_batch_size": 8, "library": "ours", "trainer": "plain",
                "iterations": arguments.iterations}
    rows = [("alone", None, None), ("beside a busy program", "while True: pass", None),
            ("the same, with GOMP_SPINCOUNT=4000", "while True: pass", "4000")]
    print("| generate() of 8 responses | s |\n|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        worker("models", {"folder": temporary, "names": ["gpt2"]})
        settings["model"] = str(Path(temporary) / "gpt2")
        for title, program, spins in rows:
            busy = program and subprocess.Popen([sys.executable, "-c", program])
            try:
                measured = worker("run", settings, GOMP_SPINCOUNT=spins)
            finally:
                if busy:
                    busy.kill()
            seconds = statistics.median(row["generate"] for row in measured["rows"])
            print(f"| {title} | {seconds:.2f} |", flush=True)


def add_rounds(table, rounds, workloads, default):
    """Options of the tables whose sides take turns."""
    table.add_argument("--only", nargs="+", choices=workloads, default=default,
                       help="workloads; default: all")
    table.add_argument("--rounds", type=int, default=rounds, help="processes of each side on each workload")
    table.add_argument("--iterations", type=int, default=3, help="measured iterations of each process")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_subparsers(dest="table", required=True)
    rows = tables.add_parser("features")
    rows.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS),
                      help="rows to run; default: all")
    rows.add_argument("--steps", type=int, default=60, help="PPO steps per row")
    rows.add_argument("--output_dir", type=Path, default=Path("runs/features"),
                      help="folder for the runs and table.md")
    share = tables.add_parser("sharing")
    share.add_argument("--rounds", type=int, default=5, help="measured steps of each way")
    share.add_argument("--layers", type=int, default=30, help="depth of the model")
    ways = tables.add_parser("stages")
    ways.add_argument("--steps", type=int, default=5, help="PPO steps of each way")
    ways.add_argument("--only", nargs="+", help="models; default: all")
    fast = tables.add_parser("speed")
    add_rounds(fast, 3, [*WORKLOADS, *ON_GPU], default=None)        # None: all that this machine can run
    fast.add_argument("--no_growth", action="store_true", help="stop after the table")
    fast.add_argument("--base", type=Path,
                      help="folder of another checkout, whose trainer the fast one runs against")
    switched = tables.add_parser("levers")
    add_rounds(switched, 2, [*WORKLOADS, *LONG], default=[*WORKLOADS, *LONG])
    switched.add_argument("--levers", nargs="+", choices=list(MEASURED_ON), default=list(MEASURED_ON),
                          help="default: all")
    grown = tables.add_parser("growth")
    for table in (fast, switched, grown):
        table.add_argument("--output_dir", type=Path, default=Path("bench"),
                           help="folder for the tables and the plot")
    for table in (fast, grown):
        table.add_argument("--no_peer", action="store_true", help="plainppo alone")
        table.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 512],
                           help="response tokens, at batch 16")
        table.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128, 256],
                           help="at 24 response tokens")
    beside = tables.add_parser("neighbour")
    beside.add_argument("--iterations", type=int, default=3, help="measured rollouts of each row")
    step = tables.add_parser("profile")
    step.add_argument("--workload", choices=[*WORKLOADS, *ON_GPU], default="W1", help="whose step()")
    for table in (fast, step):
        table.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    step.add_argument("--batch_size", type=int, help="responses of the step; default: the workload's")
    return parser


def main():
    arguments = make_parser().parse_args()
    {"features": features, "sharing": sharing, "stages": stages, "speed": speed, "levers": levers,
     "growth": growth, "profile": profile, "neighbour": neighbour}[arguments.table](arguments)


if __name__ == "__main__":
    main()
