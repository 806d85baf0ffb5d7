"""A process that has imported everything once and forks real runs of scripts/train.py: one starts in a third of a second.

    python tests/forge.py               # one JSON request a line on stdin, one JSON answer a line on stdout; class Forge is its other end
    python tests/forge.py train ...     # a run in this process
A forked run is a process of its own, with its own group of processes, and dies for real. Its parent has no second thread and has
made no Accelerator, so nothing is shared but what was imported.
"""
import faulthandler
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Forge:
    """What a test holds: start(...) -> pids, wait(pids) -> exit codes as subprocess has them."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                       "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen([sys.executable, str(HERE / "forge.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, arguments, output, ranks=1, do="train", **environment):
        """`output`: file that standard output and error of all ranks are added to."""
        Path(output).touch()        # a process may be killed before it opens it
        return self.ask(do=do, arguments=[str(a) for a in arguments], output=str(output), ranks=ranks, environment=environment)

    def wait(self, pids, seconds=120):
        """None for a process that did not end in time; it is killed."""
        return self.ask(do="wait", pids=pids, seconds=seconds)

    def run(self, *arguments, seconds=120, **more):
        return self.wait(self.start(*arguments, **more), seconds)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def make_inputs(folder):
    """A language model of 40 kB with its tokenizer, prompts, and a reward that draws from Python's generator. -> flags for train.py"""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    words = ["<pad>", "<end>", *(f"w{i}" for i in range(62))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1))
    model.save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>").save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("".join(f"w{i} w{i * 7 % 60} w{i * 11 % 53}\n" for i in range(60)))
    (folder / "reward.py").write_text("import os, random, time\ncalls = []\ndef score(prompts, responses):\n"
                                      "    calls.append(1)\n"
                                      "    if os.environ.get('SLEEP') == f\"{len(calls)}:{os.environ.get('RANK', 0)}\":\n"
                                      "        time.sleep(1000)\n"
                                      "    return [len(r) / 10 + random.random() for r in responses]\n")
    return ["--cpu", "--model_name", folder / "model", "--prompts", folder / "prompts.txt", "--reward_fn", f"{folder}/reward.py:score",
            "--batch_size", 4, "--mini_batch_size", 1, "--ppo_epochs", 1, "--max_new_tokens", 4, "--eval_prompts", 4,
            "--learning_rate", "1e-3", "--use_score_scaling", "--target", 0.1, "--horizon", 20, "--collective_timeout", 10]


# ------------------------------------------------------------------------------------------------ the forge's own side


def train_run(arguments):
    """scripts/train.py, which also writes which tokens each step got to learn from: tokens-<rank>.jsonl in the run's folder.

    What goes wrong on the way is asked for in the environment: FAULT, FILL and SOAK, see below.
    """
    import train
    if "DETERMINISTIC" in os.environ:
        train.torch.use_deterministic_algorithms(True)
    if "SHARE_GPU" in os.environ:
        share_gpu(int(arguments[arguments.index("--collective_timeout") + 1]))
    original = train.PPOTrainer.step

    def step(trainer, queries, responses, scores):
        folder = Path(trainer.accelerator.project_configuration.logging_dir)
        if "SOAK" not in os.environ:
            with open(folder / f"tokens-{trainer.accelerator.process_index}.jsonl", "a") as file:
                print(json.dumps([trainer.steps_done + 1, [r.tolist() for r in responses]]), file=file)
        return original(trainer, queries, responses, scores)

    train.PPOTrainer.step = step
    for name, prepare in (("FAULT", fault), ("FILL", fill), ("SOAK", soak)):
        if name in os.environ:
            prepare(train, *os.environ[name].split(":"))
    try:
        sys.exit(train.main(arguments))
    except ValueError as error:     # as its last lines do
        sys.exit(f"error: {error}")


def share_gpu(timeout=600):
    """Before the first Accelerator: this process takes a GPU that others take, too. NCCL refuses that; gloo goes through the CPU."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState
    os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    PartialState(backend="gloo", timeout=timedelta(seconds=timeout))


def raise_out_of_memory():
    """torch's error, with the text that it has on a GPU; where there is one, by asking it for more than it has."""
    import torch
    if torch.cuda.is_available():
        torch.empty(torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.44 MiB is free. Including "
        "non-PyTorch memory, this process has 79.10 GiB memory in use. Of the allocated memory 78.02 GiB is allocated by PyTorch, and "
        "312.45 MiB is reserved by PyTorch but unallocated.")


