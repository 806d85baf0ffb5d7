"""From text to the per-token rewards that PPO maximises: scores, their scaling, and the KL penalty.

Why: the scale of the scores sets the size of the update: scores of 50 in place of 1 destroy the policy.
Without a penalty for leaving the reference, the policy finds nonsense that the reward model likes. No fixed
coefficient of this penalty suits a whole run, so a controller keeps the KL near a target.
Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2 and section 2.2 (adaptive controller); Schulman,
"Approximating KL divergence" (2020); Zheng et al. 2023 (arXiv 2307.04964), section 5.3 (score clipping).
Differs from TRL 0.11.4 in: score scaling works, also on a constant first batch and over all processes; an
empty response gets no reward (TRL raises IndexError); NaN and infinity are refused.
Shapes: scores (B,); logprobs, ref_logprobs, kl, mask, rewards (B, R), aligned as ppo_core.py draws it.
Copy me: needs torch; load_reward_model needs transformers. Tested by tests/test_rewards.py.
"""
import importlib.util
import math
import os
import re
import sys
import traceback

import torch


def load_reward_model(name, device="cpu", batch_size=64):
    """A text classifier as a reward: -> function(prompts, responses) -> list of floats.

    Each is the probability of the label POSITIVE, or else of the last label; a model with one output gives
    that output. name: folder or hub id. ValueError: no such model is found.
    """
    from transformers import pipeline
    name = os.fspath(name)
    model, tokenizer = load_classifier(name)
    labels = [str(label) for _, label in sorted(model.config.id2label.items())]
    good_label = next((label for label in labels if label.upper() == "POSITIVE"), labels[-1])
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=device)

    def reward(prompts, responses):
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        # top_k=None: all labels. function_to_apply=None: what suits the model, usually softmax.
        settings = {"top_k": None, "function_to_apply": "none" if len(labels) == 1 else None}
        try:
            rows = classify(texts, batch_size=batch_size, truncation=True, **settings)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the reward model {name!r} cannot judge these texts ({one_line(error)}); "
                             "check that its files belong together") from error
        return [next(entry["score"] for entry in row if entry["label"] == good_label) for row in rows]

    return reward


