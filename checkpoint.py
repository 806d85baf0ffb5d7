"""Checkpoints: folders that are whole or not there, saving and loading a trainer, signals that stop a run.

Why: a run is killed in the middle of a write, a disk fills up, a bit flips. Without care the newest
checkpoint is then damaged, and this is noticed days later, or never. Here a folder gets its name last, with a
SHA-256 sum of every file, and a resumed run continues bit for bit as if it had not been interrupted.
Source: write, flush, rename, as databases do it. The files are safetensors, torch's .pt and JSON.
Differs from TRL 0.11.4 in: TRL can save the model of a trainer, but it cannot resume the training.
Shapes: tensors of any shape, under the names of the model's and the optimizer's state dicts.
Copy me: needs torch and safetensors, and distributed.py and optim.py beside it. Tested by
tests/test_checkpoint.py and tests/test_survival.py.
"""
import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import distributed
import optim

MANIFEST = "manifest.json"

# ------------------------------------------------------------------------------------------- save and load


def bytes_to_save(trainer, optimizer=True):
    """-> bytes of the tensors that `save` writes. optimizer=False: of those that save_pretrained writes."""
    model = distributed.unwrap(trainer.model)
    parameters = [p for p in model.parameters() if p.requires_grad or not model.is_peft_model]
    weights = sum(distributed.whole_numel(p) * p.element_size() for p in parameters)
    if not optimizer:
        return weights
    state = optim.state_bytes(trainer.optimizer)
    if distributed.zero_stage(trainer.accelerator) == 0:
        return weights + state
    # DeepSpeed saves float32 weights beside the model's, and each process saves its share of the state.
    state = torch.tensor(state, dtype=torch.float64, device=trainer.accelerator.device)
    return 2 * weights + int(trainer.reduce(state))


def save(trainer, folder):
    """Write all that the next step depends on into a new folder, and read it back.

    model/ is what save_pretrained writes. trainer.pt holds the optimizer's state, the schedule's and a few
    numbers; random-<rank>.pt holds the random generators of one process. Under ZeRO each process also writes
    its share of weights and optimizer state in DeepSpeed's own files, which are pickles. ValueError: a weight
    is not finite, the disk is full, or `load` could not read the state again; then no folder is left.
    """
    accelerator, bad_weight = trainer.accelerator, trainer.first_bad_weight()
    state, random = state_to_save(trainer)
    with distributed.together(accelerator):
        if bad_weight is not None:
            raise ValueError(f"after step {trainer.steps_done}: the model's weights are not finite, "
                             f"{bad_weight} first; use an older checkpoint and a lower learning rate")
    with whole_folder(accelerator, folder, needed=bytes_to_save(trainer)) as partial:
        # The model's own names, also where the hub has other ones.
        trainer.save_pretrained(partial / "model", save_original_format=False)
        if state["zero_stage"] > 0:
            trainer.model.save_checkpoint(str(partial), tag="zero")
        with distributed.writes(accelerator):
            write_state(random, partial / f"random-{accelerator.process_index}.pt")
            if accelerator.is_main_process:
                write_state(state, partial / "trainer.pt")
    problem = on_main_process(accelerator, inspect(folder))
    with distributed.together(accelerator):
        if problem is not None:
            raise ValueError(f"{folder} was just written and is already damaged: {problem}; use another disk")


