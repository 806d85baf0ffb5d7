"""One run on one process or on many, with or without DeepSpeed: set-up, sums, generation and optimizer steps.

Why: an update means the same on 1 and on N processes only if every mean is taken over all of them. A number
that differs between processes (the KL coefficient, a decision to stop) makes their weights drift apart, or
makes one wait for ever. Under ZeRO-3 a forward pass is a collective operation: a process whose responses are
finished must run it as often as the others.
Source: accelerate's Accelerator; Rajbhandari et al. 2020 (arXiv 1910.02054): ZeRO-1 shards the optimizer's
state over the processes, ZeRO-2 also the gradients, ZeRO-3 also the weights.
Differs from TRL 0.11.4 in: sums are really reduced (there, 2 processes held the KL coefficients 0.1906 and
0.2098 after 3 steps); seeding is one explicit call; gradient accumulation, skipped steps and max_grad_norm
mean the same with and without DeepSpeed.
Shapes: `sum_over_processes` keeps the shape of its tensor; parameters and gradients may have any shape.
Copy me: needs torch, numpy, safetensors and accelerate, and deepspeed where a run is launched with it; Linux,
macOS or another Unix. Tested by tests/test_distributed.py.
"""
import copy
import errno
import functools
import gc
import importlib.util
import logging
import os
import random
import re
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
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, ProjectConfiguration, gather_object
from safetensors import SafetensorError

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------- the machine


def start(log_with=None, project_dir=None, mixed_precision=None, cpu=False, timeout=600, **kwargs):
    """The Accelerator of this process: which device, how many processes, which trackers. Call it first, and
    once.

    It is the same for `python`, `torchrun` and `accelerate launch`, on GPUs and CPUs, with and without
    DeepSpeed. cpu=True stays on the CPU where there is a GPU. timeout: seconds that a process waits for the
    others. ValueError: a package is missing, or the machine cannot do what is asked.
    """
    if log_with is not None and importlib.util.find_spec(log_with) is None:
        raise ValueError(f"log_with is {log_with!r} but that package is not installed; run: "
                         f"pip install {log_with}")
    if not torch.accelerator.is_available():
        cpu = True          # without it, accelerate takes each process of a launcher for a run of its own
        os.environ.setdefault("DS_ACCELERATOR", "cpu")      # or DeepSpeed would look for a GPU
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        cpu = prepare_for_deepspeed(cpu, kwargs, timeout)
    elif cpu:
        warn_of_spinning_threads()
    waiting = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    handlers = [*kwargs.pop("kwargs_handlers", []), waiting]
    project = ProjectConfiguration(project_dir=project_dir) if project_dir else None
    return Accelerator(log_with=log_with, mixed_precision=mixed_precision, cpu=cpu, kwargs_handlers=handlers,
                       project_config=project, **kwargs)


@functools.cache        # once per process
def warn_of_spinning_threads():
    """OpenMP's threads wait for each other in a loop that does not sleep, so another busy program slows a
    step down ten times. OpenMP reads the remedy when torch is loaded: here it is too late to set it."""
    if torch.get_num_threads() > 1 and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        logger.warning("torch uses %d CPU threads and GOMP_SPINCOUNT is not set, so another busy program "
                       "can make a step ten times slower; put GOMP_SPINCOUNT=4000 in front of the command",
                       torch.get_num_threads())


def prepare_for_deepspeed(cpu, kwargs, timeout):
    """Add the DeepSpeed plugin to the Accelerator's `kwargs`, and on CPUs make the group of processes (gloo).

    -> the `cpu` to give to Accelerator: always False, as it takes cpu=True for "without DeepSpeed".
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("this run was launched with DeepSpeed but deepspeed is not installed; run: "
                         "pip install deepspeed ninja")
    if cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        if torch.accelerator.is_available():
            raise ValueError("the CPU was asked for, but DeepSpeed takes the "
                             f"{torch.accelerator.device_count()} GPU(s) it sees; hide them with "
                             "CUDA_VISIBLE_DEVICES= in front of the command, or leave the CPU flag out")
        os.environ.pop("ACCELERATE_USE_CPU", None)
        PartialState(backend="gloo", timeout=timedelta(seconds=timeout))
    if not is_initialized():        # a second Accelerator takes over the plugin of the first
        kwargs.setdefault("deepspeed_plugin", Zero3InitPlugin())
    return False


class Zero3InitPlugin(DeepSpeedPlugin):
    """accelerate's plugin, but transformers hears of its zero3_init_flag too: otherwise even a reward model
    that is loaded under `zero3_init_disabled` would have empty tensors."""

    def set_deepspeed_weakref(self):
        super().set_deepspeed_weakref()
        if not self.zero3_init_flag:
            from transformers.integrations import unset_hf_deepspeed_config
            unset_hf_deepspeed_config()


def zero3_init_disabled(accelerator):
    """Context in which a model is loaded whole also under ZeRO-3, for models that are not trained."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or not plugin.is_zero3_init_enabled():
        return nullcontext()
    return plugin.zero3_init_context_manager(enable=False)


