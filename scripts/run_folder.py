"""What a run of scripts/train.py leaves on the disk: settings, metrics, curves, samples and a summary.

Why: an experiment without settings and metrics cannot be compared or repeated, and a run that cannot write
must not find this out after an hour. So the folder is made before anything is computed. A file that says what
a run is, or how it ended, is whole or not there. The main process alone writes and prints; if it cannot
write, all processes stop and say why.
Tested by tests/test_train.py and tests/test_bad_input.py.
"""
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate
import safetensors.torch
import torch
import transformers
from tqdm import tqdm

import distributed
from run_inputs import digest

NEWEST = 8          # responses of a step that newest.json keeps

# ------------------------------------------------------------------------------------------------- evaluation


@dataclass
class Evaluation:
    """The policy's answers to the held-out prompts, sampled with fixed random numbers, and their scores."""
    prompts: list
    responses: list
    scores: list
    tokens: list = ()       # for each response, what report.token_numbers gives; or nothing

    @classmethod
    def read(cls, path):
        """-> the Evaluation in the file `path`, or None if that file is damaged."""
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            sizes = {len(found.prompts), len(found.responses), len(found.scores),
                     len(found.tokens or found.prompts)}
            texts = all(isinstance(text, str) for text in found.prompts + found.responses)
            whole = len(sizes) == 1 and 0 not in sizes and texts and math.isfinite(found.score)
            return found if whole else None
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None

    @property
    def score(self):
        return sum(self.scores) / len(self.scores)

    @property
    def distinct_bigrams(self):
        """Different pairs of neighbouring words / all such pairs. Low = the responses are alike."""
        pairs = [pair for text in self.responses for pair in zip(text.split(), text.split()[1:])]
        return len(set(pairs)) / max(1, len(pairs))

    def __str__(self):
        return (f"mean score {self.score:.3f} on {len(self.scores)} held-out prompts, distinct bigrams "
                f"{self.distinct_bigrams:.2f}")


# ------------------------------------------------------------------------------------------------- the folder


