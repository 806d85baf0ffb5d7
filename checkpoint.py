"""Checkpoints: folders that are whole or not there, saving and loading a trainer, and signals that ask a run
to stop.

Why: a run is killed in the middle of a write, a disk fills up, a bit flips. Without care the newest
checkpoint is then half a checkpoint, and it is found out days later, or never. Here a folder gets its name
last, with a SHA-256 sum of every file, and a resumed run continues bit for bit as if it had not been
interrupted.
Source: write, flush, rename, as databases do it; the files are safetensors and JSON.
Differs from TRL 0.11.4 in: there, a trainer can save its model but cannot be resumed.
Shapes: tensors of any shape, under the names of the model's and the optimizer's state dicts.
Copy me: needs torch, numpy and safetensors, and distributed.py and optim.py beside it. Tested by
tests/test_checkpoint.py and tests/test_survival.py.
"""
import errno
import hashlib
import json
import os
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
    """Bytes of the tensors that `save` writes, nearly all of it. optimizer=False: those of
    save_pretrained."""
    parameters = distributed.unwrap(trainer.model).parameters()
    weights = sum(distributed.whole_numel(p) * p.element_size() for p in parameters)
    if not optimizer:
        return weights
    device = trainer.accelerator.device
    state = torch.tensor(optim.state_bytes(trainer.optimizer), dtype=torch.float64, device=device)
    if distributed.zero_stage(trainer.accelerator) == 0:
        return weights + int(state)
    # The engine keeps float32 weights beside the model's, and each process saves a share of the state.
    return 2 * weights + int(trainer.reduce(state))


def save(trainer, folder):
    """Write all that the next step depends on into a new folder, whole or not there, and read it back.

    model/ is what save_pretrained writes. Beside it: the optimizer's tensors, one file of numbers, and the
    random state of each process. All are safetensors and JSON, so loading executes nothing. Only under ZeRO
    each process's share of weights and optimizer state is DeepSpeed's own file, a pickle.
    """
    accelerator, state, bad_weight = trainer.accelerator, trainer.state_dict(), trainer.first_bad_weight()
    with distributed.together(accelerator):
        if bad_weight is not None:
            raise ValueError(f"after step {trainer.steps_done}: the model's weights are not finite, "
                             f"{bad_weight} first; go back to an older checkpoint, with a lower learning "
                             "rate")
    random = pack_random(state.pop("random"))
    if state["lr_scheduler"] is not None:
        state["lr_scheduler"] = pack_schedule(trainer.lr_scheduler)
    state["zero_stage"], state["processes"] = distributed.zero_stage(accelerator), accelerator.num_processes
    with whole_folder(accelerator, folder, needed=bytes_to_save(trainer)) as partial:
        # The model's own names, also where the hub has other ones.
        trainer.save_pretrained(partial / "model", save_original_format=False)
        if state["zero_stage"] > 0:
            trainer.model.save_checkpoint(str(partial), tag="zero")
        with distributed.writes(accelerator):
            if accelerator.is_main_process:
                if state.pop("model", None) is not None:
                    tensors, state["optimizer"] = pack_state(state["optimizer"])
                    save_file(tensors, partial / "optimizer.safetensors")
                (partial / "trainer.json").write_text(json.dumps(state), encoding="utf-8")
            own = partial / f"random-{accelerator.process_index}.json"
            own.write_text(json.dumps(random), encoding="utf-8")
    problem = on_main_process(accelerator, inspect(folder))
    with distributed.together(accelerator):
        if problem is not None:
            raise ValueError(f"{folder} was just written and is already damaged: {problem}; use another disk")