def before_call(owner, name, do, number=1):
    """`do()` before the `number`-th call of owner.name."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            do(*args)
        return original(*args, **kwargs)
    setattr(owner, name, wrapped)


def fault(train, kind, phase, rank):
    """FAULT=kill|stop|raise|slow|memory:rollout|reward|update:<rank>, in the second step."""
    if os.environ.get("RANK", "0") != rank:
        return

    def fail(*_):
        if kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        elif kind == "raise":
            raise ArithmeticError("planted")
        elif kind == "memory":
            raise_out_of_memory()
        else:
            time.sleep(1000)
    # the evaluation before the first step writes and scores, too
    owner, name, number = {"rollout": (train.PPOTrainer, "generate", 3), "reward": (train.rewards, "score_texts", 3),
                           "update": (train.PPOTrainer, "optimizer_step", 6)}[phase]
    before_call(owner, name, fail, number)


def fill(train, method, number, left, disk):
    """FILL=<method>:<number>:<bytes>:<disk>: before that call a neighbour writes to the disk until only so many bytes are free."""
    def neighbour(*_):
        if os.environ.get("RANK", "0") == "0":
            with open(f"{disk}/neighbour", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - int(left))
    owner = next(owner for owner in (train.RunFolder, train, train.PPOTrainer) if hasattr(owner, method))
    before_call(owner, method, neighbour, int(number))


def soak(train, every, leak):
    """SOAK=<n>:<leak>: every n-th step writes to soak.json what this process holds. leak: what is lost at each step, or nothing."""
    import ctypes
    import gc

    import psutil
    import torch

    class Heap(ctypes.Structure):       # malloc.h: mallinfo2
        _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                                                         "fordblks", "keepcost")]
    heap = ctypes.CDLL(None).mallinfo2
    heap.restype = Heap
    process, found, lost, original, every = psutil.Process(), [], [], train.one_step, int(every)

    def measure(step):
        gc.collect()
        return {"step": step, "files": process.num_fds(), "threads": process.num_threads(), "time": time.process_time(),
                "tensors": sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()), "bytes": process.memory_info().rss,
                # freed memory is kept, see speed.keep_freed_memory, and a small leak would hide in it for long
                "heap": heap().uordblks + heap().hblkhd}

    def one_step(trainer, reward, prompts, step, run):
        original(trainer, reward, prompts, step, run)
        if leak == "bytes":
            lost.append(bytearray(1000))
        elif leak == "tensors":
            lost.append(torch.zeros(1))
        elif leak == "files":
            lost.append(open(os.devnull))
        elif leak == "threads" and step % 100 == 0:
            lost.append(threading.Thread(target=time.sleep, args=(1000,), daemon=True))
            lost[-1].start()
        if step < every:
            measure(step)       # takes megabytes itself, for which the allocator makes room once
        elif step % every == 0:
            found.append(measure(step))
            (run.folder / "soak.json").write_text(json.dumps(found))
    train.one_step = one_step


def fork(request, rank, port):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        faulthandler.register(signal.SIGUSR1)
        os.environ.update(request["environment"])
        if request["ranks"] > 1:
            for name, value in (("RANK", rank), ("WORLD_SIZE", request["ranks"]), ("MASTER_PORT", port)):
                os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        train_run(request["arguments"])
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr, flush=True)
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)      # not through what this fork inherited: the loop that reads requests


def wait(pids, seconds):
    codes, end = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGUSR1)        # it prints where it is
                time.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def import_and_warm_up():
    """What a run would import or compile as it goes."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "scripts")]
    os.environ["DS_ACCELERATOR"] = "cpu"
    import accelerate.data_loader  # noqa: F401
    import deepspeed  # noqa: F401      transformers does, to save
    import psutil  # noqa: F401
    import run_folder
    import train
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel  # noqa: F401
    train.transformers.utils.logging.disable_progress_bar()     # they have a thread
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=2, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)).save_pretrained(folder)
        train.AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    names = ("ppo/mean_raw_scores", "objective/kl", "ppo/policy/entropy", "ppo/loss/policy", "ppo/loss/value")
    run_folder.draw_curves([{"step": 1, **dict.fromkeys(names, 0.0)}], io.BytesIO())
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would inherit half of what a second thread was doing"


def serve():
    import_and_warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "wait":
            answer = wait(request["pids"], request["seconds"])
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            answer = [fork(request, rank, port) for rank in range(request["ranks"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:      # one run in this process, for a launcher
        sys.path[:0] = [str(HERE.parent), str(HERE.parent / "scripts")]
        train_run(sys.argv[2:])
    else:
        serve()
