"""One run on one process or on many, with or without DeepSpeed: set-up, sums, generation, optimizer steps, saving, device cache.

Why: an update that means the same on 1 and on N processes needs every mean to be a global one. A mean of the ranks' means
weighs a rank with short responses as much as one with long ones, and a statistic that differs between ranks (the KL
coefficient, a decision to stop) makes them drift apart or wait for each other for ever. DeepSpeed adds one more way to wait:
under ZeRO-3 a forward pass is a collective operation, so a rank that has finished writing must keep its neighbours company.
Source: accelerate's Accelerator; Rajbhandari et al. 2020 (arXiv 1910.02054): ZeRO-1 shards the optimizer's state over the
processes, ZeRO-2 the gradients too, ZeRO-3 also the weights.
Differs from TRL 0.11.4 in: sums are really reduced (there, all_reduce worked on a copy, and 2 ranks held KL coefficients
0.1906 and 0.2098 after 3 steps); seeding is one explicit call, before any model is made; under DeepSpeed accumulation, skipped
steps and max_grad_norm mean what they mean without it (there, every mini-batch stepped, and clipping was ignored).
Shapes: `sum_over_processes` keeps the shape of what it is given.
Copy me: needs torch, numpy and accelerate, and deepspeed where it is launched with it. Tested by tests/test_distributed.py.
"""
import ctypes
import errno
import gc
import hashlib
import importlib.util
import json
import logging
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import is_initialized
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, ProjectConfiguration

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------ the machine


def start(log_with=None, project_dir=None, mixed_precision=None, cpu=False, timeout=600, **kwargs):
    """The Accelerator of this process: which device, how many processes, which trackers. Call it first, once.

    The same call serves `python`, `torchrun` and `accelerate launch`, GPUs and CPUs, with and without DeepSpeed. cpu=True stays
    on the CPU where there is a GPU. timeout: seconds that a process waits for the others before it gives up. Gradient
    accumulation is not accelerate's business here: it divides by the number of mini-batches, and ppo_core divides by tokens.
    ValueError: the tracker's package or DeepSpeed is not installed, or the machine cannot do what was asked.
    """
    if log_with is not None and importlib.util.find_spec(log_with) is None:
        raise ValueError(f"log_with is {log_with!r} but that package is not installed; run: pip install {log_with}")
    # A launcher starts several processes on a machine without a GPU, too; unless told, accelerate takes each for a run of its own.
    cpu = cpu or not torch.accelerator.is_available()
    if not torch.accelerator.is_available():
        fast_float32_products()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")      # transformers imports deepspeed to save, which else warns that it found no GPU
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        cpu = prepare_for_deepspeed(cpu, kwargs, timeout)
    handlers = [*kwargs.pop("kwargs_handlers", []), InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))]
    accelerator = Accelerator(log_with=log_with, mixed_precision=mixed_precision, cpu=cpu, kwargs_handlers=handlers,
                              project_config=ProjectConfiguration(project_dir=project_dir) if project_dir else None, **kwargs)
    if not torch.accelerator.is_available() and zero_stage(accelerator) < 3:
        keep_freed_memory()
    return accelerator


