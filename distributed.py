"""One run on one process or on many, with or without DeepSpeed: set-up, sums, generation and optimizer steps.

Why: N processes train as one only if every mean is taken over all of them. A number that differs between them
(the KL coefficient, a decision to stop) makes their weights drift apart, or makes one wait for ever. Under
ZeRO-3 each forward pass is a collective operation: a process whose responses are finished must still run it.
Source: accelerate's Accelerator; Rajbhandari et al. 2020 (arXiv 1910.02054): ZeRO-1 shards the optimizer's
state over the processes, ZeRO-2 also the gradients, ZeRO-3 also the weights.
Differs from TRL 0.11.4 in: sums are really reduced (there, 2 processes held the KL coefficients 0.1906 and
0.2098 after 3 steps); seeding is one explicit call; gradient accumulation, skipped steps and max_grad_norm
mean the same with and without DeepSpeed.
Shapes: a sum has the shape of its tensor; parameters and gradients may have any shape.
Copy me: needs torch, numpy, safetensors and accelerate, and deepspeed for a run that is launched with it, on
Linux or macOS. Tested by tests/test_distributed.py.
"""
import copy
import errno
import functools
import gc
import importlib.util
import logging
import os
import random
import resource         # Unix
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import is_initialized
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, gather_object
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------- the machine


def start(log_with=None, project_dir=None, mixed_precision=None, cpu=False, timeout=600, **kwargs):
    """-> the Accelerator: this process's device, the number of processes, the tracker. Call it first.

    The same call serves `python`, `torchrun` and `accelerate launch`, on GPUs and CPUs, with and without
    DeepSpeed. cpu=True: stay on the CPU although there is a GPU. timeout: seconds that a process waits for
    the others. kwargs: go to the Accelerator. ValueError: a package is missing, or the machine cannot do what
    is asked.
    """
    if log_with is not None and importlib.util.find_spec(log_with) is None:
        raise ValueError(f"log_with is {log_with!r}, which is not installed; run: pip install {log_with}")
    if not torch.accelerator.is_available():
        # Otherwise accelerate takes each launched process for a run of its own, and DeepSpeed wants a GPU.
        cpu = True
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    plugin = None
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        # accelerate understands cpu=True as "without DeepSpeed".
        cpu, plugin = False, prepare_for_deepspeed(cpu, timeout)
    elif cpu:
        warn_of_spinning_threads()
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    return Accelerator(log_with=log_with, project_dir=project_dir, mixed_precision=mixed_precision, cpu=cpu,
                       deepspeed_plugin=plugin, kwargs_handlers=[waiting, *kwargs.pop("kwargs_handlers", ())],
                       **kwargs)


@functools.cache        # once per process
def warn_of_spinning_threads():
    """OpenMP's threads wait for each other without sleeping, so another busy program slows them down. OpenMP
    reads GOMP_SPINCOUNT when torch is loaded: setting it here would be too late."""
    if torch.get_num_threads() > 1 and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        logger.warning("torch uses %d CPU threads: another busy program can make a step ten times slower; "
                       "put GOMP_SPINCOUNT=4000 in front of the command", torch.get_num_threads())


def prepare_for_deepspeed(cpu, timeout):
    """-> the plugin for the Accelerator; None if it takes over that of an earlier one. On CPUs it also makes
    the group of processes, with gloo."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("launched with DeepSpeed, which is not installed; run: pip install deepspeed ninja")
    if cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        if torch.accelerator.is_available():
            raise ValueError(f"the CPU was asked for but DeepSpeed takes {torch.accelerator.device_count()} "
                             "GPU(s); hide them with CUDA_VISIBLE_DEVICES= or leave the CPU flag out")
        os.environ.pop("ACCELERATE_USE_CPU", None)
        PartialState(backend="gloo", timeout=timedelta(seconds=timeout))
    return None if is_initialized() else Zero3InitPlugin()


class Zero3InitPlugin(DeepSpeedPlugin):
    """accelerate's plugin, whose zero3_init_flag=False also reaches transformers. Otherwise even a model
    that is loaded under `zero3_init_disabled` would have empty tensors."""

    def set_deepspeed_weakref(self):
        super().set_deepspeed_weakref()
        if not self.zero3_init_flag:
            from transformers.integrations import unset_hf_deepspeed_config
            unset_hf_deepspeed_config()


def zero3_init_disabled(accelerator):
    """Context in which to load a model that is not trained: it becomes whole, under ZeRO-3, too."""
    plugin = accelerator.state.deepspeed_plugin
    enabled = plugin is not None and plugin.is_zero3_init_enabled()
    return plugin.zero3_init_context_manager(enable=False) if enabled else nullcontext()


def tracker_arguments(log_with, folder, given):
    """-> init_kwargs for accelerate's `init_trackers`: those of the user, `given`, and where to log. Without
    an account wandb would ask and wait, so then it logs offline."""
    if log_with != "wandb":
        return given
    import wandb
    settings = {"dir": folder, **given.get("wandb", {})}
    if "mode" not in settings and wandb.api.api_key is None and "WANDB_MODE" not in os.environ:
        logger.warning("no wandb account is set up: logging offline in %s; `wandb sync` uploads it", folder)
        settings["mode"] = "offline"
    return {**given, "wandb": settings}


def seed_everything(seed, rank=0):
    """Seed the random generators of Python, numpy and torch.

    Before the model is made with rank 0, as all processes must get the same value head; after that with the
    rank of the process, as each must sample other responses.
    """
    if rank > 0:
        # Not seed + rank: rank 1 of seed 0 would get the numbers of rank 0 of seed 1.
        seed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):      # torch's: all devices
        seed_one(seed)


def random_state(device):
    """-> the states of all random generators of this process, as `set_random_state` takes them."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state(device)
    return state


