"""When a run of scripts/train.py saves a checkpoint, and how it resumes from one. checkpoint.py writes them.

Why: a run that is killed after ten hours must resume from a state that is known to be whole.
Tested by tests/test_train.py and tests/test_survival.py.
"""
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint


def refuse_damaged(folder):
    """ValueError if plainppo wrote this folder and one of its files has changed since."""
    problem = checkpoint.damage(folder) if (Path(folder) / checkpoint.MANIFEST).is_file() else None
    if problem is not None:
        raise ValueError(f"{folder} cannot be loaded: {problem}; use an older one")


def restore(trainer, run):
    """If the run is resumed, load its newest whole checkpoint. -> the number of the first step to do."""
    if run.resumed:
        newest = checkpoint.newest_whole(run.checkpoints, run.say, trainer.accelerator)
        if newest is not None:
            checkpoint.load(trainer, newest, check=False)           # newest_whole has just checked it
        run.say(f"resuming after step {trainer.steps_done}")
        run.forget_after(trainer.steps_done)
    return trainer.steps_done + 1


def save(trainer, run, step, stop):
    """Save a checkpoint after every `save_every` steps, and when a signal asks the run to stop.

    stop: the number of that signal, or 0. -> stop again, so that main() can end the run.
    """
    config = trainer.config
    if not stop and not (config.save_every and step % config.save_every == 0):
        return stop
    folder = run.checkpoints / f"step-{step:06d}"
    run.on_main(checkpoint.to_disk, run.metrics)    # no checkpoint may be newer than the metrics on the disk
    checkpoint.save(trainer, folder)
    checkpoint.remove_old(trainer.accelerator, run.checkpoints, config.keep_last)
    if stop:
        run.say(f"{signal.Signals(stop).name}: stopped after step {step}, which is saved in {folder}; "
                f"--resume {run.folder} goes on")
        run.accelerator.wait_for_everyone()     # as soon as one process ends, a launcher ends the others
    return stop


def save_final(trainer, folder):
    """Save the trained policy in a folder that is whole or not there."""
    if folder.exists() and trainer.accelerator.is_main_process:     # left by a run that was killed at its end
        checkpoint.remove(folder)
    size = checkpoint.bytes_to_save(trainer, optimizer=False)
    with checkpoint.whole_folder(trainer.accelerator, folder, size) as partial:
        trainer.save_pretrained(partial)