class RunFolder:
    """The folder runs/<name>/, and what is printed. All processes call it; the main one alone writes."""

    def __init__(self, config, accelerator):
        self.config, self.accelerator, self.main = config, accelerator, accelerator.is_main_process
        self.trainer = None                             # set by main(), for checks.leave_out
        self.started, self.seconds, self.timed_steps = time.perf_counter(), 0.0, 0
        self.progress = None                            # set by the first step
        self.resumed = config.resume is not None
        # All processes use the same folder, and stop together if there is none.
        folder, problem = self.on_main(self.make)
        if problem is not None:
            raise ValueError(problem)
        self.folder = Path(folder)
        with distributed.together(accelerator):
            if not self.folder.is_dir():
                raise ValueError(
                    f"{self.folder} is not there on this machine, but every process writes its part of a "
                    "checkpoint into it; give an --output_dir that all machines share")
        self.metrics, self.checkpoints = self.folder / "metrics.jsonl", self.folder / "checkpoints"
        accelerator.project_configuration.logging_dir = str(self.folder)

    def make(self):
        """-> (folder, None), with config.json and an empty metrics.jsonl in it; or (None, what is wrong)."""
        config, prefix = self.config, f"runs/{Path(self.config.model_name).name}"
        folder = Path(config.output_dir or f"{prefix}-N")
        versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
        settings = dataclasses.asdict(config)
        try:
            if self.resumed:
                return str(folder), None
            if config.output_dir is None:
                folder = first_free(prefix)
            elif not unused(folder):
                return None, (f"{folder} already has a run or other files; "
                              "choose another --output_dir or move it away")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text("")
            # config.json is written last: --resume takes every folder with a config.json for a run.
            content = {**settings, "versions": versions, "sha256": digest(settings)}
            replace_file(folder / "config.json", json.dumps(content, indent=1))
        except OSError as error:
            return None, (f"cannot write to the run folder {folder}: {error.strerror}; "
                          "choose another --output_dir")
        return str(folder), None

    def on_main(self, function, *arguments):
        """Call `function` on the main process alone. -> its result, on every process."""
        result = function(*arguments) if self.main else None
        return accelerate.utils.broadcast_object_list([result])[0]

    def say(self, text):
        if self.main:
            tqdm.write(text)        # above the progress line, if there is one
            sys.stdout.flush()

    @contextmanager
    def writes(self, path, needed):
        """Context for writing `path`, about `needed` bytes. If that fails, all processes raise ValueError."""
        try:
            with distributed.writes(self.accelerator):
                yield
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            raise ValueError(f"{path} was not written: {error}; it needs {needed:,} bytes and {free:,} "
                             "are free; make room, and resume the run") from error

    def finished(self):
        """True for a run that is resumed although it did all its steps. A line says so."""
        done = self.resumed and (self.folder / "summary.json").is_file()
        if done:
            steps = self.config.steps
            self.say(f"{self.folder} is finished after {steps} steps; there is nothing left to do")
        return done

    def before(self, evaluate):
        """-> the evaluation before the first step. A resumed run reads it from before.json.

        If that file is missing or damaged, the policy is evaluated again: its checkpoint is not loaded yet.
        """
        path = self.folder / "before.json"
        saved = self.on_main(lambda: Evaluation.read(path) if self.resumed and path.is_file() else None)
        evaluation = evaluate() if saved is None else saved
        text = json.dumps(dataclasses.asdict(evaluation))
        with self.writes(path, len(text)):
            if self.main and saved is None:
                replace_file(path, text)
        self.say(f"before: {evaluation}")
        return evaluation

    def record(self, step, stats, seconds, batch):
        """Add the statistics of a step to metrics.jsonl, and print the most important ones in one line.

        batch: the Evaluation of its responses, of which newest.json keeps some.
        """
        # Tensors with a number per token are left out.
        numbers = {name: value.tolist() if torch.is_tensor(value) else value for name, value in stats.items()
                   if not torch.is_tensor(value) or "_dist" in name}
        columns = batch.prompts, batch.responses, [float(score) for score in batch.scores]
        self.write_line(step, numbers, Evaluation(*(column[:NEWEST] for column in columns)))
        self.seconds, self.timed_steps = self.seconds + seconds, self.timed_steps + 1
        tokens_per_second = sum(stats["tokens/responses_dist"].tolist()) / seconds
        kl = round(stats["objective/kl"], 2) + 0.0              # + 0.0 turns -0.0 into 0
        text = (f"score {stats['ppo/mean_raw_scores']:6.3f}  KL {kl:6.2f}  KL coef "
                f"{stats['objective/kl_coef']:.4f}  length {stats['tokens/responses_len_mean']:5.1f}  "
                f"{tokens_per_second:5.0f} tokens/s")
        if self.main:
            self.show_progress(step, text)

    def show_progress(self, step, text):
        """In a terminal, rewrite one line in place; in a file, add one."""
        if self.progress is None:
            self.progress = tqdm(total=self.config.steps, initial=step - 1, disable=None, file=sys.stdout,
                                 bar_format="step {n_fmt}/{total_fmt}  {remaining} left  {desc}")
        if self.progress.disable:
            left = int(self.seconds / self.timed_steps * (self.config.steps - step))
            self.say(f"step {step:4d}/{self.config.steps}  {text}  {left // 60:3d}:{left % 60:02d} left")
        else:
            self.progress.set_description_str(text, refresh=False)
            self.progress.update(step - self.progress.n)

    def write_line(self, step, numbers, newest=None):
        """Add one line to metrics.jsonl. newest: an Evaluation for newest.json."""
        line = json.dumps({"step": step, **numbers}) + "\n"
        with self.writes(self.metrics, len(line)):
            if self.main:
                with open(self.metrics, "a", encoding="utf-8") as file:
                    file.write(line)
                if newest is not None:
                    replace_file(self.folder / "newest.json", json.dumps(dataclasses.asdict(newest)))

    def forget_after(self, steps):
        """Keep the first `steps` lines of metrics.jsonl: a resumed run does the later steps again."""
        present = self.main and self.metrics.is_file()
        lines = self.metrics.read_text(encoding="utf-8").splitlines()[:steps] if present else []
        text = "".join(f"{line}\n" for line in lines)
        with self.writes(self.metrics, len(text)):
            if self.main:
                replace_file(self.metrics, text)

    def keep_batch(self, queries, responses, scores, step, error):
        """Write the batch of all processes to bad_batch.safetensors. -> part of a sentence: where it is.

        queries, responses: lists of (Q_i,), (R_i,); each list is written as one flat tensor and the lengths.
        After a rollout that failed, responses and scores are empty. A later batch replaces an earlier one.
        """
        tokens = [query.tolist() for query in queries], [response.tolist() for response in responses]
        shares = distributed.gather_lists(self.accelerator, [(*tokens, [float(score) for score in scores])])
        tensors = {"ranks": torch.tensor([rank for rank, share in enumerate(shares) for _ in share[0]]),
                   "scores": torch.tensor([score for share in shares for score in share[2]])}
        for i, name in enumerate(("queries", "responses")):
            samples = [sample for share in shares for sample in share[i]]
            tensors[name] = torch.tensor([token for sample in samples for token in sample], dtype=torch.long)
            tensors[f"{name}_lengths"] = torch.tensor([len(sample) for sample in samples], dtype=torch.long)
        path = self.folder / "bad_batch.safetensors"
        try:
            if self.main:
                metadata = {"step": str(step), "problem": str(error)}
                replace_file(path, safetensors.torch.save(tensors, metadata=metadata))
        except OSError as failure:      # A full disk must not hide why the batch is bad.
            return f"the batch could not be kept: {failure.strerror}"
        return f"the batch is in {path}"

    def left_out(self, step, error, where):
        """Record that the batch of this step was left out. where: the result of keep_batch."""
        self.accelerator.log({"ppo/bad_batch": 1.0}, step=step)
        if self.progress is not None:
            self.progress.n = step
        self.say(f"step {step:4d}/{self.config.steps}  left out: {error} ({where})")
        self.write_line(step, {"ppo/bad_batch": 1.0})

    def finish(self, before, after, state_bytes, write_report):
        """Write the results after the last step.

        state_bytes: of the optimizer. write_report: function(folder) -> a sentence: where the report is.
        """
        if self.progress is not None:
            self.progress.close()
        peak = distributed.largest_peak_memory(self.accelerator)
        with self.writes(self.folder / "curves.png", 150_000):      # the largest file of them
            if self.main:
                self.write_results(before, after, state_bytes, peak)
        self.say(self.on_main(write_report, self.folder))       # all else is written, so it can cost nothing

    def write_results(self, before, after, state_bytes, peak):
        """after.json, curves.png, samples.md, summary.json. peak: bytes of memory."""
        lines = [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
        # A batch that was left out has no statistics.
        rows = [line for line in lines if not line.get("ppo/bad_batch")]
        replace_file(self.folder / "after.json", json.dumps(dataclasses.asdict(after)))
        draw_curves(rows, self.folder / "curves.png")
        write_samples(before, after, self.folder / "samples.md")
        sides = {f"{name} {side}": getattr(evaluation, name)
                 for side, evaluation in (("before", before), ("after", after))
                 for name in ("score", "distinct_bigrams")}
        kl, seconds = rows[-1]["objective/kl"] if rows else 0.0, time.perf_counter() - self.started
        summary = {**sides, "kl": kl, "steps": self.config.steps, "batches left out": len(lines) - len(rows),
                   "seconds": seconds, "seconds in steps": self.seconds, "peak memory bytes": peak,
                   "optimizer state bytes": state_bytes}
        # summary.json is written last: a run that has it is finished.
        replace_file(self.folder / "summary.json", json.dumps(summary, indent=1))
        self.say(f"before: {before}\nafter:  {after}, KL {kl:.2f} nats\n{seconds:.0f} s, peak memory "
                 f"{peak / 1e6:.0f} MB; the model is in {self.folder / 'final'}, see also "
                 f"{self.folder / 'curves.png'} and samples.md")


def replace_file(path, content):
    """Write text or bytes so that `path` holds the old content or the new one, and never half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")      # `make watch` writes there, too
    try:
        with open(partial, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:         # What was written so far would use space on a full disk.
        partial.unlink(missing_ok=True)
        raise


def first_free(prefix):
    """Make the first of prefix-1, prefix-2, ... that does not exist. Two runs may start at the same time."""
    for number in itertools.count(1):
        folder = Path(f"{prefix}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def unused(folder):
    """True for a folder that does not exist, is empty, or is of a run that ended before its first step."""
    files = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    nothing_else = all(name in ("metrics.jsonl", "report.html") or name.startswith("config.json")
                       for name in files)
    return nothing_else and ("metrics.jsonl" not in files or files["metrics.jsonl"].stat().st_size == 0)


def draw_curves(rows, path):
    """Draw four panels over the steps. rows: the lines of metrics.jsonl as dicts. path: of the picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = (("score", ["ppo/mean_raw_scores"]),
              ("KL to the reference (nats per response)", ["objective/kl"]),
              ("entropy (nats per token)", ["ppo/policy/entropy"]),
              ("losses", ["ppo/loss/policy", "ppo/loss/value"]))
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels):
        for name in names:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("PPO step")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def write_samples(before, after, path, count=16):
    """A table of `count` prompts, answered before and after: the prompt in bold, then the response."""
    lines = [f"# Samples\n\nMean score on {len(before.scores)} held-out prompts: {before.score:.3f} before, "
             f"{after.score:.3f} after.\n", "| | score | text |", "|---|---|---|"]
    for i in range(min(count, len(before.prompts))):
        for name, side in (("before", before), ("after", after)):
            text = f"**{side.prompts[i]}**{side.responses[i]}".replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {name} | {side.scores[i]:.2f} | {text} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