def load(trainer, folder, check=True):
    """Continue where `save` was called: the next steps are, bit for bit, those that would have followed.

    Make the trainer as for its first step, with the untrained model as the reference, and give it the prompts
    of the remaining steps: the position in `dataloader` is not saved. Without DeepSpeed the number of
    processes may differ; a process beyond the saved number keeps its random state. check=False: the caller
    has just called `damage`. ValueError: the folder is damaged, it is of another model, optimizer or ZeRO
    stage, or it has no state for this trainer's schedule or scaler. Then nothing of the trainer has changed.
    """
    folder, accelerator = Path(folder), trainer.accelerator
    expected, _ = state_to_save(trainer)
    stage, processes = expected["zero_stage"], expected["processes"]
    with distributed.together(accelerator):
        problem = damage(folder) if check else None
        if problem is not None:
            raise ValueError(f"{folder} cannot be loaded: {problem}; use an older checkpoint")
        state = read_state(folder / "trainer.pt", expected)
        if state["zero_stage"] != stage or (stage > 0 and state["processes"] != processes):
            raise ValueError(
                f"{folder} was saved by {state['processes']} processes with ZeRO-{state['zero_stage']} (0 = "
                f"without) and this run has {processes} with ZeRO-{stage}; launch it as it was saved, or "
                f"start a new run from {folder / 'model'}")
        if accelerator.process_index < state["processes"]:
            random_file = folder / f"random-{accelerator.process_index}.pt"
            state["random"] = read_state(random_file, ("python", "numpy", "torch"))
        for name in ("lr_scheduler", "scaler"):
            if expected[name] is not None and state[name] is None:
                raise ValueError(f"{folder} was saved by a trainer with 0 {name} and this one has 1; make it "
                                 "as it was when it was saved")
        if stage == 0:
            if "model" not in state:
                files = sorted((folder / "model").glob("*.safetensors"))
                state["model"] = {name: tensor for file in files for name, tensor in load_file(file).items()}
            state["model"] = match_weights(distributed.unwrap(trainer.model), state["model"])
            sizes = [len(group["params"]) for group in expected["optimizer"]["param_groups"]]
            saved = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
            if sizes != saved:
                raise ValueError(
                    f"the saved optimizer has groups of {saved} parameters but this one has {sizes}; make it "
                    "over the same parameters, in the same order, with the same layers shared")
    if stage > 0:
        found, _ = trainer.model.load_checkpoint(str(folder), tag="zero", load_lr_scheduler_states=False)
        if found is None:
            raise ValueError(f"{folder} cannot be loaded: DeepSpeed finds 0 files in zero/; use an older one")
    trainer.load_state_dict(state)      # only now that all of it fits


def state_to_save(trainer):
    """-> (what trainer.pt holds, what random-<rank>.pt holds)"""
    state = trainer.state_dict()
    if not distributed.unwrap(trainer.model).is_peft_model:
        state.pop("model", None)            # save_pretrained writes it; of adapters, under peft's names
    state.setdefault("optimizer", None)     # under ZeRO, where DeepSpeed writes it
    state["zero_stage"] = distributed.zero_stage(trainer.accelerator)
    state["processes"] = trainer.accelerator.num_processes
    random = state.pop("random")
    name, keys, *rest = random["numpy"]
    random["numpy"] = (name, keys.tolist(), *rest)      # weights_only refuses numpy's arrays
    return without_float64(state), random


def without_float64(value):
    """numpy's float64 as float, its base class: a LambdaLR often has some, and weights_only refuses them."""
    if type(value) is dict:         # not a Counter, which a MultiStepLR has
        return {key: without_float64(item) for key, item in value.items()}
    if type(value) is list:
        return [without_float64(item) for item in value]
    return float(value) if isinstance(value, np.float64) else value


def match_weights(model, weights):
    """-> the saved tensors under every name that the model has for them; tied tensors are saved under one.
    ValueError names a tensor that is missing, left over, or of another shape."""
    present, saved = model.state_dict(), {}     # saved: by the address of the model's tensor
    for name, tensor in weights.items():
        if name not in present or present[name].shape != tensor.shape:
            shape = tuple(present[name].shape) if name in present else "not there"
            raise ValueError(f"the checkpoint's {name} is {tuple(tensor.shape)} but the model's is {shape}; "
                             "it is of another model")
        saved[present[name].data_ptr()] = tensor
    missing = [name for name, tensor in present.items() if tensor.data_ptr() not in saved]
    if missing:
        raise ValueError(f"the checkpoint has {len(weights)} tensors but not {missing[0]}; it is of another "
                         "model")
    return {name: saved[tensor.data_ptr()] for name, tensor in present.items()}