def set_random_state(state, device):
    """The inverse of `random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type], device)


def clear_device_cache(device):
    """Free the blocks that the device's allocator keeps for later: rollout and update need other sizes."""
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def peak_memory(device):
    """Most bytes in use at once so far: of the device's allocator, or of this whole process on a CPU."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM:" in status.read_text():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    # The second choice: it may be the peak of the program that started this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak        # Linux counts in KiB


def largest_peak_memory(accelerator):
    """`peak_memory` of the process that needed most. All processes must call it."""
    return max(gather_lists(accelerator, [peak_memory(accelerator.device)]))


# ---------------------------------------------------------------------------------------- between processes


def sum_over_processes(accelerator):
    """-> function(tensor) -> the tensor summed over all processes, the same bits on each."""
    several = accelerator.num_processes > 1
    return functools.partial(accelerator.reduce, reduction="sum") if several else lambda tensor: tensor


def gather_lists(accelerator, items):
    """A list from each process -> one list, in rank order, on every process."""
    return gather_object(list(items)) if accelerator.num_processes > 1 else list(items)


@contextmanager
def together(accelerator, kind=ValueError):
    """Context of a check that may fail on some processes only: then all of them raise `kind`.

    Otherwise the others would wait in their next sum for ever. All processes must enter the context. It
    costs one sum of one number.
    """
    failure = None
    try:
        yield
    except kind as error:
        failure = error
    if accelerator.num_processes > 1:
        failed = torch.tensor(float(failure is not None), device=accelerator.device)
        if accelerator.reduce(failed, reduction="sum") > 0:
            raise_jointly(accelerator, kind, failure)
    elif failure is not None:
        raise failure


def raise_jointly(accelerator, kind, failure):
    """On all processes: raise `kind` with the messages of those that failed.

    failure: this process's, or None: then those attributes of the first that are text or numbers are copied.
    """
    attributes = {} if failure is None else {**vars(failure), "errno": getattr(failure, "errno", None)}
    sent = {name: value for name, value in attributes.items() if isinstance(value, (str, int, float))}
    reports = gather_lists(accelerator, [None if failure is None else (str(failure), sent)])
    failures = {rank: report for rank, report in enumerate(reports) if report is not None}
    joint = kind("; ".join(f"rank {rank}: {message}" for rank, (message, _) in failures.items()))
    for name, value in (attributes or next(iter(failures.values()))[1]).items():
        setattr(joint, name, value)
    raise joint from failure


@contextmanager
def writes(accelerator):
    """Context in which one process writes files, or each does. If a write fails, all raise OSError.
    The processes must not exchange anything inside."""
    with together(accelerator, OSError):
        try:
            yield
        except SafetensorError as error:
            # safetensors gives no reason. As the folder could be made, the disk must be full.
            raise OSError(errno.ENOSPC, str(error)) from error


def end(accelerator):
    """Close the trackers and the group of processes. All processes must call this, as their last action."""
    accelerator.wait_for_everyone()
    # Ending the group holds Python's lock and waits for gloo's threads. These need the lock to release a
    # sum's tensors, a moment after its result is known, and gloo does not say when they have.
    time.sleep(0.1)
    accelerator.end_training()


# --------------------------------------------------------------------------------------------------- models


def zero_stage(accelerator):
    """0 without DeepSpeed, otherwise 1, 2 or 3."""
    return 0 if accelerator.state.deepspeed_plugin is None else accelerator.state.deepspeed_plugin.zero_stage


def unwrap(model):
    """The model inside DDP or DeepSpeed's engine. (accelerate's unwrap_model would import deepspeed.)"""
    return getattr(model, "module", model)


def quantized(model):
    """True for a model that is loaded in 8 or 4 bits. It can be neither moved, wrapped nor sharded."""
    return getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)


def prepare_model(accelerator, model, optimizer, micro_batch_size, max_grad_norm, accumulation_steps=1):
    """-> model and optimizer, wrapped as this run needs them.

    ValueError: the settings of accelerate or DeepSpeed contradict PPOConfig.
    """
    if accelerator.state.deepspeed_plugin is None:
        steps = accelerator.gradient_accumulation_steps
        if steps != 1:
            raise ValueError(f"accelerate has gradient_accumulation_steps={steps} and would divide by it; "
                             f"leave it at 1 there and set it in PPOConfig (now {accumulation_steps})")
        return accelerator.prepare(model, optimizer)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    wanted = (("gradient_clipping", max_grad_norm or 0.0, "max_grad_norm"),
              ("train_micro_batch_size_per_gpu", micro_batch_size, "mini_batch_size"),
              ("gradient_accumulation_steps", accumulation_steps, "gradient_accumulation_steps"))
    for name, value, field in wanted:
        found = settings.get(name, "auto")
        # accelerate writes 1 where the config says nothing about accumulation.
        if found not in ("auto", value) and not (name == "gradient_accumulation_steps" and found == 1):
            raise ValueError(f"{name} is {found} in the DeepSpeed config but {field} is {value}; "
                             f"leave {name} out of the config (or 'auto'), or make both equal")
        settings[name] = value
    # PPO decides when an optimizer step is complete. DeepSpeed must neither count mini-batches nor divide.
    # With offload it would also replace any optimizer, even SGD, by its own CPU Adam.
    settings.update(gradient_accumulation_steps=1, managed_gradient_accumulation=False,
                    zero_force_ds_cpu_optimizer=False)
    return accelerator.prepare(model, optimizer)


def prepare_reference(accelerator, model):
    """-> the frozen reference: on the device, or sharded under ZeRO-3. A quantized one stays as it is."""
    if quantized(model):
        return model
    if hasattr(model, "in_force") and zero_stage(accelerator) == 3:
        raise ValueError("with adapters 0 weights may be divided, as ZeRO-3 does; take ZeRO-2")
    if zero_stage(accelerator) < 3:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        if half is not None and accelerator.state.deepspeed_plugin is not None:
            # DeepSpeed casts the policy's weights; the KL must be 0 at the first step.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(half)
        return model.to(accelerator.device)
    import deepspeed
    settings = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    settings["zero_optimization"].pop("offload_optimizer", None)        # the reference has no optimizer
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


@contextmanager
def unwrapped_for_generation(accelerator, model, gather=True, batches=1):
    """Context -> (model, in_step). Neither DDP's wrapper nor DeepSpeed's engine has a `generate`.

    gather: under ZeRO-3, hold all weights on every process: one exchange, but they must fit into memory.
    Otherwise each forward pass exchanges them layer by layer, and in_step is True: all must go on until the
    last process has its EOS. batches: how many this process generates, the same number on all.
    """
    # policy: of an AdapterReference; otherwise None.
    with getattr(model, "in_force", nullcontext)() as policy:
        bare = policy or getattr(model, "module", model)
        sharded = any(hasattr(p, "ds_id") for p in bare.parameters())
        in_step = sharded and not gather and accelerator.num_processes > 1
        counts = gather_object([batches]) if in_step else [batches]
        if len(set(counts)) > 1:
            raise ValueError(f"the processes write {counts} batches, but layer by layer all must write the "
                             "same number; give each as many queries, or set ds3_gather_for_generation=True")
        with gathered(bare, model.optimizer) if sharded and gather else nullcontext():
            yield bare, in_step


@contextmanager
def gathered(bare, optimizer):
    """Hold all weights of a ZeRO-3 model on every process while the context lasts."""
    import deepspeed
    sharding = getattr(optimizer, "parameter_offload", optimizer)
    with deepspeed.zero.GatheredParameters(list(bare.parameters())):
        sharding._remove_module_hooks()     # the hooks would release a layer's weights as soon as it was used
        sharding.forward_hooks.clear()      # DeepSpeed leaves removed hooks in these lists, which would grow
        sharding.backward_hooks.clear()
        try:
            yield
        finally:
            sharding.setup_zero_stage3_hooks()


def full_state_dict(accelerator, model):
    """-> all weights, on the main process (on the CPU under ZeRO-3); on others it may be empty.

    All processes must call it.
    """
    bare = unwrap(model)
    if zero_stage(accelerator) < 3:
        return bare.state_dict()
    import deepspeed
    state, seen = {}, {}
    for name, tensor in bare.state_dict(keep_vars=True).items():
        # One at a time, as all may not fit into memory. A tied weight stays one tensor with two names.
        with deepspeed.zero.GatheredParameters([tensor]):
            if accelerator.is_main_process:
                state[name] = seen.setdefault(id(tensor), tensor.detach().cpu().clone())
    return state


def whole_weights(model):
    """Context in which a model that was loaded in shares (zero3_init_flag) is whole and can be copied."""
    parameters = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        return nullcontext()
    import deepspeed
    return deepspeed.zero.GatheredParameters(parameters)


def whole_numel(parameter):
    """Number of elements of the whole parameter, also where this process holds only a share of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def first_not_finite(model):
    """-> name of the first weight with NaN or infinity in the part that this process holds, or None."""
    parts = {}
    for name, parameter in unwrap(model).named_parameters():
        parts[name] = parameter.detach()
        if hasattr(parameter, "ds_tensor"):
            # ZeRO-3: a share. The last one ends with padding, which DeepSpeed never writes; it may be NaN.
            share = parameter.ds_tensor.detach()
            before = parameter.ds_zero_partition_rank * share.numel()
            parts[name] = share[:max(0, parameter.ds_numel - before)]
    # A sum is fastest, but may overflow without cause.
    # Offload leaves only some shares on the GPU.
    sums = [part.sum().float() for part in parts.values()]
    if torch.stack([part.to(sums[0].device) for part in sums]).isfinite().all():
        return None
    return next((name for name, part in parts.items() if not part.isfinite().all()), None)


