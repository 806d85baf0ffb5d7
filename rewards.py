"""From text to the per-token rewards that PPO maximises: scores, their scaling, and the KL penalty.

Why: the scale of the scores sets the size of the update, so scores of 50 instead of 1 destroy the policy.
Without a KL penalty, the policy finds nonsense that the reward model likes. No fixed coefficient suits a
whole run, so a controller keeps the KL near a target.
Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2 and section 2.2 (adaptive controller); Schulman,
"Approximating KL divergence" (2020); Zheng et al. 2023 (arXiv 2307.04964), section 5.3 (score clipping).
Differs from TRL 0.11.4 in: score scaling works (TRL raises AttributeError), also on a constant first batch;
an empty response gets no score (TRL raises IndexError); NaN and infinity are refused.
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
from torch.nn.utils.rnn import pad_sequence


def load_reward_model(name, device="cpu", batch_size=64):
    """Loads a text-classification model. -> a reward function: (prompts, responses) -> list of floats.

    name: folder or hub id. The reward is the probability of the label POSITIVE, or else of the last label.
    A model with one output gives its output. ValueError: no such model is found, or it is no classifier.
    """
    from transformers import pipeline
    name = os.fspath(name)
    model, tokenizer = load_classifier(name)
    labels = [str(label) for _, label in sorted(model.config.id2label.items())]
    good_label = next((label for label in labels if label.upper() == "POSITIVE"), labels[-1])
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=device)

    def reward(prompts, responses):
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        # top_k=None returns all labels. function_to_apply=None takes what suits the model, usually softmax.
        settings = {"top_k": None, "function_to_apply": "none" if len(labels) == 1 else None}
        try:
            rows = classify(texts, batch_size=batch_size, truncation=True, **settings)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the reward model {name!r} cannot judge these texts ({one_line(error)}); "
                             "check that its files belong together") from error
        return [next(entry["score"] for entry in row if entry["label"] == good_label) for row in rows]

    return reward


def load_classifier(name):
    """-> the model in float32 and its tokenizer. No code from its folder is executed."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    # Otherwise transformers may ask at the terminal and wait.
    no_code = {"trust_remote_code": False}
    try:
        classes = "/".join(AutoConfig.from_pretrained(name, **no_code).architectures or [])
        if "SequenceClassification" not in classes:
            raise ValueError(f"{name} is a {classes or 'model of unknown class'}, which has 0 labels to "
                             "score with; give a text-classification model (*ForSequenceClassification)")
        # Stored half precision would be slow and coarse on a CPU.
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **no_code)
        tokenizer = AutoTokenizer.from_pretrained(name, **no_code)
    except OSError as error:
        raise ValueError(f"no reward model found at {name!r}: give a folder made by save_pretrained, or "
                         "a hub id that is reachable or cached") from error
    # transformers draws missing tensors at random and ignores unexpected ones. These are mostly old buffers,
    # but an error if the model lacks their whole layer ("transformer.h.3.", or "h.3." in old files).
    names = "".join(f" .{tensor}" for tensor in model.state_dict())
    layers = [(tensor, re.match(r".+?\.\d+\.", tensor)) for tensor in report["unexpected_keys"]]
    unexpected = [tensor for tensor, layer in layers if layer and f".{layer[0]}" not in names]
    wrong = sorted([*report["missing_keys"], *unexpected])
    if wrong:
        raise ValueError(f"the reward model {name!r} would be loaded in part: {len(wrong)} tensors do not "
                         f"fit its config.json, {wrong[0]} first; get its files again")
    # Many tokenizers have no largest length, so truncation would cut nothing.
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return model, tokenizer


def one_line(error):
    """-> class and message of an exception in one line, at most 200 characters."""
    return " ".join(traceback.format_exception_only(error)[-1].split())[:200]