def tracker_arguments(log_with, folder):
    """-> init_kwargs for accelerate's `init_trackers`. Without an account wandb would ask and wait, so it
    logs offline then."""
    if log_with != "wandb":
        return {}
    import wandb
    arguments = {"dir": folder}
    if wandb.api.api_key is None and "WANDB_MODE" not in os.environ:
        logger.warning("no wandb account is set up: logging offline in %s; `wandb sync` uploads it", folder)
        arguments["mode"] = "offline"
    return {"wandb": arguments}


def seed_everything(seed, rank=0):
    """Seed the generators of Python, numpy and torch.

    Call it with rank 0 before the model is made, so that all processes get the same value head; and with the
    process's rank after that, so that they sample different responses.
    """
    if rank > 0:        # not seed + rank, which would give rank 1 of seed 0 the numbers of rank 0 of seed 1
        seed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):      # torch's seeds every device too
        seed_one(seed)


def random_state(device):
    """-> {library or device: the state of its random generator} of this process."""
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


# ---------------------------------------------------------------------------------------- between processes


def sum_over_processes(accelerator):
    """-> function(tensor) -> the tensor summed over all processes, the same bits on each."""
    if accelerator.num_processes == 1:
        return lambda tensor: tensor
    return functools.partial(accelerator.reduce, reduction="sum")


def gather_lists(accelerator, items):
    """A list from each process -> one list, in rank order, on every process."""
    return gather_object(list(items)) if accelerator.num_processes > 1 else list(items)


@contextmanager
def together(accelerator, kind=ValueError):
    """For a check that may fail on some processes only: `kind` is then raised on all, with all messages.

    Otherwise the others would wait in their next sum for ever. It costs one sum of one number. All processes
    must come here. The others get the attributes of the first error that are text or numbers.
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
    if failure is not None:
        raise failure


def raise_jointly(accelerator, kind, failure):
    """Raise `kind` on all processes. failure: the error of this process, or None."""
    attributes = {} if failure is None else {**vars(failure), "errno": getattr(failure, "errno", None)}
    plain = {name: value for name, value in attributes.items() if isinstance(value, (str, int, float))}
    reports = gather_lists(accelerator, [None if failure is None else (str(failure), plain)])
    failures = {rank: report for rank, report in enumerate(reports) if report is not None}
    joint = kind("; ".join(f"rank {rank}: {text}" for rank, (text, _) in failures.items()))
    for name, value in (attributes or next(iter(failures.values()))[1]).items():
        setattr(joint, name, value)
    raise joint from failure


@contextmanager
def writes(accelerator):
    """Context for writing files, without exchanges inside. OSError on all processes if one cannot write."""
    with together(accelerator, OSError):
        try:
            yield
        except SafetensorError as error:
            # The class says only "not written"; in a folder that could be made, that means a full disk.
            raise OSError(errno.ENOSPC, str(error)) from error


def end(accelerator):
    """Close the trackers and the group of processes. The last call of every process."""
    accelerator.wait_for_everyone()
    # gloo's threads release a sum's tensors a moment after the sum is known, and need Python's lock for it.
    # Ending the group holds that lock and waits for them. gloo does not say when they are done: so, a pause.
    time.sleep(0.1)
    accelerator.end_training()


# --------------------------------------------------------------------------------------------------- models


def zero_stage(accelerator):
    """0 without DeepSpeed, otherwise 1, 2 or 3."""
    return 0 if accelerator.state.deepspeed_plugin is None else accelerator.state.deepspeed_plugin.zero_stage


def unwrap(model):
    """The model inside DDP's wrapper or DeepSpeed's engine. (accelerate's own function imports deepspeed.)"""
    return getattr(model, "module", model)


def quantized(model):
    """True for a model loaded in 8 or 4 bits. It can be neither moved, wrapped nor sharded."""
    return getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)