# ------------------------------------------------------------------------------------------ optimizer steps


@contextmanager
def accumulate(accelerator, model, last):
    """Context of one mini-batch's forward and backward pass. -> function(loss) that adds its gradients."""
    if accelerator.state.deepspeed_plugin is not None:
        # accelerate's backward would also take the optimizer step.
        yield model.backward
        return
    # The processes exchange their gradients once per optimizer step, at its last mini-batch.
    with nullcontext() if last else accelerator.no_sync(model):
        yield accelerator.backward


def take_step(accelerator, model, optimizer, max_grad_norm=None):
    """One optimizer step with the gradients added so far. -> their norm over all processes, before clipping.

    If it is NaN or infinite, or None, no step was taken and drop_step has to follow. None is normal in fp16:
    a gradient overflowed, and the scale of the loss is lowered.
    """
    if accelerator.state.deepspeed_plugin is not None:
        model.step()        # clips by the max_grad_norm that prepare_model gave it
        # Where ZeRO-3 took no step, it still has the norm of the step before.
        norm = float(model.get_global_grad_norm()) if model.was_step_applied() else float("nan")
        return None if model.fp16_enabled() and not np.isfinite(norm) else norm
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    accelerator.unscale_gradients()         # fp16
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if np.isfinite(norm):
        # Clipping by a norm that is not finite would spoil every gradient and hide which one was bad.
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm))
        optimizer.step()
        model.zero_grad()       # all of them: the optimizer may hold only a part of the model
    elif accelerator.scaler is not None:
        accelerator.scaler.update()         # lowers the scale
        return None
    return norm