def load(trainer, folder, check=True):
    """Continue where `save` was called: the steps that follow are, bit for bit, those that would have
    followed there.

    Make the trainer as it was made for the first step, with the reference of the untrained model, and give it
    the prompts of the remaining steps: the position in `dataloader` is not saved. Another number of processes
    works without DeepSpeed; a process beyond the saved number then keeps its random state. check=False: the
    caller has just called `damage`. ValueError: the folder is damaged, or belongs to another model,
    optimizer, schedule, precision or ZeRO stage; then nothing of the trainer has changed.
    """
    folder, accelerator = Path(folder), trainer.accelerator
    stage, processes = distributed.zero_stage(accelerator), accelerator.num_processes
    with distributed.together(accelerator):
        problem = damage(folder) if check else None
        if problem is not None:
            raise ValueError(f"{folder} cannot be loaded: {problem}; use an older checkpoint")
        state = read_state(folder)
        if state["zero_stage"] != stage or (stage > 0 and state["processes"] != processes):
            raise ValueError(
                f"{folder} was saved by {state['processes']} processes with ZeRO-{state['zero_stage']} (0 = "
                f"without) and this run has {processes} with ZeRO-{stage}; launch it as it was saved, or "
                f"start a new run from {folder / 'model'}")
        own = folder / f"random-{accelerator.process_index}.json"
        if own.is_file():
            state["random"] = unpack_random(json.loads(own.read_text(encoding="utf-8")))
        elif accelerator.process_index < state["processes"]:
            raise ValueError(f"{folder} cannot be loaded: {own.name} is missing, and with it the random "
                             "state of this process; use an older checkpoint")
        for name, present in (("lr_scheduler", trainer.lr_scheduler), ("scaler", accelerator.scaler)):
            if present is not None and state[name] is None:
                raise ValueError(f"{folder} was saved by a trainer with 0 {name} and this one has 1; make it "
                                 "as it was when it was saved")
        if trainer.lr_scheduler is not None:
            state["lr_scheduler"] = unpack_schedule(trainer.lr_scheduler, state["lr_scheduler"])
        if stage == 0:
            weights = {}
            for path in sorted((folder / "model").glob("*.safetensors")):
                weights.update(load_file(path))
            state["model"] = match_weights(distributed.unwrap(trainer.model), weights)
            tensors = load_file(folder / "optimizer.safetensors")
            state["optimizer"] = unpack_state(tensors, state["optimizer"], trainer.optimizer.state_dict())
    if stage > 0:
        found, _ = trainer.model.load_checkpoint(str(folder), tag="zero", load_lr_scheduler_states=False)
        if found is None:
            raise ValueError(f"{folder} cannot be loaded: DeepSpeed finds 0 files in {folder / 'zero'}; use "
                             "an older checkpoint")
    trainer.load_state_dict(state)      # only now that all of it fits: a model loaded in part is of no use


def read_state(folder):
    """-> what `save` wrote into trainer.json. ValueError names an entry that is missing."""
    state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    for name in ("steps_done", "kl_coef", "score_moments", "lr_scheduler", "scaler", "zero_stage",
                 "processes"):
        if name not in state:
            raise ValueError(f"{folder} cannot be loaded: its trainer.json has no {name}; use an older "
                             "checkpoint")
    return state


def match_weights(model, weights):
    """-> the saved tensors under every name of the model's state dict. Of tied tensors only one name is
    saved.

    ValueError names a tensor that is missing, left over, or of another shape.
    """
    present, saved = model.state_dict(), {}
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


# ------------------------------------------------------------------- states as safetensors and JSON hold them


def pack_state(state):
    """An optimizer's state dict -> (tensors for safetensors, {name: tensor}; the rest for JSON)."""
    tensors, numbers = {}, {}

    def pack(path, value):
        if isinstance(value, dict):     # per parameter, and inside; bitsandbytes nests once more
            for name, inner in value.items():
                pack([*path, str(name)], inner)
        elif torch.is_tensor(value):    # a copy, because 8-bit Adam's table is one tensor for all parameters
            tensors["/".join(path)] = value.detach().clone().contiguous()
        else:
            numbers["/".join(path)] = value

    pack([], state["state"])
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def unpack_state(tensors, rest, present):
    """The inverse of `pack_state`. present: the state dict of the optimizer that will load it; ValueError if
    that optimizer has other parameters."""
    sizes, saved = ([len(group["params"]) for group in state["param_groups"]] for state in (present, rest))
    if sizes != saved:
        raise ValueError(f"the saved optimizer has groups of {saved} parameters but this one has {sizes}; "
                         "make it over the same parameters, in the same order, with the same layers shared")
    state = {}
    for key, value in [*tensors.items(), *rest["numbers"].items()]:
        index, *path, name = key.split("/")
        entries = state.setdefault(int(index), {})
        for step in path:
            entries = entries.setdefault(step, {})
        entries[name] = value
    for group in rest["param_groups"]:
        if "betas" in group:        # JSON made a list of this pair
            group["betas"] = tuple(group["betas"])
    return {"state": state, "param_groups": rest["param_groups"]}