def write_state(state, path):
    """torch.save, and a first torch.load. OSError: the disk is full, or `read_state` could not read it."""
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
        torch.load(path, weights_only=True, mmap=True, map_location="cpu")      # mmap: reads no tensor
    except RuntimeError as error:       # torch raises it after the system's OSError, as on a full disk
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    except (pickle.PickleError, AttributeError, TypeError) as error:    # what pickle raises
        raise OSError("the trainer's state (its schedule, its optimizer) is more than tensors, text and "
                      "Python's numbers, so no run could load it; use float(...) on numpy's") from error


def read_state(path, names):
    """-> the dict that `write_state` wrote. ValueError: the file, or an entry of these names, is missing.

    weights_only=True builds only tensors, numbers, text and plain containers. Nothing that the file brings is
    executed: a pickle that would run code is refused.
    """
    refused = f"{path.parent} cannot be loaded: "
    if not path.is_file():
        raise ValueError(f"{refused}it has no {path.name}; use an older checkpoint, or the version of "
                         "plainppo that saved this one")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{refused}{path.name} is not a file of plainppo's; use an older one") from error
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"{refused}its {path.name} has no {missing[0]}; use an older checkpoint")
    return state


# ------------------------------------------------------------------------------------------- whole folders


def on_main_process(accelerator, work, kind=ValueError):
    """Run the generator `work` to its end on the main process. -> its result there, None on the others.

    The others wait in one short sum a second, because reading a large checkpoint may take longer than a
    process may wait in one. An exception of type `kind` is raised on all. accelerator=None: without others.
    """
    busy, result = True, None
    while busy:
        with nullcontext() if accelerator is None else distributed.together(accelerator, kind):
            busy = accelerator is None or accelerator.is_main_process
            next_sum = time.monotonic() + 1.0
            while busy and time.monotonic() < next_sum:
                try:
                    next(work)
                except StopIteration as ended:
                    busy, result = False, ended.value
        if accelerator is not None:
            flag = torch.tensor(float(busy), device=accelerator.device)
            busy = distributed.sum_over_processes(accelerator)(flag) > 0
    return result


@contextmanager
def whole_folder(accelerator, folder, needed=0):
    """-> a folder to fill, on every process. If the context ends without an error it is renamed to `folder`.

    Every file is flushed to the disk, then the manifest with sizes and SHA-256 sums, and the rename is last.
    So a run that is killed leaves no folder of this name, or a whole one. Write in `distributed.writes`.
    needed: bytes that must be free before it begins. ValueError: `folder` exists already, or the writing has
    failed; then nothing is left of the new folder.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    with distributed.together(accelerator):
        if accelerator.is_main_process and folder.exists():
            raise ValueError(f"{folder} is there already, and stays; choose another name or move it away")
    try:
        with distributed.writes(accelerator):
            if accelerator.is_main_process:
                if partial.exists():        # left by a run that was killed
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)
                if shutil.disk_usage(partial).free < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield partial
        on_main_process(accelerator, seal(partial, folder), OSError)
    except OSError as error:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        remedy = "mend that"
        if error.errno == errno.ENOSPC:
            parent = next(parent for parent in folder.absolute().parents if parent.exists())
            remedy = f"it needs {needed:,} bytes and {shutil.disk_usage(parent).free:,} are free; make room"
        raise ValueError(f"{folder} was not written: {error}; {remedy}, and resume the run") from error


def seal(partial, folder):
    """Flush every file, write the manifest, rename the folder. A generator, for `on_main_process`."""
    files = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
    umask = os.umask(0)         # it can be read only by setting it
    os.umask(umask)
    entries = {}
    for name, path in files.items():
        to_disk(path)
        path.chmod(0o666 & ~umask)      # safetensors lets only the owner read, whatever the umask is
        entries[name] = {"bytes": path.stat().st_size, "sha256": (yield from sha256(path))}
    (partial / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    for path in (partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial):
        to_disk(path)
    os.replace(partial, folder)
    for parent in (folder.parent, folder.parent.parent):    # the first may be new itself
        to_disk(parent)


def to_disk(path):
    """Wait until a file, or a folder's list of names, is on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    """A generator that yields after each part of the file and returns the SHA-256 sum of all of it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            yield
    return digest.hexdigest()