def load_classifier(name):
    """-> the model in float32 and its tokenizer. No code of the folder is executed."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    no_code = {"trust_remote_code": False}      # None: transformers asks on the terminal and waits
    try:
        kind = "/".join(AutoConfig.from_pretrained(name, **no_code).architectures or [])
        if "SequenceClassification" not in kind:
            raise ValueError(f"{name} is a {kind or 'model of no known class'}, which has 0 labels to score "
                             "with; give a text-classification model, a *ForSequenceClassification")
        # float32: the stored type may be half precision, which is slow and coarse on a CPU
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **no_code)
        tokenizer = AutoTokenizer.from_pretrained(name, **no_code)
    except OSError as error:
        raise ValueError(f"no reward model found at {name!r}: give a folder made by save_pretrained, with "
                         "config.json and weights, or a hub id that is reachable or cached") from error
    # transformers makes missing tensors at random and leaves out unknown ones. An unknown old buffer is
    # harmless, but a whole unknown layer ("transformer.h.3.") is not. Older files omit the outer name.
    known = "".join(f" .{tensor}" for tensor in model.state_dict())
    layers = [(tensor, re.match(r".+?\.\d+\.", tensor)) for tensor in report["unexpected_keys"]]
    surplus = [tensor for tensor, layer in layers if layer and f".{layer[0]}" not in known]
    wrong = sorted([*report["missing_keys"], *surplus])
    if wrong:
        raise ValueError(f"the reward model {name!r} would be loaded in part: {len(wrong)} tensors do not "
                         f"fit its config.json, {wrong[0]} first; get its files again")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:       # many tokenizers name no limit, and then truncation cuts nothing
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return model, tokenizer


def one_line(error):
    """-> class and message of an exception on one line of at most 200 characters."""
    return " ".join(traceback.format_exception_only(error)[-1].split())[:200]


def load_reward_fn(spec):
    """`path/to/file.py:function` -> that function, (prompts, responses) -> list of floats."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name:
        raise ValueError(f"reward_fn is {spec!r}; write path/to/file.py:function")
    if not os.path.isfile(path):
        raise ValueError(f"reward_fn names the file {path!r}, which does not exist; give an existing one")
    module_spec = importlib.util.spec_from_file_location("reward_fn", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["reward_fn"] = module                           # dataclasses and pickle look it up here
    sys.path.append(os.path.dirname(os.path.abspath(path)))     # so that the file can import its neighbours
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:        # broad: a user's file can raise anything
        raise ValueError(f"{path} cannot be loaded: {one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function called {name!r}; write path/to/file.py:function")
    return function


def score_texts(reward, prompts, responses, finite=True):
    """Call any reward function and check its result. -> list of B floats. ValueError says what is wrong.

    finite=False lets NaN and infinity pass: PPOTrainer.step refuses them, on all processes.
    """
    try:
        scores = reward(prompts, responses)
    except (Exception, SystemExit) as error:        # broad: a user's function can raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"the reward function raised {one_line(error)} "
                         f"({os.path.basename(frame.filename)}, line {frame.lineno})") from error
    # A dict, a string or a set also has a length. Tensors and arrays have ndim.
    sequence = isinstance(scores, (list, tuple)) or getattr(scores, "ndim", 0) > 0
    if not sequence or len(scores) != len(responses):
        count = len(scores) if sequence else f"a {type(scores).__name__}"
        raise ValueError(f"the reward function returned {count} for {len(responses)} responses; "
                         "return one float for each")
    return check_scores(scores, finite).tolist()


def check_scores(scores, finite=True):
    """B numbers of any kind (int, float, tensors of shape () or (1,)) -> float32 tensor (B,).

    NaN and infinity are refused, or pass with finite=False; what float32 cannot hold becomes infinity.
    """
    values = []
    for i, score in enumerate(scores):
        try:
            values.append(float(score.item() if hasattr(score, "item") else score))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"score {i} of {len(scores)} is {score!r}, not one number; "
                             "give one float per response") from error
        except OverflowError:       # an int that no float can hold
            values.append(math.inf)
        if finite and not abs(values[-1]) <= torch.finfo(torch.float32).max:    # `not <=` catches NaN as well
            raise ValueError(f"score {i} of {len(scores)} is {values[-1]}; every score must be a finite "
                             "number, so mend the reward for that sample or leave the batch out")
    return torch.tensor(values, dtype=torch.float32)


class RunningMoments:
    """Mean and sample standard deviation (n - 1) of all scores so far, over all processes (Chan et al.).

    `std` is 1 until two different scores have been seen, so that nothing is divided by 0.
    """

    def __init__(self):
        self.count, self.mean, self.sum_of_squares = 0, 0.0, 0.0    # squares of deviations from the mean

    @property
    def std(self):
        std = math.sqrt(self.sum_of_squares / (self.count - 1)) if self.count > 1 else 0.0
        # A spread below the rounding error of a float32 score is noise.
        return std if std > 1e-7 * max(1.0, abs(self.mean)) else 1.0

    def update(self, scores, reduce=lambda tensor: tensor):
        """scores: (B,) of this process. reduce: sums a tensor over all processes; the default is for one."""
        scores = scores.double()
        count, total = reduce(torch.stack([torch.ones_like(scores).sum(), scores.sum()])).tolist()
        if count == 0:
            return
        mean = total / count
        squares = float(reduce(((scores - mean) ** 2).sum()))
        delta, new_count = mean - self.mean, self.count + count
        self.sum_of_squares += squares + delta * delta * self.count * count / new_count
        self.mean += delta * count / new_count
        self.count = new_count

    def state_dict(self):
        return {"count": self.count, "mean": self.mean, "sum_of_squares": self.sum_of_squares}

    def load_state_dict(self, state):
        self.count, self.mean, self.sum_of_squares = state["count"], state["mean"], state["sum_of_squares"]