def pack_schedule(scheduler):
    """-> the part of a schedule's state that changes as it is stepped, for JSON. ValueError when JSON cannot
    hold it.

    Left out are the arguments of its constructor (milestones, functions): a resumed run gives them again.
    """
    state = {}
    for name, value in scheduler.state_dict().items():
        if name in ("milestones", "lr_lambdas") or callable(value):
            continue
        try:
            state[name] = json.loads(json.dumps(value))
        except TypeError:
            state[name] = None
        if state[name] != value:
            raise ValueError(f"the state of {type(scheduler).__name__} has a {name} that JSON cannot hold, "
                             "so a checkpoint could not restore it; use a schedule of numbers, such as "
                             "LambdaLR or make_schedule(...)")
    return state


def unpack_schedule(scheduler, saved):
    """The inverse of `pack_schedule`: -> a state dict for a scheduler that was made with the same
    arguments."""
    return {**scheduler.state_dict(), **saved}


def pack_random(state):
    """The result of distributed.random_state -> the same for JSON."""
    name, keys, *rest = state["numpy"]
    tensors = {key: bytes(value.tolist()).hex() for key, value in state.items() if torch.is_tensor(value)}
    return {"python": state["python"], "numpy": [name, keys.tolist(), *rest], **tensors}


def unpack_random(saved):
    """The inverse of `pack_random`."""
    version, keys, gauss = saved["python"]
    name, numpy_keys, *rest = saved["numpy"]
    numpy_state = (name, np.array(numpy_keys, dtype=np.uint32), *rest)
    texts = {key: value for key, value in saved.items() if isinstance(value, str)}
    tensors = {key: torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8) for key, text in texts.items()}
    return {"python": (version, tuple(keys), gauss), "numpy": numpy_state, **tensors}


# ------------------------------------------------------------------------------------------- whole folders


def on_main_process(accelerator, work, kind=ValueError):
    """Run the generator `work` on the main process to its end. -> its result there, None elsewhere.

    The others wait in one short sum a second. In a single sum for all of it, reading a large checkpoint would
    take longer than a process may wait. An exception of this kind is raised on all. accelerator=None: without
    others.
    """
    busy, result = True, None
    while busy:
        with nullcontext() if accelerator is None else distributed.together(accelerator, kind):
            busy, until = accelerator is None or accelerator.is_main_process, time.monotonic() + 1.0
            while busy and time.monotonic() < until:
                try:
                    next(work)
                except StopIteration as ended:
                    busy, result = False, ended.value
        if accelerator is not None:
            flag = torch.tensor(float(busy), device=accelerator.device)
            busy = distributed.sum_over_processes(accelerator)(flag) > 0
    return result


@contextmanager
def os_error_is_one_sentence(path, needed):
    """An OSError inside becomes a ValueError; on a full disk with the bytes that are needed and those that
    are free."""
    try:
        yield
    except OSError as error:
        remedy = "mend that"
        if error.errno == errno.ENOSPC:
            parent = next(place for place in Path(path).absolute().parents if place.exists())
            remedy = f"it needs {needed:,} bytes and {shutil.disk_usage(parent).free:,} are free; make room"
        raise ValueError(f"{path} was not written: {error}; {remedy}, and resume the run") from error