def fast_float32_products(force=False):
    """On AMD processors with AVX-512, from now on, let oneDNN multiply float32 matrices instead of MKL, which uses half their width there.

    Twice as fast in a forward and a backward pass, and as exact: still float32, added up in another order. Elsewhere it does nothing
    (force: for the test). Only 2-D products go this way; that is every linear layer. -> True if it was done.
    """
    with open("/proc/cpuinfo", encoding="utf-8") if os.path.exists("/proc/cpuinfo") else nullcontext([]) as lines:
        amd = any("AuthenticAMD" in line for line in lines)
    fits = amd and torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.backends.mkldnn.is_available()
    if not (fits or force) or "library" in vars(fast_float32_products):
        return fits
    aten, linear = torch.ops.aten, torch.ops.mkldnn._linear_pointwise       # what torch's own compiler calls for a linear layer

    def usual(a, b):
        # oneDNN builds a kernel for each size, which stays. The number of tokens is what varies; ppo_core.even_size makes it a multiple of 8.
        # Fewer than 8 rows are a rollout of few prompts: few sizes, and MKL takes twice as long for their next token.
        varied = any(n % 8 and least < n < 4096 for n, least in zip(a.shape, (8, 0)))
        return varied or a.dtype != torch.float32 or b.dtype != torch.float32 or 0 in (a.numel(), b.numel())

    def mm(a, b):                                                                                   # (M, K), (K, N) -> (M, N)
        if usual(a, b):
            return aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))      # the kernel that was there, by its other name
        return linear(a, b.t(), None, "none", [], "")

    def addmm(bias, a, b, *, beta=1, alpha=1):
        if usual(a, b) or bias.dtype != torch.float32 or bias.ndim != 1 or len(bias) != b.shape[1] or beta != 1 or alpha != 1:
            return aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))
        return linear(a, b.t(), bias, "none", [], "")

    library = fast_float32_products.library = torch.library.Library("aten", "IMPL")     # it holds as long as this object lives
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")        # it is meant
        library.impl("mm", mm, "CPU", allow_override=True)
        library.impl("addmm", addmm, "CPU", allow_override=True)
    return True


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next ones, for as long as the process lives.

    Unless told, it gives each large block back to the system and takes it again page by page, which took an eighth of a step's time.
    The highest point, which is what has to fit, stays within 3 % in one process and DDP (SmolLM2-135M's shape, 2 processes). ZeRO-1 pays
    a fifth more memory for a quarter less time; ZeRO-3, which makes and frees every weight all the time, would pay a third more for an
    eighth less, and who chose it wants memory: `start` leaves it alone. Elsewhere than on Linux with glibc it does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # malloc.h
        libc.mallopt(M_MMAP_THRESHOLD, 2 ** 30)
        libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def tracker_arguments(log_with, folder):
    """-> init_kwargs for accelerate's `init_trackers`. Without an account wandb would ask a question and wait: it logs offline."""
    if log_with != "wandb":
        return {}
    import wandb
    arguments = {"dir": folder}
    if wandb.api.api_key is None and "WANDB_MODE" not in os.environ:
        logger.warning("no wandb account is set up here: logging offline below %s; `wandb sync` uploads it later", folder or "wandb/")
        arguments["mode"] = "offline"
    return {"wandb": arguments}


def prepare_for_deepspeed(cpu, kwargs, timeout):
    """What has to be said before the Accelerator exists. -> the `cpu` to give it; adds the plugin to its `kwargs`."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("this run was launched with DeepSpeed but deepspeed is not installed; run: pip install deepspeed ninja")
    check_build_locks()
    # DeepSpeed 0.19 calls torch's collectives by their older names, about which torch 2.13 warns again and again.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning)
    if cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        if torch.accelerator.is_available():
            raise ValueError(f"the CPU was asked for, but DeepSpeed takes the {torch.accelerator.device_count()} GPU(s) it sees; hide "
                             "them with CUDA_VISIBLE_DEVICES= in front of the command, or leave the CPU flag out")
        # accelerate takes its own cpu=True for "without DeepSpeed". What works is a gloo group that is there before the
        # Accelerator looks for one.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        PartialState(backend="gloo", timeout=timedelta(seconds=timeout))
    if not is_initialized():        # a second Accelerator takes over the plugin of the first
        kwargs.setdefault("deepspeed_plugin", Zero3InitPlugin())
    return False


def check_build_locks(minutes=15):
    """DeepSpeed compiles a small operator at its first run. Killed there, it leaves a lock on which each later run waits for ever."""
    from torch.utils.cpp_extension import get_default_build_root
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    roots = [Path(own)] if own else Path(get_default_build_root()).glob("*")        # one folder per version of Python and CUDA
    # the operators that a run may need: exchange between CPU processes, and DeepSpeed's own Adam where someone passes it
    for lock in (root / name / "lock" for root in roots for name in ("deepspeed_shm_comm", "cpu_adam", "fused_adam")):
        if not lock.exists():
            continue
        age = (time.time() - lock.stat().st_mtime) / 60
        if age > minutes:
            raise ValueError(f"{lock} is {age:.0f} minutes old: a process that compiled an operator of DeepSpeed was killed, and this run "
                             f"would wait for it for ever; delete that file (a build takes about 2 minutes, {minutes} are allowed)")


class Zero3InitPlugin(DeepSpeedPlugin):
    """accelerate's plugin, whose zero3_init_flag also reaches transformers.

    transformers shards what `from_pretrained` loads whenever it has seen a ZeRO-3 config, and accelerate shows it one whatever
    the flag says. A reward model made inside `zero3_init_context_manager(enable=False)` would still come out as empty tensors.
    """

    def set_deepspeed_weakref(self):
        super().set_deepspeed_weakref()
        if not self.zero3_init_flag:
            from transformers.integrations import unset_hf_deepspeed_config
            unset_hf_deepspeed_config()


def zero3_init_disabled(accelerator):
    """Context in which models load whole, as one that is not trained must; without ZeRO-3 they do so anyway."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or not plugin.is_zero3_init_enabled():
        return nullcontext()
    return plugin.zero3_init_context_manager(enable=False)


def seed_everything(seed, rank=0):
    """Python, numpy and torch. Before the model is made, with rank 0 everywhere: all ranks must get the same value head.

    After it, with the rank: each must sample other responses than its neighbour, and the whole run is reproducible.
    """
    for seeder in (random.seed, np.random.seed, torch.manual_seed):      # torch's seeds every device too
        seeder(seed + rank)


# ------------------------------------------------------------------------------------------------- between processes


def sum_over_processes(accelerator):
    """-> function(tensor) -> the tensor summed over all processes, the same bits on each. One process: itself."""
    def reduce(tensor):
        return accelerator.reduce(tensor, reduction="sum") if accelerator.num_processes > 1 else tensor
    return reduce


def gather_lists(accelerator, items):
    """A list from each process -> one list, in rank order, on every process."""
    if accelerator.num_processes == 1:
        return list(items)
    from accelerate.utils import gather_object
    return gather_object(list(items))


def end(accelerator):
    """Close the trackers and the group of processes. All must call, last.

    gloo's threads let go of a sum's tensors a moment after the sum is known, and need Python's lock for it. Ending the group waits for
    these threads and holds that lock: for ever, if one of them is late. So all wait until there is nothing left to let go of.
    """
    accelerator.wait_for_everyone()
    time.sleep(0.1)
    accelerator.end_training()


@contextmanager
def together(accelerator, kind=ValueError):
    """A check that may fail on one process: then all stop, each with that process's message. kind: the exception it raises.

    Without it the others would wait for ever in their next sum. Every process must come here; costs one sum of one number.
    """
    failure = None
    try:
        yield
    except kind as error:
        failure = error
    if accelerator.num_processes > 1:
        mine = torch.tensor(float(failure is not None), device=accelerator.device)
        if accelerator.reduce(mine, reduction="sum") > 0:
            messages = gather_lists(accelerator, [str(failure) if failure is not None else None])
            raise kind("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(messages) if text is not None)) from failure
    if failure is not None:
        raise failure


@contextmanager
def phase(accelerator, name):
    """Whatever goes wrong inside is said with the rank and the phase, and goes on its way.

    The process then ends and its launcher ends the others, whose messages (a lost connection) would say nothing by themselves. One
    that waited in vain for another says where that one is: each tells the group's store which phase it enters.
    """
    if accelerator.num_processes == 1:
        yield
        return
    here = {"phase": name, "since": time.time(), "pid": os.getpid(), "machine": platform.node()}
    torch.distributed.group.WORLD.get_group_store().set(f"phase of rank {accelerator.process_index}", json.dumps(here))
    try:
        yield
    except Exception as error:
        print(f"rank {accelerator.process_index} of {accelerator.num_processes} fails in {name}: {type(error).__name__}: {error}",
              file=sys.stderr, flush=True)
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):      # gloo's are plain RuntimeErrors
            say_where_others_are(accelerator, end_them="timed out" in str(error).lower())
        raise


def say_where_others_are(accelerator, end_them):
    """One line for each other rank: its last phase, and whether it still runs. end_them: those of this launcher, at once.

    A rank that is stopped, or waits for something else, does not hear the launcher's SIGTERM, and its SIGKILL comes 30 s later.
    """
    siblings, until = [], time.monotonic() + (0 if end_them else 1)     # a process that was killed needs a moment to vanish
    for rank, there in told_by_others(accelerator).items():
        state = f"on {there['machine']}"
        if there["machine"] == platform.node():
            state, sibling = state_of_process(there["pid"], until)
            siblings += [sibling] if sibling is not None else []
        print(f"rank {accelerator.process_index} waited for rank {rank}, which has been in {there['phase']} for "
              f"{time.time() - there['since']:.0f} s and is {state}", file=sys.stderr, flush=True)
    for process in siblings if end_them else []:
        process.kill()


def told_by_others(accelerator, patience=3.0):
    """-> {rank: what `phase` told the store last}. The store is the launcher's; without one it is rank 0's, and dies or stops with it."""
    store, told = torch.distributed.group.WORLD.get_group_store(), {}

    def ask():      # in a thread: a store that is stopped never answers, and has no time-out
        for rank in sorted(set(range(accelerator.num_processes)) - {accelerator.process_index}):
            if store.check([f"phase of rank {rank}"]):
                told[rank] = json.loads(store.get(f"phase of rank {rank}"))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    if not told:
        print(f"rank {accelerator.process_index} waited in vain, and rank 0, which keeps the list of phases, does not answer",
              file=sys.stderr, flush=True)
    return dict(told)


def state_of_process(pid, until):
    """-> in words, what a process of this machine does; and its psutil.Process if it is alive and a child of our own parent.

    A pid of another container, or one that was given away again, is not. until: time up to which it may still stop or vanish.
    """
    import psutil       # accelerate needs it too
    try:
        process = psutil.Process(pid)
        while (status := process.status()) not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE) and time.monotonic() < until:
            time.sleep(0.05)
        sibling = process if process.ppid() == os.getppid() else None
    except psutil.NoSuchProcess:
        return "dead", None
    if status == psutil.STATUS_ZOMBIE:
        return "dead", None
    return ("stopped by a signal" if status == psutil.STATUS_STOPPED else f"still there ({status})"), sibling