def damage(folder):
    """-> what is wrong with a folder that `whole_folder` made, as half a sentence; None for a whole one."""
    return on_main_process(None, inspect(folder))


def inspect(folder):
    """`damage`, as a generator for `on_main_process`."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so it was never finished"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if found != set(expected):
        surplus = found - set(expected)
        return f"{min(found ^ set(expected))} is {'not in its manifest' if surplus else 'missing'}"
    for name, (size, digest) in expected.items():
        size_now = (folder / name).stat().st_size
        if size_now != size:
            return f"{name} has {size_now} bytes instead of {size}"
        if (yield from sha256(folder / name)) != digest:
            return f"{name} is not what was written: its SHA-256 differs"
    return None


# ---------------------------------------------------------------------------------- the checkpoints of a run


def folders(place):
    """The checkpoints in the folder `place`, newest first."""
    return sorted(Path(place).glob("step-" + "[0-9]" * 6), reverse=True)


def newest_whole(place, say=print, accelerator=None):
    """-> the newest checkpoint without damage, as text, or None. A damaged one is reported, and renamed to
    .damaged, so that its step can be saved again. accelerator: all processes call it; the main one works."""
    def search():
        for partial in Path(place).glob("*.partial"):       # left by a save or a removal that was cut short
            remove(partial)
        for folder in folders(place):
            problem = yield from inspect(folder)
            if problem is None:
                return str(folder)
            damaged = folder.with_name(f"{folder.name}.damaged")
            if damaged.exists():
                remove(damaged)
            folder.rename(damaged)
            say(f"passing over {folder}: {problem}; kept as {damaged.name}")
        return None

    newest = on_main_process(accelerator, search())
    return newest if accelerator is None else distributed.gather_lists(accelerator, [newest])[0]


def remove_old(accelerator, place, keep):
    """Remove all but the newest `keep` checkpoints. All processes call it; the main one works."""
    with distributed.together(accelerator):
        for folder in folders(place)[keep:] if accelerator.is_main_process else []:
            remove(folder)


def remove(folder):
    """Remove a folder. It is renamed first, so that a removal that is cut short leaves no half checkpoint."""
    folder = Path(folder)
    try:
        if not folder.is_dir():         # a file of this name is not plainppo's, and stays as it is
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        partial = folder if folder.suffix == ".partial" else folder.rename(folder.with_suffix(".partial"))
        shutil.rmtree(partial)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be removed: {error}; remove it by hand, and resume the run") from error


@contextmanager
def stop_signals(accelerator):
    """-> function() -> SIGINT or SIGTERM if any process has received it, otherwise 0.

    All processes call the function where nothing is half done, and get the same answer. A second Ctrl-C ends
    its process at once. A second SIGTERM does not: a scheduler and the launcher may each send one.
    """
    numbers, received = (signal.SIGINT, signal.SIGTERM), []

    def note(number, frame):
        received.append(number)
        name = signal.Signals(number).name
        os.write(2, f"{name}: this step is finished and saved first; Ctrl-C stops at once\n".encode())
        for second in numbers if number == signal.SIGINT else (signal.SIGINT,):
            signal.signal(second, signal.SIG_DFL)       # ends the process inside a long computation, too

    def signal_received():
        flags = torch.tensor([float(number in received) for number in numbers], device=accelerator.device)
        flags = distributed.sum_over_processes(accelerator)(flags).tolist()
        return next((int(number) for number, flag in zip(numbers, flags) if flag), 0)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield signal_received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    accelerator = distributed.start(cpu=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "step-000001"
        with whole_folder(accelerator, folder, needed=1000) as partial:
            save_file({"weights": torch.ones(3)}, partial / "model.safetensors")
        print([path.name for path in folder.iterdir()], "damage 0 of 1:", damage(folder))
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1                                            # one bit
        (folder / "model.safetensors").write_bytes(content)
        print("damage 1 of 1:", damage(folder))
        print("newest whole checkpoint:", newest_whole(place))