@contextmanager
def whole_folder(accelerator, folder, needed=0):
    """-> a folder to fill, on every process. When the context ends well it gets the name `folder`.

    A run that is killed before that leaves no folder of this name, because of the order: every file to the
    disk, then the manifest with sizes and SHA-256 sums, then one rename. Write in `distributed.writes`.
    needed: bytes that must be free before it begins. ValueError: `folder` exists already, or the disk is
    full; then nothing is left of it.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    with distributed.together(accelerator):
        if accelerator.is_main_process and folder.exists():
            raise ValueError(f"{folder} is there already, and is left as it is; choose another name or move "
                             "it away")
    with os_error_is_one_sentence(folder, needed):
        try:
            with distributed.writes(accelerator):
                if accelerator.is_main_process:
                    make_room(partial, needed)
            yield partial
            on_main_process(accelerator, seal(partial, folder), OSError)
        except OSError:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def make_room(partial, needed):
    """Make an empty folder. OSError when fewer than `needed` bytes are free: now, not after half of the
    files."""
    if partial.exists():        # left by a run that was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    if shutil.disk_usage(partial).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def seal(partial, folder):
    """Every file to the disk, then the manifest, then the rename. A generator, for `on_main_process`."""
    files = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    entries = {}
    for name, path in files.items():
        to_disk(path)
        path.chmod(0o666 & ~umask)      # safetensors lets the owner alone read, whatever the umask
        entries[name] = {"bytes": path.stat().st_size, "sha256": (yield from sha256(path))}
    (partial / MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")
    for path in (partial / MANIFEST, *(p for p in partial.rglob("*") if p.is_dir()), partial):
        to_disk(path)
    os.replace(partial, folder)
    for parent in (folder.parent, folder.parent.parent):    # the new name, and its parent's, which may be new
        to_disk(parent)


def to_disk(path):
    """Wait until a file, or a folder's list of names, is on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    """A generator that yields after each part of the file and returns the sum."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            yield
    return digest.hexdigest()


def damage(folder):
    """-> what is wrong with a folder made by `whole_folder`, as half a sentence; None when every file is as
    written."""
    return on_main_process(None, inspect(folder))


def inspect(folder):
    """`damage` as a generator, for `on_main_process`."""
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
    """The checkpoints below `place`, newest first."""
    return sorted(Path(place).glob("step-" + "[0-9]" * 6), reverse=True)


def newest_whole(place, say=print, accelerator=None):
    """-> the newest checkpoint without damage, as text, or None. A damaged one is said, and renamed to
    .damaged, so that its step can be saved again. accelerator: all processes call it, and the main one
    works."""
    newest = on_main_process(accelerator, search(place, say))
    return newest if accelerator is None else distributed.gather_lists(accelerator, [newest])[0]


def search(place, say):
    """`newest_whole` as a generator, for `on_main_process`."""
    for rest in Path(place).glob("*.partial"):       # left by a save or a removal that was cut short
        remove(rest)
    for folder in folders(place):
        problem = yield from inspect(folder)
        if problem is None:
            return str(folder)
        aside = folder.with_name(f"{folder.name}.damaged")
        if aside.exists():
            remove(aside)
        folder.rename(aside)
        say(f"passing over {folder}: {problem}; kept as {aside.name}")
    return None


def remove_old(accelerator, place, keep):
    """Remove all but the newest `keep` checkpoints. All processes call it; the main one works."""
    with distributed.together(accelerator):
        for folder in folders(place)[keep:] if accelerator.is_main_process else []:
            remove(folder)


def remove(folder):
    """Remove a folder. It is renamed first: a removal that is cut short leaves no half of it under its
    name."""
    folder = Path(folder)
    try:
        if not folder.is_dir():         # a file of that name is somebody's, and stays as it is
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        partial = folder if folder.suffix == ".partial" else folder.rename(folder.with_suffix(".partial"))
        shutil.rmtree(partial)
    except OSError as error:
        raise ValueError(f"{folder} cannot be removed: {error}; remove it by hand, and resume the run"
                         ) from error


@contextmanager
def stop_signals(accelerator):
    """-> function() -> SIGINT or SIGTERM if any process has received it, 0 if not. All processes must call
    it.

    So all know at the same point of the run, where nothing is half done. A second Ctrl-C ends its process at
    once. A second SIGTERM does not: a scheduler sends one to every process, and the launcher sends it once
    more.
    """
    numbers, received = (signal.SIGINT, signal.SIGTERM), []

    def note(number, frame):
        received.append(number)
        name = signal.Signals(number).name
        os.write(2, f"{name}: this step is finished and saved first; Ctrl-C stops at once\n".encode())
        for second in numbers if number == signal.SIGINT else (signal.SIGINT,):
            signal.signal(second, signal.SIG_DFL)       # this handler works inside a long computation, too

    def asked():
        flags = torch.tensor([float(number in received) for number in numbers], device=accelerator.device)
        flags = distributed.sum_over_processes(accelerator)(flags).tolist()
        return next((int(number) for number, flag in zip(numbers, flags) if flag), 0)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
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