@contextmanager
def stop_signals(accelerator):
    """-> function() -> the number of a signal that asks any process to stop, SIGINT or SIGTERM; 0 for none. All must call it.

    Each then knows at the same point of the run, where nothing is half done. A second Ctrl-C ends its process at once, and so does
    what a launcher sends after one. A second SIGTERM does not: a scheduler sends it to every process, and the launcher once more.
    """
    numbers, received = (signal.SIGINT, signal.SIGTERM), []

    def note(number, frame):
        received.append(number)
        os.write(2, f"{signal.Signals(number).name}: this step is finished and saved first; Ctrl-C stops at once\n".encode())
        for each in numbers if number == signal.SIGINT else (signal.SIGINT,):
            signal.signal(each, signal.SIG_DFL)         # the system's: it works inside a long computation, too

    def asked():
        flags = torch.tensor([float(number in received) for number in numbers], device=accelerator.device)
        flags = sum_over_processes(accelerator)(flags).tolist()
        return next((int(number) for number, flag in zip(numbers, flags) if flag), 0)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------------------------------- models


def zero_stage(accelerator):
    """0 without DeepSpeed; 1, 2, 3."""
    return 0 if accelerator.state.deepspeed_plugin is None else accelerator.state.deepspeed_plugin.zero_stage