def prepare_model(accelerator, model, optimizer, micro_batch_size, max_grad_norm, accumulation_steps=1):
    """-> model and optimizer as this run trains them: unchanged, in DDP, or as DeepSpeed's engine.

    ValueError: accelerate's or DeepSpeed's config says something else than PPOConfig.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError("the accelerator has "
                             f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps} and "
                             "would divide every gradient by it; leave it at 1 there and set it in "
                             f"PPOConfig (now {accumulation_steps})")
        return accelerator.prepare(model, optimizer)
    settings = plugin.deepspeed_config
    same = (("gradient_clipping", max_grad_norm or 0.0, "max_grad_norm"),
            ("train_micro_batch_size_per_gpu", micro_batch_size, "mini_batch_size"),
            ("gradient_accumulation_steps", accumulation_steps, "gradient_accumulation_steps"))
    for name, value, ours in same:
        said = settings.get(name, "auto")
        if said not in ("auto", value) and not (name == "gradient_accumulation_steps" and said == 1):
            raise ValueError(f"{name} is {said} in the DeepSpeed config but {ours} is {value}; "
                             f"leave {name} out of the config (or 'auto'), or make both equal")
        settings[name] = value
    # PPO decides when an optimizer step is complete. DeepSpeed must neither count mini-batches nor divide.
    settings["gradient_accumulation_steps"], settings["managed_gradient_accumulation"] = 1, False
    # Otherwise, with offload, DeepSpeed silently replaces any optimizer, SGD too, by its own CPU Adam.
    settings["zero_force_ds_cpu_optimizer"] = False
    return accelerator.prepare(model, optimizer)


def prepare_reference(accelerator, model):
    """-> the frozen reference on the device; sharded under ZeRO-3; as it is if it is quantized."""
    if quantized(model):
        return model
    plugin = accelerator.state.deepspeed_plugin
    if zero_stage(accelerator) < 3:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        if half is not None and plugin is not None:
            # DeepSpeed casts the policy, so the reference has to be cast to be equal at the first step.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(half)
        return model.to(accelerator.device)
    import deepspeed
    settings = copy.deepcopy(plugin.deepspeed_config)
    settings["zero_optimization"].pop("offload_optimizer", None)        # the reference has no optimizer
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return engine


@contextmanager
def unwrapped_for_generation(accelerator, model, gather=True, batches=1):
    """Context -> (bare model, in_step), as neither DDP's wrapper nor DeepSpeed's engine has a `generate`.

    gather: under ZeRO-3, hold all weights on every process: one exchange per rollout, but all must fit into
    memory. False: layer by layer, so every forward pass is a collective operation, and in_step is True: all
    go on until the last one has its EOS. batches: how many this process generates; the same on all.
    """
    bare = getattr(model, "module", model)
    sharded = any(hasattr(p, "ds_id") for p in bare.parameters())
    if not sharded or not gather:
        in_step = sharded and accelerator.num_processes > 1
        counts = gather_object([batches]) if in_step else [batches]
        if len(set(counts)) > 1:
            raise ValueError(f"the processes write {counts} batches, but layer by layer all must write the "
                             "same number; give each as many queries, or set ds3_gather_for_generation=True")
        yield bare, in_step
        return
    with gathered(bare, model.optimizer):
        yield bare, False


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
    """-> all weights, at any ZeRO stage, on the main process; elsewhere it may be empty. Under ZeRO-3 they
    are on the CPU. All processes must call it."""
    bare = unwrap(model)
    if zero_stage(accelerator) < 3:
        return bare.state_dict()
    import deepspeed
    state, seen = {}, {}
    for name, tensor in bare.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor]):   # one at a time: all may not fit into memory
            if accelerator.is_main_process:
                # a tied weight stays one tensor under two names, as without ZeRO
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
    """Number of elements of the whole parameter; under ZeRO-3 this process holds only a share of them."""
    return getattr(parameter, "ds_numel", parameter.numel())


def first_not_finite(model):
    """-> name of the first weight with NaN or infinity in the part that this process holds, or None."""
    parts = {}
    for name, parameter in unwrap(model).named_parameters():
        parts[name] = parameter.detach()
        if hasattr(parameter, "ds_tensor"):
            # ZeRO-3: this process's share, without the padding of the last one, which may hold anything
            share = parameter.ds_tensor.detach()
            before = parameter.ds_zero_partition_rank * share.numel()
            parts[name] = share[:max(0, parameter.ds_numel - before)]
    # A sum is the fastest look. It may overflow though all weights are finite, so then each one is looked at.
    if torch.stack([part.sum().float() for part in parts.values()]).isfinite().all():
        return None
    return next((name for name, part in parts.items() if not part.isfinite().all()), None)


# ------------------------------------------------------------------------------------------ optimizer steps


@contextmanager
def accumulate(accelerator, model, last):
    """Context of one mini-batch's forward and backward pass. -> function(loss) that adds its gradients.

    Only the last mini-batch of an optimizer step exchanges gradients between processes.
    """
    if accelerator.state.deepspeed_plugin is not None:
        yield model.backward        # the engine's: accelerate's would also take the optimizer step
        return
    with accelerator.no_sync(model) if accelerator.num_processes > 1 and not last else nullcontext():
        yield accelerator.backward


def take_step(accelerator, model, optimizer, max_grad_norm=None):
    """One optimizer step with the gradients added so far. -> their norm over all processes before clipping.

    None: in fp16 a gradient overflowed, which is normal, and the loss scale was lowered. Then, and where the
    norm is NaN or infinity, no step was taken: call drop_step.
    """
    if accelerator.state.deepspeed_plugin is not None:
        model.step()                            # clips by the value that prepare_model put into its settings
        # Where ZeRO-3 took no step, it still has the norm of the step before.
        norm = float(model.get_global_grad_norm()) if model.was_step_applied() else float("nan")
        return None if model.fp16_enabled() and not np.isfinite(norm) else norm
    # of the optimizer, which may hold a part of the model
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    accelerator.unscale_gradients()             # fp16
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if np.isfinite(norm):
        if max_grad_norm is not None:           # by a norm that is not finite it would spoil every gradient
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(norm))
        optimizer.step()
        model.zero_grad()
    elif accelerator.scaler is not None:
        accelerator.scaler.update()             # lowers the scale
        return None
    return norm


def drop_step(accelerator, model, optimizer):
    """Forget the gradients added so far. (A step with gradients of 0 would move weights by Adam's momentum.)
    """
    if accelerator.state.deepspeed_plugin is None:
        model.zero_grad()
        return
    optimizer.zero_grad()
    zero = model.optimizer
    zero.zero_grad()
    # zero_grad leaves the shares that were exchanged already; the next backward pass would add to them.
    for shares in (getattr(zero, "averaged_gradients", {}), getattr(zero, "all_grad_tensors", {})):
        for group in shares:
            shares[group] = None
    if getattr(zero, "cpu_offload", False):     # ZeRO-1 and 2; in ZeRO-3 zero_grad resets this counter
        zero.micro_step_id, zero._offload_accumulated_param_ids = -1, set()


# --------------------------------------------------------------------------------------------------- memory


def clear_device_cache(device):
    """Free the device's cached blocks, so that the next phase can use the memory in blocks of other sizes."""
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def peak_memory(device):
    """Most bytes in use at once so far: of the device's allocator, or of this whole process on a CPU."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated()
    status = Path("/proc/self/status")
    line = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if line is not None:
        return 1024 * int(line[1])
    # Without that line (macOS): this number starts with the peak of the program that started this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak        # Linux counts in KiB


def largest_peak_memory(accelerator):
    """`peak_memory` of the process that needed most. All processes must call it."""
    return max(gather_lists(accelerator, [peak_memory(accelerator.device)]))


if __name__ == "__main__":
    accelerator = start(cpu=True)
    seed_everything(0, rank=accelerator.process_index)
    reduce = sum_over_processes(accelerator)
    tokens = torch.tensor([3.0 + accelerator.process_index])                                       # (1,)
    print(f"process {accelerator.process_index} of {accelerator.num_processes} on {accelerator.device}")
    print("tokens here", tokens.item(), "on all processes", reduce(tokens).item())
    print("all ranks:", gather_lists(accelerator, [accelerator.process_index]))
    print(f"peak memory {peak_memory(accelerator.device) / 1e6:.0f} MB")
