"""From text to the per-token rewards that PPO maximises: scores, their scaling, and the KL penalty.

Why: three things go wrong between a reward model and PPO. The score's scale sets the step size, so a reward of 50 where 1
was expected destroys the policy: scale, normalise or clip it. Without a penalty for leaving the reference the policy finds
nonsense that the reward model likes. And a penalty coefficient that suits the first step does not suit the hundredth: a
controller keeps the KL near a target.
Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2 and section 2.2 (adaptive controller); Schulman, "Approximating KL
divergence" (2020) for the estimators; Zheng et al. 2023 (arXiv 2307.04964), section 5.3 for score normalising and clipping.
Differs from TRL 0.11.4 in: score scaling works (there it raised AttributeError) and is safe on a constant or one-sample first
batch; moments are those of all processes; an empty response gets no reward instead of an IndexError; an integer score works,
NaN and infinity are refused by sample number.
Shapes: scores (B,); logprobs, ref_logprobs, kl, mask, rewards (B, R), aligned as ppo_core.py draws it.
Copy me: needs torch and safetensors; load_reward_model needs transformers. Tested by tests/test_rewards.py.
"""
import faulthandler
import importlib.util
import json
import math
import os
import re
import sys
import threading
import traceback
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open

# ----------------------------------------------------------------------------------------------- text -> score


def load_reward_model(name, device="cpu", batch_size=64):
    """A text-classification model as a reward: -> function(prompts, responses) -> list of floats, P(good) in [0, 1].

    The good label is the one called POSITIVE, or else the last; a model with a single output gives that output as it is.
    name: folder or hub id. ValueError when there is no such model.
    """
    from transformers import pipeline
    name = os.fspath(name)
    model, tokenizer = load_classifier(name)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=device)
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    good = next((label for label in labels if label.upper() == "POSITIVE"), labels[-1])

    def reward(prompts, responses):
        texts, top = [prompt + response for prompt, response in zip(prompts, responses)], {} if len(labels) == 1 else {"top_k": None}
        try:
            rows = classify(texts, batch_size=batch_size, truncation=True, function_to_apply="none" if len(labels) == 1 else None, **top)
        except Exception as error:      # a tokenizer that is another model's, for one
            raise ValueError(f"the reward model {name!r} cannot judge these texts ({first_line(error)}); get its files again") from error
        if len(labels) == 1:
            return [row["score"] for row in rows]
        return [next(entry["score"] for entry in row if entry["label"] == good) for row in rows]

    return reward


def load_classifier(name):
    """-> model in float32 and tokenizer, whole. No code of the folder is executed."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    no_code = {"trust_remote_code": False}      # not said, transformers asks the terminal, which a run may not have
    try:
        kinds = AutoConfig.from_pretrained(name, **no_code).architectures or []
        report = None
        if any("SequenceClassification" in kind for kind in kinds):
            # float32: the stored type may be half precision, which is slow and coarse on a CPU.
            model, report = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **no_code)
            tokenizer = AutoTokenizer.from_pretrained(name, **no_code)
            limit = getattr(model.config, "max_position_embeddings", None)
            if limit is not None:       # many tokenizers name no largest length, and truncation would then cut nothing
                tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
            [model.config.id2label[i] for i in range(model.config.num_labels)]
    except Exception as error:      # each library has its own for a damaged file, and tokenizers' is a plain Exception
        problem = why_not_loaded(name, error, "config.json")
        if isinstance(error, OSError) and "damaged" not in problem:
            raise ValueError(f"no reward model found at {name!r}: it is neither a folder with config.json and weights nor a hub "
                             "id that could be reached or is cached; pass a folder made by save_pretrained") from error
        raise ValueError(f"the reward model {name!r} cannot be loaded: {problem}") from error
    if report is None:
        raise ValueError(f"{name} is a {'/'.join(kinds) or 'model of no known class'}, which has 0 labels to score "
                         "with; give a text-classification model, such as a *ForSequenceClassification")
    wrong = half_loaded(report, model)
    if wrong:
        raise ValueError(f"the reward model {name!r} would be loaded in part: {len(wrong)} tensors of its weights and its config.json do not "
                         f"fit each other, {wrong[0]} first; get its files again")
    return model, tokenizer


def why_not_loaded(folder, error, suspect):       # same as value_head.why_not_loaded
    """-> half a sentence. suspect: the file that is to blame where each by itself is sound."""
    if isinstance(error, UnpicklingError):
        return "its .bin file holds more than tensors, which a pickle could execute, and nothing of it was; get safetensors"
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is executed only where the user says trust_remote_code=True"
    for path in sorted(path for path in Path(folder).glob("*") if path.suffix in (".json", ".safetensors")):
        try:
            safe_open(path, framework="pt") if path.suffix == ".safetensors" else json.loads(path.read_text(encoding="utf-8"))
        except Exception as broken:
            return f"{path.name} is damaged ({first_line(broken)}); get it again"
    return f"{suspect} does not fit the other files ({first_line(error)}); get them again"


def first_line(error):          # same as value_head.first_line
    """An exception as part of a sentence: a library's may be a page."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")