def unwrap(model):
    """The model inside DDP's wrapper or DeepSpeed's engine. accelerate's own would first import deepspeed, wherever it is installed."""
    return getattr(model, "module", model)


def prepare_model(accelerator, model, optimizer, micro_batch_size, max_grad_norm, accumulation_steps=1):
    """-> model and optimizer as this run needs them: as they are, in DDP, or as a DeepSpeed engine and its optimizer.

    DeepSpeed has settings of its own for what PPOConfig sets; ValueError when its config says something else.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(f"the accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps} and would divide "
                             f"every gradient by it; leave it at 1 there and set it in PPOConfig (now {accumulation_steps})")
        return accelerator.prepare(model, optimizer)
    settings = plugin.deepspeed_config
    for name, value, ours in (("gradient_clipping", max_grad_norm or 0.0, "max_grad_norm"),
                              ("train_micro_batch_size_per_gpu", micro_batch_size, "mini_batch_size"),
                              ("gradient_accumulation_steps", accumulation_steps, "gradient_accumulation_steps")):
        said = settings.get(name, "auto")
        if said not in ("auto", value) and not (name == "gradient_accumulation_steps" and said == 1):
            raise ValueError(f"{name} is {said} in the DeepSpeed config but {ours} is {value}; "
                             f"leave {name} out of the config (or 'auto'), or make both equal")
        settings[name] = value
    # The caller decides when a step is complete: the number of mini-batches in it varies (the last may be short), and a step may
    # be dropped. DeepSpeed must then neither count nor divide.
    settings["gradient_accumulation_steps"], settings["managed_gradient_accumulation"] = 1, False
    # Offload would otherwise replace the optimizer, SGD too, by DeepSpeed's own CPU Adam without a word. Who wants that passes it.
    settings["zero_force_ds_cpu_optimizer"] = False
    return accelerator.prepare(model, optimizer)


def prepare_reference(accelerator, model, movable=True):
    """The frozen reference: on the device; sharded like the policy under ZeRO-3; left alone if it cannot be moved (quantized)."""
    if not movable:
        return model
    if zero_stage(accelerator) < 3:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        if half is not None and accelerator.state.deepspeed_plugin is not None:
            # DeepSpeed casts the policy where autocast would leave it; a reference left as it was would differ from it at the first step.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(half)
        return model.to(accelerator.device)
    import copy

    import deepspeed
    settings = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    settings["zero_optimization"].pop("offload_optimizer", None)        # it has none
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


@contextmanager
def unwrapped_for_generation(accelerator, model, gather=True):
    """The bare model inside whatever is wrapped around it; neither DDP's wrapper nor DeepSpeed's engine has a `generate`.

    gather: under ZeRO-3, hold all weights on every process for as long as the context lasts. One exchange per rollout instead of
    one per layer and token, at the price of room for the whole model. False: layer by layer, for a model that has no such room.
    """
    bare = unwrap(model)
    if zero_stage(accelerator) < 3 or not gather or not any(hasattr(p, "ds_id") for p in bare.parameters()):
        yield bare
        return
    import deepspeed
    sharding = getattr(model.optimizer, "parameter_offload", model.optimizer)
    with deepspeed.zero.GatheredParameters(list(bare.parameters())):
        sharding._remove_module_hooks()         # they would give a layer's weights back as soon as it was used
        sharding.forward_hooks.clear()          # what is removed stays in these lists, and they would grow with every rollout
        sharding.backward_hooks.clear()
        try:
            yield bare
        finally:
            sharding.setup_zero_stage3_hooks()


def generates_in_step(accelerator, gather=True, batches=1):
    """True when a forward pass is a collective operation: then all must go on until the last has written its EOS.

    batches: how many this process is about to write. ValueError when they differ: some would wait for ever.
    """
    if zero_stage(accelerator) < 3 or gather or accelerator.num_processes == 1:
        return False
    counts = gather_lists(accelerator, [batches])
    if len(set(counts)) > 1:
        raise ValueError(f"the processes write {counts} batches, but layer by layer all must write the same number; give each as "
                         "many queries, or set ds3_gather_for_generation=True")
    return True


def full_state_dict(accelerator, model):
    """All weights, whatever the stage: on the main process (elsewhere it may be empty), on the CPU under ZeRO-3. All must call."""
    bare = unwrap(model)
    if zero_stage(accelerator) < 3:
        return bare.state_dict()
    import deepspeed
    state, seen = {}, {}
    for name, tensor in bare.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor]):           # one at a time: there may be no room for all
            if accelerator.is_main_process:
                # a tied weight stays one tensor under two names, as without ZeRO
                state[name] = seen.setdefault(id(tensor), tensor.detach().cpu().clone())
    return state


def whole_weights(model):
    """Context in which a model that was loaded in shares (zero3_init_flag) is whole, to copy it; a model that is whole stays so."""
    parameters = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        return nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(parameters)


def whole_numel(parameter):
    """Elements of a parameter, of which ZeRO-3 leaves no more than a share in this process."""
    return getattr(parameter, "ds_numel", parameter.numel())


def held_part(parameter):
    """What this process holds of a parameter. Under ZeRO-3 without what fills up the last share: DeepSpeed never writes it, so it may be NaN."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    share = parameter.ds_tensor.detach()
    return share[:max(0, parameter.ds_numel - parameter.ds_zero_partition_rank * share.numel())]