def process_scores(scores, moments=None, subtract_mean=False, clip=None):
    """Scale, normalise and clip scores, in this order, each only if asked for: (B,) -> (B,).

    moments: RunningMoments that have seen these scores; None = no scaling. clip: largest absolute value.
    """
    if moments is not None:
        scores = (scores - (moments.mean if subtract_mean else 0.0)) / moments.std
    return scores if clip is None else scores.clamp(-clip, clip)


def kl_penalty(logprobs, ref_logprobs, kind="kl"):
    """Estimate of KL(policy || reference), in nats, from the sampled token alone: (B, R), (B, R) -> (B, R).
    "kl"  = log-ratio (k1): unbiased, may be negative for one token.   "abs" = its absolute value.
    "mse" = half its square (k2): biased, never negative.              "full" is exact: see full_kl.
    """
    log_ratio = logprobs - ref_logprobs
    estimates = {"kl": log_ratio, "abs": log_ratio.abs(), "mse": 0.5 * log_ratio.square()}
    if kind not in estimates:
        raise ValueError(f"kl_penalty is {kind!r}; use 'kl', 'abs', 'mse', or full_kl for the exact one")
    return estimates[kind]


def full_kl(logits, ref_logits):
    """The exact KL(policy || reference), in nats: logits (B, R, V), (B, R, V) -> (B, R).

    A token that the policy excludes (logit -inf) adds 0; one that only the reference excludes, inf.
    """
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    probs = logp.exp()
    # Without masked_fill, 0 * -inf would be NaN. A NaN in the logits stays NaN, because NaN == 0 is false.
    return (probs * (logp - ref_logp)).masked_fill(probs == 0, 0.0).sum(-1)


def token_rewards(scores, kl, mask, kl_coef):
    """The reward of each token: -kl_coef * kl, plus the score on the last token of the response.

    scores (B,), kl (B, R), mask (B, R) -> rewards, non_score_reward (B, R). An empty response gets no score.
    """
    non_score_reward = -kl_coef * kl
    # the last position whose mask is 1, which is not length - 1 where a mask has holes
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)      # (R,)
    last = (mask * positions).argmax(dim=1, keepdim=True)                   # (B, 1)
    score = (scores * mask.any(dim=1)).unsqueeze(1).to(kl.dtype)            # (B, 1)
    return non_score_reward.scatter_add(1, last, score), non_score_reward


class FixedKLController:
    """Keeps the KL coefficient as it is."""

    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, current, n_steps):
        """current: mean KL per response, in nats. n_steps: samples since the last call, on all processes."""


class AdaptiveKLController(FixedKLController):
    """Raises the coefficient while the KL is above `target` (nats per response), and lowers it below.

    An update changes it by at most a share of 0.2 * n_steps / horizon (in samples).
    """

    def __init__(self, init_kl_coef, target, horizon):
        super().__init__(init_kl_coef)
        self.target, self.horizon = target, horizon

    def update(self, current, n_steps):
        proportional_error = min(max(current / self.target - 1, -0.2), 0.2)     # Ziegler et al., 2.2
        self.value *= 1 + proportional_error * n_steps / self.horizon


if __name__ == "__main__":
    scores = check_scores([1, 2.5, torch.tensor([-1.0])])                       # (3,)
    moments = RunningMoments()
    moments.update(scores)
    print(f"mean {moments.mean:.4f}, std {moments.std:.4f}, scaled", process_scores(scores, moments).tolist())
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])                      # (3, 3)
    kl = kl_penalty(torch.full((3, 3), -1.0), torch.full((3, 3), -1.5))
    print("rewards", token_rewards(scores, kl * mask, mask, kl_coef=0.2)[0].tolist())