def half_loaded(report, model):         # same as value_head.half_loaded
    """-> tensors that a transformers model misses in its file, or that the file has more of, as those of another layer.

    report: transformers' loading_info. What is missing it makes up, and what is too many it leaves out, each with a warning. It may leave
    out a pooler beside the layers, or a buffer of older days in one, but not a whole layer.
    """
    tops = {name for part in (model, model.base_model) for name, _ in part.named_children()}     # older files name them from the inner one
    own = "".join(f" .{name}" for name in model.state_dict())
    layers = [(name, re.match(r"(.+?\.\d+\.|)", name)[0]) for name in report["unexpected_keys"] if name.split(".")[0] in tops]
    return sorted([*report["missing_keys"], *(name for name, layer in layers if layer and f".{layer}" not in own)])


def load_reward_fn(spec):
    """`path/to/file.py:function` -> that function, (prompts, responses) -> list of floats; score_texts checks its answers."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name:
        raise ValueError(f"reward_fn is {spec!r}; write path/to/file.py:function")
    if not os.path.isfile(path):
        raise ValueError(f"reward_fn names the file {path!r}, which does not exist; give a path from the current folder")
    module_spec = importlib.util.spec_from_file_location("reward_fn", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["reward_fn"] = module                               # where dataclasses and pickle look for it
    sys.path.append(os.path.dirname(os.path.abspath(path)))         # for what it imports from beside it
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:        # whatever a user's file raises, a SyntaxError included
        raise ValueError(f"{path} cannot be loaded: {first_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function called {name!r}; write path/to/file.py:function")
    return function


@contextmanager
def time_limit(seconds, sentence, grace=5):
    """Ends the whole process with `sentence` and exit code 1 when what is inside takes longer than `seconds`; 0 = no limit.

    What never returns can be neither asked to stop nor waited for: a lock, a socket without a time-out, a loop in C. So a thread looks
    at the clock and ends the process without cleaning up, and the reward stays in the main thread, where its sqlite connection and its
    GPU are. C code that never lets go of Python's lock, a regular expression that goes astray for one, stops that thread too:
    faulthandler's needs no lock, and ends the process `grace` seconds later with the line at which it hung.
    """
    def end():
        sys.stdout.flush()
        print(sentence, file=sys.stderr, flush=True)
        os._exit(1)

    if not seconds:
        yield
        return
    clock = threading.Timer(seconds, end)
    clock.daemon = True
    faulthandler.dump_traceback_later(seconds + grace, exit=True, file=sys.__stderr__)
    clock.start()
    try:
        yield
    finally:
        clock.cancel()
        faulthandler.cancel_dump_traceback_later()


def score_texts(reward, prompts, responses, finite=True):
    """Call any reward function and check what it gives. -> list of B floats. ValueError says what is wrong with it.

    finite=False lets NaN and infinity through, for PPOTrainer.step to refuse with the batch and on all processes.
    """
    try:
        scores = reward(prompts, responses)
    except (Exception, SystemExit) as error:        # whatever a user's function raises; the sentence says what and where
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"the reward function raised {first_line(error)} "
                         f"({os.path.basename(frame.filename)}, line {frame.lineno})") from error
    # A dict would be read by its keys, a string by its letters, and a set has no order.
    sequence = isinstance(scores, (list, tuple)) or getattr(scores, "ndim", 0) > 0      # ndim: tensors and numpy arrays
    if not sequence or len(scores) != len(responses):
        count = len(scores) if sequence else f"a {type(scores).__name__}"
        raise ValueError(f"the reward function returned {count} for {len(responses)} responses; return one float for each")
    return check_scores(scores, finite).tolist()


def check_scores(scores, finite=True):
    """Numbers of any kind (int, float, tensors of shape () or (1,)) -> float32 tensor (B,). NaN and infinity are refused.

    finite=False hands them on; what is too large for float32 is infinity then.
    """
    values = []
    for i, score in enumerate(scores):
        try:
            values.append(float(score.item() if hasattr(score, "item") else score))     # item: arrays of shape (1,) too
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"score {i} of {len(scores)} is {score!r}, not one number; give one float per response") from error
        except OverflowError:
            values.append(math.inf)
        if finite and (not math.isfinite(values[-1]) or abs(values[-1]) > torch.finfo(torch.float32).max):
            raise ValueError(f"score {i} of {len(scores)} is {values[-1]}; every score must be a finite number, "
                             "so mend the reward for that sample or leave the batch out")
    return torch.tensor(values, dtype=torch.float32)


# ----------------------------------------------------------------------------------------------- score scaling


class RunningMoments:
    """Mean and standard deviation of every score seen so far, over all processes.

    Chan et al.'s parallel update: exact, whatever the batch sizes. `std` is the sample standard deviation (n - 1, as numpy's
    ddof=1). Until two different scores have been seen it is 1: dividing by the 0 of a constant first batch gave 8.4e6.
    """

    def __init__(self):
        self.count, self.mean, self.sum_of_squares = 0, 0.0, 0.0    # sum_of_squares: of deviations from the mean

    @property
    def std(self):
        std = math.sqrt(self.sum_of_squares / (self.count - 1)) if self.count > 1 else 0.0
        # Below one rounding of a float32 score it is noise, not spread.
        return std if std > 1e-7 * max(1.0, abs(self.mean)) else 1.0

    def update(self, scores, reduce=lambda tensor: tensor):
        """scores: (B,) of this process. reduce: sums a tensor over all processes; the default is one process."""
        scores = scores.double()
        count, total = reduce(torch.stack([torch.tensor(float(len(scores)), dtype=torch.float64, device=scores.device),
                                           scores.sum()])).tolist()
        if count == 0:
            return
        mean = total / count
        squares = float(reduce(((scores - mean) ** 2).sum()))
        delta, everything = mean - self.mean, self.count + count
        self.sum_of_squares += squares + delta * delta * self.count * count / everything
        self.mean += delta * count / everything
        self.count = everything

    def state_dict(self):
        return {"count": self.count, "mean": self.mean, "sum_of_squares": self.sum_of_squares}

    def load_state_dict(self, state):
        self.count, self.mean, self.sum_of_squares = state["count"], state["mean"], state["sum_of_squares"]


def process_scores(scores, moments=None, subtract_mean=False, clip=None):
    """Scaling, then normalising, then clipping, each only if asked for. scores: (B,) -> (B,).

    moments: RunningMoments that has already seen these scores, or None for no scaling. clip: largest absolute value.
    Scaling alone did not help in "Secrets of RLHF"; normalising and clipping did.
    """
    if moments is not None:
        scores = (scores - (moments.mean if subtract_mean else 0.0)) / moments.std
    return scores if clip is None else scores.clamp(-clip, clip)


# ----------------------------------------------------------------------------------------------- the KL penalty


def kl_penalty(logprobs, ref_logprobs, kind="kl"):
    """Per-token estimate of KL(policy || reference) from one sampled token: (B, R), (B, R) -> (B, R).

    "kl"  = log-ratio (k1): unbiased, may be negative for one token.   "abs" = its absolute value.
    "mse" = half its square (k2): biased, never negative.              "full" is not an estimate, see full_kl.
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "kl":
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind == "mse":
        return 0.5 * log_ratio.square()
    raise ValueError(f"kl_penalty is {kind!r}; use 'kl', 'abs', 'mse', or full_kl for the exact one")