def not_finite_weights(model):
    """-> name of the first tensor with a NaN or infinity in what this process holds of it; None when all are finite."""
    own = {name: held_part(p) for name, p in unwrap(model).named_parameters()}
    # A sum reads them fastest. It may overflow where no weight is infinite, so it only says that one must look.
    if torch.stack([tensor.sum().float() for tensor in own.values()]).isfinite().all():
        return None
    return next((name for name, tensor in own.items() if not tensor.isfinite().all()), None)


# ------------------------------------------------------------------------------------------------- optimizer steps


def accumulate(accelerator, model, last):
    """Context of one backward pass: only the last of an optimizer step exchanges gradients between processes."""
    plain = accelerator.num_processes > 1 and accelerator.state.deepspeed_plugin is None
    return accelerator.no_sync(model) if plain and not last else nullcontext()


def backward(accelerator, model, loss):
    """Adds the gradients of `loss`. accelerate's own would also step, under DeepSpeed, before anyone has looked at the step."""
    if accelerator.state.deepspeed_plugin is None:
        accelerator.backward(loss)
    else:
        model.backward(loss)


def take_step(accelerator, model, optimizer, max_grad_norm=None):
    """One optimizer step with the gradients added so far. -> their norm over all processes, before clipping.

    None when the norm is not finite: then nothing was changed, and the gradients are still there to be dropped.
    """
    if accelerator.state.deepspeed_plugin is not None:
        model.step()                            # clips by the value that prepare_model put into its settings, and forgets
        # ZeRO-3 keeps the norm of the step before where it did not take this one.
        return finite(model.get_global_grad_norm()) if model.was_step_applied() else None
    # What this optimizer moves, which may be a part of the model. A list: an iterator would be empty from the second step on.
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    accelerator.unscale_gradients()             # fp16
    # Not clip_grad_norm_: it would multiply by a norm that is not finite, and nobody could tell any more which gradient was bad.
    norm = finite(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if norm is not None:
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm))
        optimizer.step()
        model.zero_grad()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()             # fp16 overflowed: lower the scale, and be ready for the next backward pass
    return norm


