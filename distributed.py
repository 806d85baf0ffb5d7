"""One run on one process or on many: set-up, sums over processes, generation, saving, and the device cache.

Why: an update that means the same on 1 and on N processes needs every mean to be a global one. A mean of the ranks' means
weighs a rank with short responses as much as one with long ones, and a statistic that differs between ranks (the KL
coefficient, a decision to stop) makes them drift apart or wait for each other for ever.
Source: accelerate's Accelerator; Rajbhandari et al. 2020 (arXiv 1910.02054) for ZeRO.
Differs from TRL 0.11.4 in: sums are really reduced (there, all_reduce worked on a copy, and 2 ranks held KL coefficients
0.1906 and 0.2098 after 3 steps); seeding is one explicit call, before any model is made.
Shapes: `sum_over_processes` keeps the shape of what it is given.
Copy me: needs torch and accelerate. Tested by tests/test_distributed.py.
"""
import gc
import hashlib
import importlib.util
import json
import logging
import os
import random
import resource
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

logger = logging.getLogger(__name__)


def start(log_with=None, project_dir=None, mixed_precision=None, **kwargs):
    """The Accelerator of this process: which device, how many processes, which trackers. Call it first, once.

    Gradient accumulation is not accelerate's business here: it divides by the number of mini-batches, and ppo_core divides by
    tokens. ValueError when the package of the tracker is not installed.
    """
    if log_with is not None and importlib.util.find_spec(log_with) is None:
        raise ValueError(f"log_with is {log_with!r} but that package is not installed; run: pip install {log_with}")
    return Accelerator(log_with=log_with, mixed_precision=mixed_precision,
                       project_config=ProjectConfiguration(project_dir=project_dir) if project_dir else None, **kwargs)


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


def seed_everything(seed, rank=0):
    """Python, numpy and torch. Before the model is made, with rank 0 everywhere: all ranks must get the same value head.

    After it, with the rank: each must sample other responses than its neighbour, and the whole run is reproducible.
    """
    for seeder in (random.seed, np.random.seed, torch.manual_seed):      # torch's seeds every device too
        seeder(seed + rank)


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


@contextmanager
def unwrapped_for_generation(accelerator, model):
    """The bare model inside whatever accelerate wrapped around it; DDP's wrapper has no `generate`."""
    yield accelerator.unwrap_model(model)


def accumulate(accelerator, model, last):
    """Context of one backward pass: only the last of an optimizer step exchanges gradients between processes."""
    return accelerator.no_sync(model) if not last and accelerator.num_processes > 1 else nullcontext()


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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak        # Linux counts in KiB
    return getattr(torch, device.type).max_memory_allocated()


# --------------------------------------------------------------------------------------------------- checkpoints

MANIFEST = "manifest.json"


@contextmanager
def whole_folder(accelerator, folder):
    """-> a folder to fill, on every process. When the context ends well it becomes `folder`; a run killed before leaves none.

    The order is what makes it safe: every file to the disk, then the manifest with their sizes and SHA-256 sums, then one rename.
    ValueError when `folder` is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} is there already, and is left as it is; choose another name or move it away")
    partial = folder.with_name(folder.name + ".partial")
    if accelerator.is_main_process:
        if partial.exists():        # of a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    yield partial
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
        umask = os.umask(0)
        os.umask(umask)
        for path in files.values():
            path.chmod(0o666 & ~umask)      # safetensors writes for the owner alone, whatever was asked for
            to_disk(path)
        entries = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
        (partial / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
        for path in (partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial):
            to_disk(path)
        os.replace(partial, folder)
        to_disk(folder.parent)
    accelerator.wait_for_everyone()


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