def full_kl(logits, ref_logits):
    """The exact KL(policy || reference) of each token's distribution: (B, R, V), (B, R, V) -> (B, R)."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def token_rewards(scores, kl, mask, kl_coef):
    """The reward of each token: -kl_coef * kl everywhere, plus the score on the last token of the response.

    scores (B,), kl (B, R), mask (B, R) -> rewards (B, R), non_score_reward (B, R). A response without tokens gets nothing.
    """
    non_score_reward = -kl_coef * kl
    # Last position whose mask is 1: a response mask may have holes, so it is not simply length - 1.
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1, keepdim=True)    # (B, 1)
    score = (scores * mask.any(dim=1)).unsqueeze(1).to(kl.dtype)                                          # (B, 1)
    return non_score_reward.scatter_add(1, last, score), non_score_reward


class FixedKLController:
    """The coefficient stays what it was."""

    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, current, n_steps):
        """current: mean KL per response, in nats; n_steps: samples seen since the last call, over all processes."""


class AdaptiveKLController(FixedKLController):
    """Multiplies the coefficient by up to 1 +- 0.2 * n_steps / horizon a step, towards KL = target (nats per response)."""

    def __init__(self, init_kl_coef, target, horizon):
        super().__init__(init_kl_coef)
        self.target, self.horizon = target, horizon

    def update(self, current, n_steps):
        proportional_error = min(max(current / self.target - 1, -0.2), 0.2)       # Ziegler et al., section 2.2
        self.value *= 1 + proportional_error * n_steps / self.horizon


if __name__ == "__main__":
    scores = check_scores([1, 2.5, torch.tensor([-1.0])])                                         # (3,)
    moments = RunningMoments()
    moments.update(scores)
    print("mean", round(moments.mean, 4), "std", round(moments.std, 4),
          "normalised", process_scores(scores, moments, subtract_mean=True).numpy().round(3))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])                                        # (3, 3)
    kl = kl_penalty(torch.full((3, 3), -1.0), torch.full((3, 3), -1.5))
    rewards, _ = token_rewards(scores, kl * mask, mask, kl_coef=0.2)
    print("rewards\n", rewards.numpy().round(3))
    controller = AdaptiveKLController(0.2, target=6.0, horizon=10000)
    controller.update(current=12.0, n_steps=64)
    print("KL coefficient after a KL of 12 at target 6:", round(controller.value, 6))