def scales_loss(accelerator, model):
    """True in fp16, where the loss is multiplied until gradients overflow now and then; the scale is lowered, and training goes on."""
    return accelerator.scaler is not None if accelerator.state.deepspeed_plugin is None else model.fp16_enabled()


def finite(number):
    return float(number) if np.isfinite(float(number)) else None


def drop_step(accelerator, model, optimizer):
    """Forget the gradients added so far: weights and optimizer state stay as they were, which a zero gradient would not do."""
    if accelerator.state.deepspeed_plugin is None:
        model.zero_grad()
        return
    optimizer.zero_grad()
    zero = model.optimizer
    zero.zero_grad()
    # zero_grad leaves the shares that were already exchanged, and the next backward pass would add to them.
    for shares in (getattr(zero, "averaged_gradients", {}), getattr(zero, "all_grad_tensors", {})):
        for group in shares:
            shares[group] = None
    if getattr(zero, "cpu_offload", False):     # ZeRO-1 and 2; ZeRO-3's zero_grad starts its count anew
        zero.micro_step_id, zero._offload_accumulated_param_ids = -1, set()


# ------------------------------------------------------------------------------------------------------- memory


def clear_device_cache(device):
    """Give the device's cached blocks back to its allocator, so that the next phase can cut them to its own sizes.

    Costs a synchronisation and new allocations; helps when generation and update take turns to fill the memory.
    """
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def peak_memory(device):
    """Bytes at the highest point so far: of the device's allocator, or of this whole process on a CPU."""
    if device.type == "cpu":
        status = Path("/proc/self/status")
        own = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
        if own is not None:
            return 1024 * int(own[1])
        # Where the kernel does not say it. Second choice, as this begins with what the program that started this one then had.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak        # Linux counts in KiB
    return getattr(torch, device.type).max_memory_allocated()


def largest_peak_memory(accelerator):
    """`peak_memory` of the process that needed most. All must call."""
    return max(gather_lists(accelerator, [peak_memory(accelerator.device)]))


# --------------------------------------------------------------------------------------------------- checkpoints

MANIFEST = "manifest.json"
FULL = os.strerror(errno.ENOSPC)        # No space left on device