def drop_step(accelerator, model, optimizer):
    """Forget the gradients added so far; weights and optimizer state stay as they are."""
    if accelerator.state.deepspeed_plugin is None:
        model.zero_grad()
        return
    # The zero_grad of accelerate's wrapper does nothing, so take the optimizer of DeepSpeed inside it.
    zero = optimizer.optimizer
    zero.zero_grad()
    # zero_grad leaves the shares that were exchanged already, and the next backward pass would add to them.
    for shares in (getattr(zero, "averaged_gradients", {}), getattr(zero, "all_grad_tensors", {})):
        for group in shares:
            shares[group] = None
    if getattr(zero, "cpu_offload", False):     # ZeRO-1 and 2; in ZeRO-3 zero_grad resets this counter
        zero.micro_step_id, zero._offload_accumulated_param_ids = -1, set()


if __name__ == "__main__":
    accelerator = start(cpu=True)
    seed_everything(0, rank=accelerator.process_index)
    tokens = torch.tensor([3.0 + accelerator.process_index])                                       # (1,)
    print("process", accelerator.process_index, "of", gather_lists(accelerator, [accelerator.process_index]))
    print("tokens here", tokens.item(), "in all", sum_over_processes(accelerator)(tokens).item())
    print(f"peak memory {peak_memory(accelerator.device) / 1e6:.0f} MB")