def load_reward_fn(spec):
    """spec: `path/to/file.py:function`. -> that function: (prompts, responses) -> list of floats."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name:
        raise ValueError(f"reward_fn is {spec!r}; write path/to/file.py:function")
    if not os.path.isfile(path):
        raise ValueError(f"reward_fn names the file {path!r}, which does not exist; correct the path")
    module_spec = importlib.util.spec_from_file_location("reward_fn", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules["reward_fn"] = module                           # dataclasses and pickle look it up here
    sys.path.append(os.path.dirname(os.path.abspath(path)))     # so that the file can import its neighbours
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:        # A user's file can raise anything.
        raise ValueError(f"{path} cannot be loaded: {one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function called {name!r}; write path/to/file.py:function")
    return function


def score_texts(reward, prompts, responses, finite=True):
    """Calls a reward function and checks its result. -> list of B floats. ValueError says what is wrong.

    finite=False lets NaN and infinity pass to PPOTrainer.step, which refuses them on all processes together.
    """
    try:
        scores = reward(prompts, responses)
    except (Exception, SystemExit) as error:        # A user's function can raise anything.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(f"the reward function raised {one_line(error)} "
                         f"({os.path.basename(frame.filename)}, line {frame.lineno})") from error
    # A dict, a string or a set has a length, but is no list of scores. Tensors and arrays have ndim.
    sequence = isinstance(scores, (list, tuple)) or getattr(scores, "ndim", 0) > 0
    if not sequence or len(scores) != len(responses):
        count = len(scores) if sequence else f"a {type(scores).__name__}"
        raise ValueError(f"the reward function returned {count} for {len(responses)} responses; "
                         "return one float for each")
    return check_scores(scores, finite).tolist()


def check_scores(scores, finite=True):
    """scores: B numbers of any kind (int, float, tensors of shape () or (1,)). -> float32 tensor (B,).

    finite=True refuses NaN and infinity. A number too large for float32 counts as infinity.
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
        if finite and not abs(values[-1]) <= torch.finfo(torch.float32).max:    # `not <=` is true for NaN too
            raise ValueError(f"score {i} of {len(scores)} is {values[-1]}, not finite in float32; "
                             "correct the reward of that sample or leave the batch out")
    return torch.tensor(values, dtype=torch.float32)


class RunningMoments:
    """Mean and sample standard deviation of all scores so far, on all processes (Chan et al. 1979).

    `std` is 1 until two different scores have been seen, so that nothing is divided by 0.
    """

    def __init__(self):
        self.count, self.mean, self.sum_of_squares = 0, 0.0, 0.0    # squares of deviations from the mean

    @property
    def std(self):
        std = math.sqrt(self.sum_of_squares / (self.count - 1)) if self.count > 1 else 0.0
        # A deviation below the rounding error of a float32 score is noise.
        return std if std > 1e-7 * max(1.0, abs(self.mean)) else 1.0

    def update(self, scores, reduce=lambda tensor: tensor):
        """scores (B,) of this process. reduce: sums a tensor over all processes (default: one)."""
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
    """Scales (moments), normalises (subtract_mean) and clips the scores: (B,) -> (B,).
    moments must have seen these scores. In Zheng et al., scaling alone did not help; the other two did.
    """
    if moments is not None:
        scores = (scores - (moments.mean if subtract_mean else 0.0)) / moments.std
    return scores if clip is None else scores.clamp(-clip, clip)


def kl_penalty(logprobs, ref_logprobs, kind="kl"):
    """Estimates KL(policy || reference), in nats, from the sampled tokens: (B, R), (B, R) -> (B, R).
    "kl" is the log-ratio (k1: unbiased), "abs" its absolute value, "mse" half its square (k2: biased).
    """
    log_ratio = logprobs - ref_logprobs
    estimates = {"kl": log_ratio, "abs": log_ratio.abs(), "mse": 0.5 * log_ratio.square()}
    if kind not in estimates:
        raise ValueError(f"kl_penalty is {kind!r}; use 'kl', 'abs', 'mse', or full_kl for the exact one")
    return estimates[kind]


def full_kl(logits, ref_logits):
    """The exact KL(policy || reference), in nats, over V tokens: (B, R, V), (B, R, V) -> (B, R).

    A token of probability 0 (logit -inf) under the policy adds 0; under the reference alone it gives inf.
    """
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    probs = logp.exp()
    # 0 * -inf would be NaN. A NaN in the logits stays, because NaN == 0 is false.
    return (probs * (logp - ref_logp)).masked_fill(probs == 0, 0.0).sum(-1)


def token_rewards(scores, kl, mask, kl_coef, token_scores=()):
    """-> rewards, non_score_reward, both (B, R): -kl_coef * kl with and without the score of the response.
    scores (B,), kl (B, R), mask (B, R). The score is added at the last token; an empty response gets none.
    token_scores: B tensors (R_i,), each number added at its own token; or none, or (1,) each.
    """
    non_score_reward = -kl_coef * kl
    if any(len(row) > 1 for row in token_scores):
        return non_score_reward + pad_sequence(token_scores, batch_first=True) * mask, non_score_reward
    # The last position whose mask is 1. A mask may have holes, so its sum does not give it.
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)      # (R,)
    last = (mask * positions).argmax(dim=1, keepdim=True)                   # (B, 1)
    score = (scores * mask.any(dim=1)).unsqueeze(1).to(kl.dtype)            # (B, 1)
    return non_score_reward.scatter_add(1, last, score), non_score_reward


class FixedKLController:
    """Keeps the KL coefficient, `value`, as it is."""

    def __init__(self, kl_coef):
        self.value = kl_coef

    def update(self, current, n_steps):
        """current: mean KL per response, in nats. n_steps: responses of all processes since the last call."""


class AdaptiveKLController(FixedKLController):
    """Raises the coefficient while the KL is above `target` (nats per response), and lowers it below.

    Over `horizon` responses it changes by about 20 % at most.
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