@contextmanager
def writes(accelerator):
    """Files are written inside, by one process or by all, and nothing is exchanged. A write that fails on one is an OSError on all."""
    with together(accelerator, OSError):
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) or FULL not in str(error):
                raise
            raise OSError(errno.ENOSPC, FULL) from error        # safetensors and tokenizers have exceptions of their own


@contextmanager
def os_error_is_one_sentence(path, needed):
    """An OSError inside becomes a ValueError: on a full disk with the bytes that were needed, or nearly so, and those that are free."""
    try:
        yield
    except OSError as error:
        there = next(place for place in Path(path).absolute().parents if place.exists())
        room = f"; it needs {needed:,} bytes and {shutil.disk_usage(there).free:,} are free; make room" if FULL in str(error) else ""
        raise ValueError(f"{path} was not written: {error}{room}, and resume the run") from error


@contextmanager
def whole_folder(accelerator, folder, needed=0):
    """-> a folder to fill, on every process. When the context ends well it becomes `folder`; a run killed before leaves none.

    The order is what makes it safe: every file to the disk, then the manifest with their sizes and SHA-256 sums, then one rename.
    What writes inside does so in `writes`. needed: bytes, which must be free before it begins. ValueError: `folder` is there already,
    or the disk is full, and then nothing is left of it.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    with together(accelerator):
        if accelerator.is_main_process and folder.exists():
            raise ValueError(f"{folder} is there already, and is left as it is; choose another name or move it away")
    with os_error_is_one_sentence(folder, needed):
        try:
            with writes(accelerator):
                if accelerator.is_main_process:
                    make_room(partial, needed)
            yield partial
            with writes(accelerator):
                if accelerator.is_main_process:
                    seal(partial, folder)
        except OSError:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def make_room(partial, needed):
    """An empty folder. OSError when its disk cannot take so many bytes: before they are written rather than after half of them."""
    if partial.exists():        # of a run that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    if shutil.disk_usage(partial).free < needed:
        raise OSError(errno.ENOSPC, FULL)


def seal(partial, folder):
    """Every file to the disk, then the manifest, then the rename."""
    files = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
    for path in files.values():
        to_disk(path)
    entries = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
    (partial / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    give_usual_modes(partial)
    for path in (partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial):
        to_disk(path)
    os.replace(partial, folder)
    for parent in (folder.parent, folder.parent.parent):        # the folder's new name, and its parent's, which may be new too
        to_disk(parent)


def give_usual_modes(folder):
    """To every file in it what the umask asks for: safetensors writes for the owner alone, whatever was asked for."""
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def to_disk(path):
    """Wait until a file, or the list of names in a folder, is on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def damage(folder):
    """What is wrong with a folder made by `whole_folder`, as half a sentence; None when every file is as it was written."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so it was never finished"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if there != set(expected):
        return f"{min(there ^ set(expected))} is {'not in its manifest' if there - set(expected) else 'missing'}"
    for name, (size, digest) in expected.items():
        found = (folder / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if sha256(folder / name) != digest:
            return f"{name} is not what was written: its SHA-256 differs"
    return None


def random_states(device):
    """Where every random generator of this process stands, as what JSON can hold."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": bytes(torch.get_rng_state().tolist()).hex()}
    if device.type != "cpu":
        states[device.type] = bytes(getattr(torch, device.type).get_rng_state(device).tolist()).hex()
    return states


def set_random_states(states, device):
    """The inverse of `random_states`."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(states["torch"])), dtype=torch.uint8))
    if device.type in states:
        getattr(torch, device.type).set_rng_state(torch.tensor(list(bytes.fromhex(states[device.type])), dtype=torch.uint8), device)


if __name__ == "__main__":
    accelerator = start(cpu=True)
    seed_everything(0, rank=accelerator.process_index)
    reduce = sum_over_processes(accelerator)
    tokens = torch.tensor([3.0 + accelerator.process_index])                                       # (1,)
    print(f"process {accelerator.process_index} of {accelerator.num_processes} on {accelerator.device}")
    print("my tokens", tokens.item(), "all tokens", reduce(tokens).item())
    print("everybody's ranks:", gather_lists(accelerator, [accelerator.process_index]))
    clear_device_cache(accelerator.device)
    print(f"peak memory {peak_memory(accelerator.device) / 1e6:.0f} MB")
