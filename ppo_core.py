"""Proximal policy optimization for language models: the settings, the maths, and the trainer that joins them.

Why: a reward says how good a whole response was, not which token made it so, and the text that earned it becomes stale with
the first update. PPO spreads the reward over the tokens by generalised advantage estimation, and clips each update so that
a few epochs over the same responses stay safe.
Source: Schulman et al. 2017 (PPO, arXiv 1707.06347), Schulman et al. 2016 (GAE, arXiv 1506.02438), Ziegler et al. 2019 (PPO for
language models, arXiv 1909.08593). Names, defaults and statistics are those of TRL 0.11.4's PPOTrainer.
Differs from TRL 0.11.4 in: the README's list "Differences from TRL 0.11.4"; in short, every mean is over response tokens of
all processes and of the whole optimizer step, and the distribution that is trained is the one that was sampled.
Shapes, for a batch of B prompts, Q_i and R_i tokens long (all other files refer to this picture):

      query (Q tokens)   response (R tokens)      padding on the right in training, on the left in generation
      q q q q          | r0 r1 r2 EOS  .  .
      logits at column Q-1+t score r_t; values[t] = V(everything before r_t): the same column
      mask               1  1  1  1   0  0        1 = a token the policy chose, EOS included; made from lengths, never from ids
      rewards           -k -k -k -k+score         k = kl_coef * kl[t]

    input_ids, attention_mask are (B, T), T = the longest query + response; everything about tokens of the response is (B, R).
Copy me: the settings and the functions need torch and numpy (fuse_activations and roomy_cache transformers); PPOTrainer needs the five files beside this one.
Tested by tests/test_ppo_core.py and, number by number against TRL, tests/test_golden.py.
"""
import copy
import json
import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------- settings


def knob(default, help):
    """A dataclass field whose help text is what `scripts/train.py --help` prints."""
    return field(default=default, metadata={"help": help})


@dataclass
class PPOConfig:
    """Settings of PPOTrainer; TRL 0.11.4's names and defaults. Sizes are per process. ValueError on what cannot work."""

    # ---- the run
    model_name: str = knob("gpt2", "language model to train: a folder or a hub id")
    reward_model: Optional[str] = knob(None, "text-classification model that scores the responses: a folder or a hub id")
    seed: int = knob(0, "read by scripts/train.py, before any model is made; the same seed gives the same run")
    log_with: Optional[Literal["wandb", "tensorboard"]] = knob(None, "also log to: wandb or tensorboard")
    tracker_project_name: str = knob("plainppo", "project name that the tracker files the run under")
    # ---- batches, in samples: batch_size = a whole number of (mini_batch_size x gradient_accumulation_steps)
    batch_size: int = knob(128, "responses per step() and process")
    mini_batch_size: Optional[int] = knob(None, "responses per forward and backward pass; default: batch_size")
    gradient_accumulation_steps: int = knob(1, "mini-batches per optimizer step; the result is that of one large mini-batch")
    ppo_epochs: int = knob(4, "passes over each batch of responses")
    # ---- optimizer
    learning_rate: float = knob(1.41e-5, "of the default Adam")
    max_grad_norm: Optional[float] = knob(None, "clip the gradient's norm to this; default: no clipping")
    gradient_checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, a third more time")
    # ---- the KL penalty, in nats
    init_kl_coef: float = knob(0.2, "reward lost per nat of KL to the reference, at the start")
    adap_kl_ctrl: bool = knob(True, "adapt the coefficient so that the KL per response approaches `target`")
    target: float = knob(6.0, "KL per response, in nats, that the adaptive controller aims at")
    horizon: float = knob(10000.0, "samples over which the adaptive controller reacts; smaller is faster")
    kl_penalty: Literal["kl", "abs", "mse", "full"] = knob("kl", "KL per token: log-ratio, its abs, half its square, or exact")
    # ---- advantages
    gamma: float = knob(1.0, "discount per token; 1 = none, as responses are short")
    lam: float = knob(0.95, "GAE's lambda; 1 = Monte Carlo returns, 0 = one-step differences")
    whiten_rewards: bool = knob(False, "divide rewards by their standard deviation over the batch, before GAE")
    # ---- the loss
    cliprange: float = knob(0.2, "the ratio new/old probability is clipped to 1 +- this")
    cliprange_value: float = knob(0.2, "a new value is clipped to the old one +- this, in units of reward")
    vf_coef: float = knob(0.1, "weight of the value loss beside the policy loss")
    ratio_threshold: float = knob(10.0, "skip an optimizer step whose mean ratio exceeds this")
    early_stopping: bool = knob(False, "end a step's epochs once the policy moved more than 1.5 x target_kl")
    target_kl: float = knob(1.0, "nats per token, new policy against rollout policy; see early_stopping")
    # ---- sampling
    temperature: float = knob(1.0, "divides the logits in the sampler, the policy, the update and the reference alike")
    # ---- scores, in units of the reward model
    use_score_scaling: bool = knob(False, "divide scores by the standard deviation of all scores so far")
    use_score_norm: bool = knob(False, "also subtract their mean; needs use_score_scaling")
    score_clip: Optional[float] = knob(None, "clip processed scores to +- this; default: no clipping")
    # ---- memory
    optimize_device_cache: Optional[bool] = knob(None, "empty the device's cache between phases: less memory, some time; default: off")
    optimize_cuda_cache: Optional[bool] = knob(None, "older name of optimize_device_cache")
    ds3_gather_for_generation: bool = knob(True, "under ZeRO-3, gather all weights once per rollout; False: layer by layer, "
                                                 "slower, for a model that does not fit whole")

    def __post_init__(self):
        if self.mini_batch_size is None:
            self.mini_batch_size = self.batch_size
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "temperature", "cliprange",
                     "cliprange_value", "target", "horizon", "ratio_threshold", "target_kl", "score_clip", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be greater than 0")
        for name, high in (("gamma", 1), ("lam", 1), ("init_kl_coef", float("inf")), ("learning_rate", float("inf")),
                           ("vf_coef", float("inf"))):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and {high}")
        if self.log_with not in (None, "wandb", "tensorboard"):
            raise ValueError(f"log_with is {self.log_with!r}; use 'wandb' or 'tensorboard', or leave it out")
        if self.batch_size % self.backward_batch_size:
            suggestion = -(-self.batch_size // self.backward_batch_size) * self.backward_batch_size
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of mini_batch_size ({self.mini_batch_size}) x "
                             f"gradient_accumulation_steps ({self.gradient_accumulation_steps}); try {suggestion}")
        if self.kl_penalty not in ("kl", "abs", "mse", "full"):
            raise ValueError(f"kl_penalty is {self.kl_penalty!r}; use 'kl', 'abs', 'mse' or 'full'")
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm is on but use_score_scaling is off; the mean is only subtracted together with "
                             "the scaling, so turn both on")
        newer, older = self.optimize_device_cache, self.optimize_cuda_cache
        if None not in (newer, older) and newer != older:
            raise ValueError(f"optimize_device_cache is {newer} but optimize_cuda_cache, its older name, is {older}; give one")
        self.optimize_device_cache = bool(newer or older)

    @property
    def backward_batch_size(self):
        """Responses per optimizer step and process."""
        return self.mini_batch_size * self.gradient_accumulation_steps


# --------------------------------------------------------------------------------------------------- pure functions
# `reduce` sums a tensor over all processes; the default is one process. Masks are 1 for tokens that count.


def one_process(tensor):
    return tensor


def masked_mean(values, mask, reduce=one_process):
    """Mean of values (B, R) over the tokens of all processes where mask (B, R) is 1; 0 if there is none. -> ()"""
    total, count = reduce(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    return total / count.clamp(min=1)


def masked_var(values, mask, reduce=one_process):
    """Sample variance (n - 1) of values (B, R) over the tokens of all processes; 0 for fewer than two. -> ()"""
    centered = values - masked_mean(values, mask, reduce)
    total, count = reduce(torch.stack([(centered.square() * mask).sum(), mask.sum().to(values.dtype)]))
    return total / (count - 1).clamp(min=1)


def masked_whiten(values, mask, shift_mean=True, reduce=one_process):
    """(B, R) -> (B, R) with variance 1, and mean 0 if shift_mean, over the tokens of all processes.

    Per process it would be a different normalisation on each, and the update would not be that of the large batch.
    """
    mean, var = masked_mean(values, mask, reduce), masked_var(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def logprobs_from_logits(logits, labels):
    """log p(label) per token: (B, R, V), (B, R) -> (B, R)."""
    # gather before subtracting: no second (B, R, V) tensor, as log_softmax would make.
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy_from_logits(logits):
    """Entropy of each token's distribution, in nats: (B, R, V) -> (B, R)."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


class LogprobsAndEntropy(torch.autograd.Function):
    """Both of the above from one pass over the logits: (n, V), (n,) -> (n,), (n,). Only the log-prob has a gradient.

    Beside the logits it makes one tensor of their size, the probabilities, and in the backward pass their gradient in its place. Left to
    autograd it would be several more, and those are the largest tensors of an update.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        probabilities = logits.softmax(-1)                                                                # (n, V)
        # The largest probability is at least 1 / V, so its logarithm is exact to the last digits, and gives all others.
        normaliser = logits.amax(-1) - probabilities.amax(-1).log()                                      # log sum exp, (n,)
        logprobs = logits.gather(1, labels.unsqueeze(1)).squeeze(1) - normaliser
        entropy = normaliser - torch.linalg.vecdot(probabilities, logits)
        ctx.save_for_backward(probabilities, labels)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        probabilities, labels = ctx.saved_tensors
        # d log p(label) / d logits = onehot(label) - p
        return probabilities.mul_(-gradient.unsqueeze(1)).scatter_add_(1, labels.unsqueeze(1), gradient.unsqueeze(1)), None


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation, equations 11 and 16 of arXiv 1506.02438, from the last token back.

    rewards, values, mask: (B, R) -> advantages (B, R), returns (B, R) = advantages + values, both before whitening.
    A response ends its episode: the value after its last token is 0. A token masked in the middle counts as value 0, as in TRL.
    """
    rewards, values = rewards * mask, values * mask         # in padding a value is noise, and would leak back by lambda
    advantages = torch.zeros_like(rewards)
    last = torch.zeros_like(rewards[:, 0])                                                      # (B,)
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last = delta + gamma * lam * last
        advantages[:, t] = last
    return advantages, advantages + values


def policy_loss(new_logprobs, logprobs, advantages, cliprange):
    """Clipped surrogate objective, equation 7 of arXiv 1707.06347, per token. All (B, R).

    -> loss (B, R), ratio (B, R), clipped (B, R): 1 where clipping took the gradient away. Mean it over the mask yourself:
    only the caller knows how many tokens the optimizer step has.
    """
    ratio = torch.exp(new_logprobs - logprobs)              # 1 at the first update, so clipping starts with the second
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return torch.maximum(unclipped, clipped), ratio, (clipped > unclipped).float()


def value_loss(new_values, values, returns, cliprange_value):
    """Half the squared error, with the new value kept within +- cliprange_value of the old one (as OpenAI's baselines).

    All (B, R) -> loss (B, R), clipped (B, R): 1 where the clipped error was the larger.
    """
    # As for the policy, the larger of the two: clipping may hide an improvement, never a mistake.
    near = torch.clamp(new_values, values - cliprange_value, values + cliprange_value)
    unclipped, clipped = (new_values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), (clipped > unclipped).float()


def collate(queries, responses, response_masks, pad_token_id):
    """Lists of B tensors (Q_i,), (R_i,) -> dict of tensors padded on the right, as drawn at the top of this file.

    input_ids, attention_mask (B, T); positions (B, R): the column that scores each response token; labels (B, R): these
    tokens; mask (B, R); response_lengths, lengths of query and response (B,). response_masks: None or a list of (R_i,) that leave tokens out.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad([torch.cat([q, r]) for q, r in zip(queries, responses)], batch_first=True, padding_value=pad_token_id)
    device = input_ids.device
    query_lengths = torch.tensor([len(q) for q in queries], device=device)
    response_lengths = torch.tensor([len(r) for r in responses], device=device)
    column = torch.arange(input_ids.shape[1], device=device)                                              # (T,)
    t = torch.arange(max(1, int(response_lengths.max())), device=device)                                  # (R,)
    positions = (query_lengths[:, None] - 1 + t).clamp(max=input_ids.shape[1] - 1)                        # (B, R)
    mask = (t < response_lengths[:, None]).long()
    if response_masks is not None:
        kept = pad([(m != 0).long() for m in response_masks], batch_first=True).to(device)                # (B, <= R)
        mask[:, :kept.shape[1]] *= kept
    return {"input_ids": input_ids, "positions": positions, "mask": mask, "response_lengths": response_lengths,
            "lengths": query_lengths + response_lengths,
            "attention_mask": (column < (query_lengths + response_lengths)[:, None]).long(),
            "labels": input_ids.gather(1, (positions + 1).clamp(max=input_ids.shape[1] - 1))}


def even_size(n):
    """n rounded up to one of few sizes, by 7 or by an eighth at most: 8, 16, ... 128, 144, ... 256, 288, ...

    Products of matrices are made by kernels that are built for the sizes they meet. One that is new costs about half a millisecond and
    half a megabyte on a CPU, and the megabytes stay: with ragged responses every mini-batch brought new ones.
    """
    step = max(8, 2 ** ((n - 1).bit_length() - 4))
    return -(-n // step) * step


def take(batch, index):
    """Rows `index` of a dict made by `collate` (and of what was added to it), trimmed to the longest of these rows, see even_size."""
    rows = {name: tensor[index] for name, tensor in batch.items()}
    # without the last token: it is scored from the column before it, and nothing is scored from its own
    T, R = even_size(max(1, int(rows["lengths"].max()) - 1)), max(1, int(rows["response_lengths"].max()))
    for name, tensor in rows.items():
        if name in ("input_ids", "attention_mask", "trunk"):
            missing = max(0, T - tensor.shape[1])
            rows[name] = torch.nn.functional.pad(tensor[:, :T], (*[0, 0] * (tensor.ndim - 2), 0, missing))
        elif tensor.ndim > 1:
            rows[name] = tensor[:, :R]
    rows["positions"] = rows["positions"].clamp(max=T - 1)      # of short rows they point into padding, which was trimmed
    return rows


def fill_by_length(lengths, index, size, saving=1.0):
    """Rows `index` in pieces of at most `size`, those of like length together, so that little of a piece is padding.

    lengths: (B,) tokens. saving: also halve a piece of 16 rows or more where that takes away more than this share of it; two passes
    over fewer rows cost more than their padding. -> list of index tensors.
    """
    index = index[lengths[index].argsort(stable=True)]
    done, todo = [], list(index.split(size))[::-1]
    while todo:
        piece = todo.pop()
        length, half = lengths[piece], len(piece) // 2
        if half >= 8 and half * int(length[-1] - length[half - 1]) > saving * len(piece) * int(length[-1]):
            todo += [piece[half:], piece[:half]]
        else:
            done.append(piece)
    return done


def fuse_activations(model):
    """GPT-2's GELU as one operation instead of eight, in place: the same formula, without seven tensors of the width of the MLP."""
    from transformers.activations import NewGELUActivation
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def disable_dropout(model):
    """Set every dropout rate in `model` to 0, in place; its config, and so what is saved, keeps the old rates.

    With dropout the rollout, the update and the reference would be different networks: a ratio of 1 that is not 1.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            # nn.Dropout's `p`, and the plain numbers that attention functions read: attention_dropout, layerdrop, ...
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout) and name == "p"):
                setattr(module, name, 0.0)


# Everything `update` measures per token, in this order; one row of sums per optimizer step. Sums, not means: sums can be
# added over mini-batches and processes and divided once, by the number of tokens that they really cover.
TERMS = (
    "loss/policy",              # what is minimised, see policy_loss
    "loss/value",               # see value_loss
    "policy/entropy",           # nats; falls slowly while the policy learns, and at once when it collapses
    "policy/approxkl",          # half the squared log-ratio (k2): how far these epochs have moved the policy
    "policy/policykl",          # -log-ratio (k1): the same, unbiased and noisy; what early stopping looks at
    "policy/clipfrac",          # share of tokens whose gradient was clipped away; 0 = could learn faster, 0.5 = far too fast
    "policy/advantages_mean",
    "policy/ratio_mean",        # leaves 1 only if the learning rate is too high, or the sampler is not the policy
    "returns/mean",
    "returns/square",           # becomes returns/var
    "val/vpred",                # new values
    "val/error",                # against the returns; with returns/var it gives val/var_explained
    "val/clipfrac",
    "val/mean",                 # recorded values
    "val/square",               # becomes val/var
)
# Of these, what stops an update when it is not finite, and the stage that is said. An infinite ratio of finite log-probs is none of
# them: that is a policy that moved too far, and ratio_threshold's business.
NEEDED = {"policy/policykl": "log-probs", "val/vpred": "values", "loss/value": "loss", "loss/policy": "loss"}
WEIGHTS = "the model's weights are not finite, {} first; go back to an older checkpoint, with a lower learning rate"


class LengthSampler:
    """Draws a response length from [min_value, max_value), in tokens, from numpy's global generator."""

    def __init__(self, min_value, max_value):
        if not 0 < min_value < max_value:
            raise ValueError(f"LengthSampler({min_value}, {max_value}): the first must be above 0 and below the second")
        self.values = list(range(min_value, max_value))

    def __call__(self):
        return int(np.random.choice(self.values))


def draw(probabilities):
    """One token from each row: (B, V) -> (B,). Inverts the distribution function at one random number per row.

    In float64, so that a token of probability 1e-9 is drawn as often as it should be; one of probability 0 never is.
    """
    steps = probabilities.double().cumsum(-1)                                                             # (B, V)
    point = torch.rand(len(steps), 1, dtype=torch.float64, device=steps.device) * steps[:, -1:]
    return torch.searchsorted(steps, point, right=True).squeeze(1).clamp(max=steps.shape[1] - 1)


def roomy_cache(config, tokens):
    """A key-value cache that has its memory from the start; transformers' own copies all of it at each token.

    -> None for a model whose layers keep something else than keys and values of every token.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        def update(self, keys, values, *args, **kwargs):                                                  # (b, heads, new, width)
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.room = [each.new_empty(*each.shape[:2], tokens, each.shape[3]) for each in (keys, values)]
            start = self.get_seq_length()
            for room, new in zip(self.room, (keys, values)):
                room[:, :, start:start + new.shape[2]] = new
            return self.use(start + keys.shape[2])

        def use(self, tokens):
            self.keys, self.values = (room[:, :, :tokens] for room in self.room)
            return self.keys, self.values

        def batch_select_indices(self, indices):
            self.room = [room[indices] for room in self.room]
            self.use(self.get_seq_length())

    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache


# Settings of `generate` that leave the sampled distribution alone, and the value at which the others do.
HARMLESS = {"max_new_tokens", "max_length", "pad_token_id", "eos_token_id", "bos_token_id", "use_cache"}
NEUTRAL = {"do_sample": (True,), "top_k": (0, None), "top_p": (1.0, None), "min_p": (0.0, None), "typical_p": (1.0, None),
           "repetition_penalty": (1.0, None), "no_repeat_ngram_size": (0, None), "num_beams": (1, None),
           "min_length": (0, -1, None), "min_new_tokens": (None, 0), "num_return_sequences": (1, None),
           "epsilon_cutoff": (0.0, None), "eta_cutoff": (0.0, None), "bad_words_ids": (None,), "suppress_tokens": (None,),
           "begin_suppress_tokens": (None,), "forced_bos_token_id": (None,), "forced_eos_token_id": (None,),
           "exponential_decay_length_penalty": (None,), "renormalize_logits": (False, None), "guidance_scale": (1.0, None),
           "sequence_bias": (None,), "remove_invalid_values": (False, None), "logits_processor": (None,)}


def sampling_arguments(temperature, overrides, allow_other_distribution=False):
    """-> keyword arguments for transformers' `generate` that sample exactly softmax(logits / temperature).

    `generate` fills what is not said from the model's generation_config.json, where many models ship a top_k or a repetition
    penalty; generate_batch sets that aside, and transformers' own default top_k of 50 is overruled here. What changes the distribution
    otherwise is a ValueError: tokens would be drawn from one distribution and scored under another, and the policy is then paid
    for the difference (a negative KL).
    """
    arguments = {name: values[0] for name, values in NEUTRAL.items() if values[0] is not None}
    arguments.update(temperature=temperature, num_return_sequences=1)
    for name, value in overrides.items():
        same = name in HARMLESS or (name in NEUTRAL and value in NEUTRAL[name]) or (name, value) == ("temperature", temperature)
        if same and name not in HARMLESS:
            continue
        if not same and not allow_other_distribution:
            neutral = temperature if name == "temperature" else NEUTRAL.get(name, ("nothing",))[0]
            where = "; set it in PPOConfig" if name == "temperature" else ""
            raise ValueError(f"generate(..., {name}={value!r}) would sample from another distribution than the one PPO trains "
                             f"({name}={neutral!r}){where}; leave it out, or say allow_other_distribution=True to evaluate only")
        arguments[name] = value
    return arguments


class FiniteLogits:
    """Stands among the logits processors of `generate` and remembers the rows whose logits are not finite.

    It also replaces them, or torch.multinomial would raise from inside, and on a GPU take the whole process with it.
    """

    def __init__(self):
        self.bad = None                                                                                   # (rows,)

    def __call__(self, input_ids, scores):
        # A maximum hands on NaN and infinity. -inf is a token that a model rules out, unless it is all that is left.
        bad = ~scores.amax(-1).isfinite()
        self.bad = bad if self.bad is None else self.bad | bad
        return scores.masked_fill_(bad[:, None], 0.0)       # (rows, V), the sampler's own copy


# ------------------------------------------------------------------------------------------------------ the trainer


class BadNumbers(ValueError):
    """NaN or infinity where a number must be, refused before any weight was moved by it. `step` raises it on all processes together.

    stage: "weights", "scores", "log-probs", "reference log-probs", "values", "rewards", "loss", "gradients" or "rollout".
    queries, responses, scores: the batch of this process as it was given; after a rollout, the queries alone.
    """
    stage, queries, responses, scores = None, (), (), ()


class PPOTrainer:
    """generate() responses, score them as you like, step() on them.

    config: PPOConfig. model: AutoModelForCausalLMWithValueHead. ref_model: the same class, or None for a frozen copy that
    shares `num_shared_layers` layers. tokenizer: of the model. dataset: gives `.dataloader`, shuffled, in batches of
    batch_size through data_collator. optimizer: default Adam over what is trainable. lr_scheduler: stepped once per step().
    accelerator: from distributed.start; default: a new one.
    """

    def __init__(self, config=None, model=None, ref_model=None, tokenizer=None, dataset=None, optimizer=None,
                 data_collator=None, num_shared_layers=None, lr_scheduler=None, accelerator=None):
        import distributed
        import optim
        import reference
        import rewards
        check_arguments(config, model, ref_model, tokenizer, num_shared_layers)
        self.config, self.tokenizer = config, tokenizer
        self.accelerator = accelerator or distributed.start(log_with=config.log_with, project_dir="runs" if config.log_with else None)
        self.reduce = distributed.sum_over_processes(self.accelerator)
        if ref_model is None:
            with distributed.whole_weights(model):
                ref_model = reference.create_reference_model(model, num_shared_layers)
        for each in (model, ref_model):
            disable_dropout(each)
            if not quantized(each):
                fuse_activations(each)
        if config.gradient_checkpointing:
            # Non-reentrant: it also works when the first layers are frozen and their inputs need no gradient.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has 0 end-of-text tokens, so no response could end; set tokenizer.eos_token")
        if tokenizer.pad_token is None:
            logger.warning("the tokenizer has no pad token: using its EOS, %r (padding is masked by length)", tokenizer.eos_token)
            tokenizer.pad_token = tokenizer.eos_token

        if optimizer is None:
            optimizer = optim.make_optimizer("adam", optim.trainable_parameters(model), config.learning_rate)
        check_optimizer(optimizer, lr_scheduler, model)
        # The scheduler stays out of `prepare`: accelerate's wrapper steps it once per process.
        self.lr_scheduler = lr_scheduler
        self.model, self.optimizer = distributed.prepare_model(self.accelerator, model, optimizer, config.mini_batch_size,
                                                               config.max_grad_norm, config.gradient_accumulation_steps)
        self.ref_model = distributed.prepare_reference(self.accelerator, ref_model, movable=not quantized(ref_model))
        self.trunk = reference.SharedTrunk(distributed.unwrap(self.model), distributed.unwrap(self.ref_model))
        self.dataloader = None
        if dataset is not None:
            needed = config.batch_size * self.accelerator.num_processes
            if len(dataset) < needed:
                raise ValueError(f"the dataset has {len(dataset)} rows but a step takes {needed} (batch_size x processes); "
                                 "give more rows or a smaller batch_size")
            loader = torch.utils.data.DataLoader(dataset, batch_size=config.batch_size, shuffle=True, drop_last=True,
                                                 collate_fn=data_collator)
            self.dataloader = self.accelerator.prepare(loader)

        controller = rewards.AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        self.kl_ctl = controller if config.adap_kl_ctrl else rewards.FixedKLController(config.init_kl_coef)
        self.score_moments = rewards.RunningMoments()
        if config.log_with is not None:
            self.accelerator.init_trackers(config.tracker_project_name, config={
                k: v for k, v in vars(config).items() if isinstance(v, (int, float, str))},
                init_kwargs=distributed.tracker_arguments(config.log_with, self.accelerator.logging_dir))
        # Logits held at once: 64 MB of them. Under ZeRO-3 every use of `lm_head` is an exchange between processes, which must be as
        # many on each, so there all are made at once.
        vocabulary = distributed.unwrap(self.model).pretrained_model.get_output_embeddings().out_features
        self.chunk = None if distributed.zero_stage(self.accelerator) == 3 else max(8, 2 ** 24 // vocabulary // 8 * 8)
        self.where, self.in_hand = "", ((), (), ())     # what `refuse` says and hands on: the place; queries, responses, scores
        # In half precision a logit of 100 is rounded to 0.5, so a single token says little there; see check_ratio.
        self.exact = self.accelerator.mixed_precision == "no" and all(p.dtype == torch.float32 for p in model.parameters())
        self.steps_done, self.sampled, self.sampled_by = 0, {}, None                # the last two: see remember

    # -------------------------------------------------------------------------------------------- (a) rollout

    @torch.no_grad()
    def generate(self, query_tensor, length_sampler=None, batch_size=4, return_prompt=True, generate_ref_response=False,
                 allow_other_distribution=False, **generation_kwargs):
        """Sample a response to each query. Pure sampling at config.temperature by default.

        query_tensor: (Q,) -> (1, Q + R); or a list of (Q_i,) -> a list of (Q_i + R_i,), each cut after its first EOS.
        length_sampler: callable that gives max_new_tokens, per batch. batch_size: queries at once. return_prompt=False
        leaves the prompt out. generate_ref_response=True: -> (responses, responses of the reference).
        ValueError: settings that would change the distribution (see sampling_arguments), or more tokens than positions; and of
        it BadNumbers, on this process alone: logits that are not finite.
        """
        from distributed import generates_in_step, unwrapped_for_generation
        one = torch.is_tensor(query_tensor)
        if one and query_tensor.ndim != 1:
            raise ValueError(f"query_tensor has {query_tensor.ndim} dimensions; give a tensor of shape (Q,) or a list of them")
        queries = [query_tensor] if one else query_tensor
        gather = self.config.ds3_gather_for_generation
        if not all(torch.is_tensor(q) and q.ndim == 1 and len(q) > 0 for q in queries):
            raise ValueError(f"queries must be tensors of shape (Q,) with at least 1 token each, got {describe(queries)}")
        arguments = sampling_arguments(self.config.temperature, generation_kwargs, allow_other_distribution)
        # Pure sampling of so many tokens is what `sample` does, in less time; all else is left to transformers' `generate`.
        plain = {k: v for k, v in arguments.items() if k not in HARMLESS} == sampling_arguments(self.config.temperature, {}) and \
            not {"max_length", "bos_token_id", "use_cache"} & set(arguments)
        arguments["synced_gpus"] = generates_in_step(self.accelerator, gather, batches=-(-len(queries) // batch_size))
        results, self.in_hand = [], (queries, (), ())
        for model in (self.model, self.ref_model) if generate_ref_response else (self.model,):
            responses = []
            with unwrapped_for_generation(self.accelerator, model, gather) as bare:
                for start in range(0, len(queries), batch_size):
                    if length_sampler is not None:
                        arguments["max_new_tokens"] = length_sampler()
                    responses += self.generate_batch(bare, queries[start:start + batch_size], arguments, start,
                                                     plain and not arguments["synced_gpus"] and "max_new_tokens" in arguments)
            whole = [torch.cat([q.to(r.device), r]) if return_prompt else r for q, r in zip(queries, responses)]
            results.append(whole[0].unsqueeze(0) if one else whole)
        return tuple(results) if generate_ref_response else results[0]

    def generate_batch(self, bare, queries, arguments, start, plain=False):
        """One left-padded batch. queries: list of (Q_i,) -> list of responses (R_i,), EOS included where one was sampled.

        start: the number of the first query among all that `generate` was given. plain: nothing but pure sampling is asked for, so
        `sample` may do it.
        """
        from transformers import GenerationConfig
        watch = FiniteLogits()
        longest = max(len(q) for q in queries)
        self.check_positions(max(longest + arguments.get("max_new_tokens", 0), arguments.get("max_length", 0)), longest)
        pad = torch.nn.utils.rnn.pad_sequence
        flipped = pad([q.flip(0) for q in queries], batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(q) for q in queries])
        attention_mask = (torch.arange(longest) >= longest - lengths[:, None]).long()                     # (B, Q)
        arguments = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id, **arguments,
                     "logits_processor": [*(arguments.get("logits_processor") or ()), watch]}
        device = self.accelerator.device
        stop = torch.as_tensor(arguments["eos_token_id"], device=device).view(-1)
        with self.accelerator.autocast():
            bare.eval()
            cache = roomy_cache(bare.config, even_size(longest) + arguments["max_new_tokens"]) if plain else None
            if cache is not None:
                return self.sample(bare, flipped.flip(1).to(device), attention_mask.to(device), arguments["max_new_tokens"], stop, cache, start)
            shipped, bare.pretrained_model.generation_config = bare.pretrained_model.generation_config, GenerationConfig()
            try:
                tokens = bare.generate(input_ids=flipped.flip(1).to(device), attention_mask=attention_mask.to(device),
                                       **arguments)
            finally:
                bare.pretrained_model.generation_config = shipped
        if watch.bad is not None and watch.bad.any():       # None: not one token was asked for
            rows = len(watch.bad) // len(queries)           # more than 1 in a beam search
            self.refuse_rollout(bare, start + int(watch.bad.nonzero()[0]) // rows)
        responses = tokens[:, longest:]                                                                   # (B, R)
        ended = torch.isin(responses, stop).long()
        # The tokens up to the first EOS of the response; one in the prompt is none of our business.
        lengths = (ended.cumsum(1) - ended == 0).sum(1)                                                   # (B,)
        return [row[:n] for row, n in zip(responses, lengths.tolist())]

    def sample(self, bare, input_ids, attention_mask, new_tokens, stop, cache, start):
        """Pure sampling at config.temperature, token by token. input_ids, attention_mask (B, Q) -> list of responses (R_i,).

        Rows that have ended are dropped from the batch and from its cache, where `generate` computes them to the end; and a token costs
        one random number, where torch.multinomial draws one for each entry of the vocabulary. stop: token ids that end a response.
        cache: of roomy_cache, for even_size(Q) + new_tokens tokens. start: the number of the first row among all queries.
        """
        from distributed import unwrap
        keep = self.recalls() and bare is unwrap(self.model)
        queries = [row[-n:] for row, n in zip(input_ids, attention_mask.sum(1).tolist())]               # (Q_i,) each
        wider = even_size(input_ids.shape[1]) - input_ids.shape[1]
        input_ids, attention_mask = (torch.nn.functional.pad(each, (wider, 0)) for each in (input_ids, attention_mask))
        rows = torch.arange(len(input_ids), device=input_ids.device)                                    # still being written
        tokens = input_ids.new_zeros(len(rows), new_tokens)                                             # (B, R)
        lengths = torch.full_like(rows, new_tokens)
        logprobs, values = torch.zeros((2, *tokens.shape), device=tokens.device)                        # (B, R) each, for `recall`
        width, trunk = input_ids.shape[1], None
        for t in range(new_tokens):
            last = torch.full_like(input_ids[:, :1], input_ids.shape[1] - 1)
            with self.trunk.record() if keep else nullcontext({}) as kept:
                logits, _, value = bare(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, logit_positions=last,
                                        use_cache=True)
            # A maximum hands on NaN and infinity; of -inf one is a token that a model rules out, all are no distribution.
            bad = ~logits[:, 0].amax(-1).isfinite()
            if bad.any():
                self.refuse_rollout(bare, start + int(rows[bad][0]))
            logits = logits[:, 0] / self.config.temperature                                             # (b, V)
            drawn = draw(logits.softmax(-1))                                                            # (b,)
            tokens[rows, t] = drawn
            if keep:
                logprobs[rows, t], values[rows, t] = logprobs_from_logits(logits, drawn), value[:, 0]
            for hidden in kept.values():                                                                # (b, width, H), then (b, 1, H)
                trunk = hidden.new_zeros(len(tokens), width + new_tokens, hidden.shape[2]) if trunk is None else trunk
                trunk[rows, width + t - hidden.shape[1]:width + t] = hidden
            ended = torch.isin(drawn, stop) & (lengths[rows] == new_tokens)
            lengths[rows[ended]] = t + 1
            finished = lengths[rows] < new_tokens
            if finished.all():
                break
            stay = finished.long().argsort(stable=True)[:even_size(int((~finished).sum()))]             # and with them a few finished ones
            if len(stay) <= 0.75 * len(rows):
                rows, drawn, attention_mask = rows[stay], drawn[stay], attention_mask[stay]
                cache.batch_select_indices(stay)
            input_ids, attention_mask = drawn.unsqueeze(1), torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        responses = [row[:n] for row, n in zip(tokens, lengths.tolist())]
        if keep:
            known = [[row[:len(r)] for row, r in zip(each, responses)] for each in (logprobs, values)]
            trunks = [None] * len(responses) if trunk is None else \
                [row[width - len(q):width + len(r) - 1] for row, q, r in zip(trunk, queries, responses)]
            self.remember(queries, responses, *known, trunks)
        return responses

    def recalls(self):
        """Whether `sample` keeps what `recall` gives to step(). Asked each time, as a config may change.

        Not for the full KL, which needs all logits; not in TF32, a GPU's float32 with a mantissa of 10 bits; and not in several processes,
        where a run is to be the same, to the last bit, with and without DeepSpeed, whose weights cannot be watched.
        """
        from distributed import zero_stage
        return self.exact and torch.backends.cuda.matmul.fp32_precision != "tf32" and self.config.kl_penalty != "full" and \
            self.accelerator.num_processes == 1 and zero_stage(self.accelerator) == 0

    def weights_now(self):
        """Equal at two moments if no weight was changed in between.

        torch counts what is written into a tensor, but not what an optimizer writes in one kernel (Adam with fused=True, bitsandbytes).
        So what is trained is also added up: no step moves many numbers and leaves every tensor's sum as it was, to the last bit.
        """
        from distributed import unwrap
        parameters = list(unwrap(self.model).parameters())
        sums = torch.stack([p.detach().sum() for p in parameters if p.requires_grad]).tolist()
        return self.config.temperature, sums, [(p.data_ptr(), p._version) for p in parameters]

    def remember(self, queries, responses, logprobs, values, trunks):
        """Lists of b tensors (Q_i,), (R_i,), (R_i,), (R_i,), and (Q_i + R_i - 1, H) or None: those of the last batch_size responses stay."""
        weights = self.weights_now()
        if weights != self.sampled_by:
            self.sampled, self.sampled_by = {}, weights
        for query, response, *known in zip(queries, responses, logprobs, values, trunks):
            key = tuple(query.tolist()), tuple(response.tolist())
            self.sampled.pop(key, None)             # the last to come is the last to go
            self.sampled[key] = [row if row is None else row.clone() for row in known]          # not a view, which would keep all rows
        for oldest in list(self.sampled)[:-self.config.batch_size]:
            del self.sampled[oldest]

    def recall(self, queries, responses):
        """-> {"logprobs": (B, R), "values": (B, R)[, "trunk": (B, T - 1, H)]} as `sample` had them, or {}: then they are to be computed.

        One pass of the policy over the batch is saved, which with shared layers was a sixth of a step. They are what that pass would
        give, but for the order in which float32 numbers are added up, as long as each of these very tokens was sampled from these very
        weights.
        """
        (known, by), (self.sampled, self.sampled_by) = (self.sampled, self.sampled_by), ({}, None)
        if not known or not self.recalls() or by != self.weights_now():
            return {}
        rows = [known.get((tuple(q.tolist()), tuple(r.tolist()))) for q, r in zip(queries, responses)]
        names = ("logprobs", "values", "trunk") if self.trunk.blocks else ("logprobs", "values")
        if not any(map(len, responses)) or not all(row is not None and row[len(names) - 1] is not None for row in rows):
            return {}
        pad = torch.nn.utils.rnn.pad_sequence
        return {name: pad(each, batch_first=True) for name, each in zip(names, zip(*rows))}

    def refuse_rollout(self, model, sample):
        """On this process alone, as a rollout need not be everybody's."""
        from distributed import not_finite_weights
        name = not_finite_weights(model)
        cause = "though every weight is; lower the learning rate" if name is None else WEIGHTS.format(name)
        error = BadNumbers(f"step {self.steps_done + 1}, rollout: the logits of sample {sample} of {len(self.in_hand[0])} are not finite, {cause}")
        error.stage = "rollout" if name is None else "weights"
        error.queries, error.responses, error.scores = self.in_hand
        raise error

    def check_weights(self):
        """All processes raise BadNumbers if a weight is not finite: no batch would be to blame, and none could mend it."""
        from distributed import not_finite_weights
        name = not_finite_weights(self.model)
        self.where = f"after step {self.steps_done}"
        self.refuse("weights", None if name is None else WEIGHTS.format(name))

    def refuse(self, stage, problem):
        """All processes raise BadNumbers when one has a problem (half a sentence, or None), with everything that is known."""
        from distributed import gather_lists, together
        try:
            with together(self.accelerator, BadNumbers):
                if problem is not None:
                    raise BadNumbers(f"{self.where}: {problem}")
        except BadNumbers as error:
            stages = [known for known in gather_lists(self.accelerator, [stage]) if known is not None]
            error.stage = "weights" if "weights" in stages else stages[0]       # under ZeRO-3 one process holds a bad weight, and all suffer
            error.queries, error.responses, error.scores = self.in_hand
            raise

    def check_positions(self, tokens, query_tokens):
        from distributed import unwrap
        limit = getattr(unwrap(self.model).config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise ValueError(f"a query of {query_tokens} tokens with its response needs {tokens} positions but the model has "
                             f"{limit}; use at most {max(0, limit - query_tokens)} response tokens or shorter queries")

    # ------------------------------------------------------------------------------------------------- step

    def step(self, queries, responses, scores, response_masks=None):
        """One PPO step on B = batch_size responses. -> dict of statistics, the README's glossary says what each means.

        queries, responses: lists of B tensors (Q_i,), (R_i,) of token ids. scores: B numbers or one-number tensors.
        response_masks: B tensors (R_i,), 0 = not chosen by the policy (a tool's answer, say). ValueError on anything else, and of it
        BadNumbers on what is not finite, here or on the way: weights and optimizer are then as the optimizer step before left them.
        """
        from distributed import clear_device_cache, together
        from rewards import kl_penalty, token_rewards
        config, device = self.config, self.accelerator.device
        clock = Clock()
        with together(self.accelerator):        # a wrong argument on one rank stops all
            raw_scores = self.check_batch(queries, responses, scores, response_masks).to(device)          # (B,)
        self.where, self.in_hand = f"step {self.steps_done + 1}", (queries, responses, raw_scores.tolist())
        scores, moments = self.scale_scores(raw_scores)
        queries, responses = [q.to(device) for q in queries], [r.to(device) for r in responses]
        batch = collate(queries, responses, response_masks, self.tokenizer.pad_token_id)
        mask = batch["mask"]                                                                              # (B, R)

        # (a) rollout: what the policy that chose these tokens, and the reference, thought of them
        batch.update(self.recall(queries, responses))
        batch["logprobs"], batch["values"], ref_logprobs, kl = self.record(batch)                         # (B, R) each
        if config.optimize_device_cache:
            clear_device_cache(device)
        clock.lap("forward_pass")

        # (c) rewards: the KL penalty is paid token by token, the score arrives with the last one
        if config.kl_penalty != "full":
            kl = kl_penalty(batch["logprobs"], ref_logprobs, config.kl_penalty)
        rewards, non_score_reward = token_rewards(scores, kl, mask, self.kl_ctl.value)                    # (B, R)
        # Here, before a mean over all processes spreads it. The first cause comes first: what follows from it is not finite either.
        self.check_finite({"scores": raw_scores, "log-probs": batch["logprobs"], "reference log-probs": ref_logprobs,
                           "values": batch["values"], "rewards": rewards})
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=self.reduce)
        clock.lap("compute_rewards")

        # (d) advantages: how much better than foreseen each token was. Whitened for the policy, whose step must not depend on
        # the scale of the rewards; the returns stay as they are, since the values have to learn that scale.
        advantages, batch["returns"] = gae(rewards, batch["values"], mask, config.gamma, config.lam)      # (B, R)
        batch["advantages"] = masked_whiten(advantages, mask, reduce=self.reduce)
        clock.lap("compute_advantages")

        # (e) update: the recorded log-probs and values stay what they were, however far the policy moves from them
        sums, ratios = self.update(batch)
        if config.optimize_device_cache:
            clear_device_cache(device)
        clock.lap("optimize_step")

        # (f) book-keeping: the KL coefficient changes last, so the one that is logged is the one that was used
        stats = self.update_stats(sums)
        stats.update(self.batch_stats(batch, ref_logprobs, kl * mask, non_score_reward, raw_scores, scores, queries, responses))
        stats["ppo/policy/advantages"] = batch["advantages"][mask.bool()].cpu()
        stats["ppo/policy/ratio"] = ratios.cpu()
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.kl_ctl.update(stats["objective/kl"], config.batch_size * self.accelerator.num_processes)
        self.score_moments = moments
        self.count_step()
        clock.lap("calc_stats")
        return {**stats, **clock.stats()}

    def scale_scores(self, raw_scores):
        """-> processed scores (B,), the moments of all scores so far: they become the trainer's own once the batch was not refused."""
        from rewards import process_scores
        config, moments = self.config, copy.copy(self.score_moments)
        if config.use_score_scaling:
            moments.update(raw_scores, self.reduce)
        return process_scores(raw_scores, moments if config.use_score_scaling else None, config.use_score_norm, config.score_clip), moments

    def count_step(self):
        """A step is over. Call it yourself after BadNumbers if you go on: the schedule is to end on time."""
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.steps_done += 1

    def check_finite(self, numbers):
        """Refuse a batch before it moves a weight. numbers: {stage: (B,) or (B, R), 0 outside the mask}; costs one sum of one number."""
        from distributed import not_finite_weights
        name = not_finite_weights(self.model)
        if name is not None:
            self.refuse("weights", WEIGHTS.format(name))
        rows = {stage: tensor.reshape(len(tensor), -1) for stage, tensor in numbers.items()}                 # (B, 1) or (B, R)
        stage = next((stage for stage, tensor in rows.items() if not tensor.isfinite().all()), None)
        if stage is None:
            return self.refuse(None, None)
        sample = int((~rows[stage].isfinite()).any(1).nonzero()[0])
        number = next(value for value in rows[stage][sample].tolist() if not math.isfinite(value))
        self.refuse(stage, self.say_sample(stage, sample, sample, number))

    def say_sample(self, stage, sample, position, number):
        remedy = "mend or leave out that sample" if stage in ("scores", "rewards") else "look at that sample, or lower the learning rate"
        return (f"the {stage} of sample {sample} of {self.config.batch_size} (mini-batch {1 + position // self.config.mini_batch_size}) "
                f"{'is' if stage == 'loss' else 'are'} {number}; nothing was changed by it: {remedy}")

    def check_batch(self, queries, responses, scores, response_masks):
        """Refuse what cannot be trained on, before anything changes. -> scores (B,) float32."""
        from rewards import check_scores
        batch_size = self.config.batch_size
        lists = {"queries": queries, "responses": responses, "response_masks": response_masks}
        for name, items in lists.items():
            if items is None and name == "response_masks":
                continue
            if not isinstance(items, (list, tuple)) or not all(torch.is_tensor(item) and item.ndim == 1 for item in items):
                raise ValueError(f"{name} must be a list of tensors of shape (tokens,), got {describe(items)}")
            if len(items) != batch_size:
                raise ValueError(f"{name} has {len(items)} samples but batch_size is {batch_size}; they must be equal")
        if not (isinstance(scores, (list, tuple)) or getattr(scores, "ndim", 0) > 0) or len(scores) != batch_size:
            raise ValueError(f"scores must be {batch_size} numbers, one per response (batch_size), got {describe(scores)}")
        for i, (query, response) in enumerate(zip(queries, responses)):
            if query.is_floating_point() or response.is_floating_point():
                raise ValueError(f"sample {i} has floating-point tokens; queries and responses are integer token ids")
            if len(query) == 0:
                raise ValueError(f"query {i} has 0 tokens; give at least 1, such as the tokenizer's BOS")
            if response_masks is not None and len(response_masks[i]) != len(response):
                raise ValueError(f"response_masks[{i}] has {len(response_masks[i])} entries but response {i} has "
                                 f"{len(response)} tokens; they must be equal")
            self.check_positions(len(query) + len(response), len(query))
        return check_scores(scores, finite=False)       # see check_finite

    def forward(self, model, rows, keep_logits=False):
        """-> logprobs, values, entropy (b, R), all at config.temperature and 0 outside the mask. rows: from `take`.

        keep_logits: in place of the entropy the logits (b, R, V), for the exact KL, which needs those of two models.
        """
        labels = rows["labels"].flatten()

        def score(logits, index):                                                       # (n, V), (n,) -> two of (n, ...)
            if self.config.temperature != 1.0:
                logits = logits / self.config.temperature
            if keep_logits:
                return logprobs_from_logits(logits, labels[index]), logits
            return LogprobsAndEntropy.apply(logits, labels[index])

        # autocast for the reference too: in another precision it would not be the same model
        with self.accelerator.autocast(), self.trunk.replay(rows.get("trunk")):
            (logprobs, rest), _, values = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], score=score,
                                                logit_positions=rows["positions"], score_mask=rows["mask"], chunk=self.chunk,
                                                use_cache=False)
        return logprobs, values, rest

    @torch.no_grad()
    def record(self, batch):
        """-> logprobs, values, ref_logprobs, full KL (or 0), each (B, R) and 0 outside the mask. Never rebound afterwards.

        batch["trunk"] (B, T, H) keeps the output of the layers that policy and reference share, which run here for the last time in this
        step. Where `recall` has given batch what they and the rest of the policy would give, none of these runs.
        """
        from rewards import full_kl
        shape, trunk = batch["mask"].shape, None
        logprobs, values, ref_logprobs, kl = torch.zeros((4, *shape), device=batch["mask"].device)
        self.model.eval()
        full, everything = self.config.kl_penalty == "full", torch.arange(shape[0], device=batch["mask"].device)
        # In mini-batches, policy and reference side by side: full_kl needs both (b, r, V) tensors, and no more than one pair.
        for index in fill_by_length(batch["lengths"], everything, self.config.mini_batch_size):
            rows = take(batch, index)
            mask = rows["mask"]                                                                            # (b, r)
            if "logprobs" in rows:
                new, value, logits, kept = rows["logprobs"] * mask, rows["values"] * mask, None, {}
            else:
                with self.trunk.record() as kept:
                    new, value, logits = self.forward(self.model, rows, keep_logits=full)
                rows.update(kept)
            ref, _, ref_logits = self.forward(self.ref_model, rows, keep_logits=full)
            width = mask.shape[1]
            logprobs[index, :width], values[index, :width], ref_logprobs[index, :width] = new, value, ref
            if full:
                kl[index, :width] = full_kl(logits, ref_logits) * mask
            if kept:
                hidden = kept["trunk"]                                                                     # (b, t, H)
                trunk = hidden.new_zeros(*batch["input_ids"].shape, hidden.shape[-1]) if trunk is None else trunk
                columns = min(trunk.shape[1], hidden.shape[1])
                trunk[index, :columns] = hidden[:, :columns]    # what lies beyond is padding, which no real token sees
            del logits, ref_logits      # (b, r, V) each: not to be kept through the next mini-batch's forward pass
        if trunk is not None:
            batch["trunk"] = trunk
        return logprobs, values, ref_logprobs, kl

    # ------------------------------------------------------------------------------------------ (e) update

    def update(self, batch):
        """ppo_epochs passes over the batch. -> sums (optimizer steps, len(TERMS) + 3) over this process, ratios (tokens,)."""
        self.model.train()      # for gradient checkpointing, which sleeps in eval mode; there is no dropout left to wake
        sums, ratios = [], []
        for epoch in range(self.config.ppo_epochs):
            # numpy's global generator, as TRL: the same seed gives the same mini-batches there and here
            order = torch.from_numpy(np.random.permutation(self.config.batch_size)).to(batch["mask"].device)
            for index in order.split(self.config.backward_batch_size):
                self.where = f"step {self.steps_done + 1}, epoch {epoch + 1}, optimizer step {len(sums) + 1}"
                row, ratio = self.optimizer_step(batch, index, first=not sums)
                sums.append(row)
                ratios.append(ratio)
            if self.config.early_stopping:
                moved = self.reduce(sums[-1])
                # policykl of the epoch's last optimizer step, over all processes: all stop or none does
                if moved[TERMS.index("policy/policykl")] / moved[-3].clamp(min=1) > 1.5 * self.config.target_kl:
                    break
        return torch.stack(sums), torch.cat(ratios)

    def optimizer_step(self, batch, index, first):
        """One optimizer step on rows `index`, in mini-batches. -> this process's sums (len(TERMS) + 3,), ratios (tokens,).

        The three extra sums: tokens, 1 if skipped, the gradient's norm (on the main process only, as sums are added up).
        """
        from distributed import accumulate, backward, drop_step, scales_loss, take_step
        processes = self.accelerator.num_processes
        # The loss is a mean over the tokens of the whole optimizer step and of all processes. A mean of the mini-batches' means
        # would weigh a token in a short mini-batch more: with ragged responses the update was off by 25 %.
        tokens = self.reduce(batch["mask"][index].sum().float())
        samples, ratios = [], []
        # One process may also halve a mini-batch whose rows differ much in length: the sum over its tokens stays what it is. Several
        # must all do the same number of passes.
        parts = fill_by_length(batch["lengths"], index, self.config.mini_batch_size, saving=0.15 if processes == 1 else 1.0)
        index = torch.cat(parts)
        for number, part in enumerate(parts):
            rows = take(batch, part)
            with accumulate(self.accelerator, self.model, last=number == len(parts) - 1):
                loss, terms, ratio = self.minibatch_loss(rows, first=first and number == 0)
                # times `processes`, because gradients are averaged over them and `tokens` already counts all
                backward(self.accelerator, self.model, loss / tokens.clamp(min=1) * processes)
            samples.append(terms)
            ratios.append(ratio)
        samples = torch.cat(samples, 1)                                                                   # (len(TERMS), n)
        sums = samples.sum(1)
        # Over all processes: all step or none does.
        totals = dict(zip(TERMS, self.reduce(sums).tolist()))
        self.check_update(totals, samples, index)
        skip = not (tokens > 0 and totals["policy/ratio_mean"] / tokens <= self.config.ratio_threshold)
        norm = 0.0
        if not skip:
            norm = take_step(self.accelerator, self.model, self.optimizer, self.config.max_grad_norm)
            skip = norm is None
            if skip and not scales_loss(self.accelerator, self.model):      # where it does, an overflow is its business and daily bread
                self.refuse_gradients(index)
        if skip:
            drop_step(self.accelerator, self.model, self.optimizer)
            norm = 0.0
        own = batch["mask"][index].sum()
        main = float(self.accelerator.is_main_process)
        return torch.cat([sums, torch.tensor([own, skip * main, norm * main], dtype=torch.float64, device=sums.device)]), \
            torch.cat(ratios)

    def check_update(self, totals, samples, index):
        """Refuse an optimizer step on rows `index` (n,) whose terms are not finite. totals: {term: sum over all processes}, by which
        all decide alike; samples: (len(TERMS), n), this process's, by which the one to blame is found."""
        from distributed import drop_step
        ratio = math.isfinite(totals["policy/ratio_mean"])
        term = next((name for name in NEEDED if not math.isfinite(totals[name]) and (ratio or name != "loss/policy")), None)
        if term is None:
            return
        drop_step(self.accelerator, self.model, self.optimizer)
        found = samples[TERMS.index(term)]                                                                # (n,)
        problem = None
        for at in (~found.isfinite()).nonzero()[:1].flatten().tolist():
            problem = self.say_sample(NEEDED[term], int(index[at]), at, abs(float(found[at])))
        self.refuse(NEEDED[term], problem)

    def refuse_gradients(self, index):
        """The loss was finite but its gradient, a sum over all samples of the optimizer step, is not."""
        from distributed import drop_step, unwrap
        name = next((name for name, p in unwrap(self.model).named_parameters() if p.grad is not None and not p.grad.isfinite().all()), None)
        drop_step(self.accelerator, self.model, self.optimizer)
        self.refuse("gradients", f"the gradient of {name or 'the weights'} is not finite, over samples {', '.join(map(str, index.tolist()))} of "
                                 f"{self.config.batch_size}; no weight was moved by it")

    def minibatch_loss(self, rows, first):
        """-> loss (): summed over tokens, terms (len(TERMS), b): sums per sample, ratios (tokens,)."""
        config, mask = self.config, rows["mask"]                                                          # (b, r)
        new_logprobs, new_values, entropy = self.forward(self.model, rows)
        log_ratio = (new_logprobs - rows["logprobs"]) * mask
        if first:
            self.check_ratio(log_ratio, mask)
        pg_loss, ratio, clipped = policy_loss(rows["logprobs"] + log_ratio, rows["logprobs"], rows["advantages"],
                                              config.cliprange)
        vf_loss, vf_clipped = value_loss(new_values, rows["values"], rows["returns"], config.cliprange_value)
        loss = ((pg_loss + config.vf_coef * vf_loss) * mask).sum()
        with torch.no_grad():
            terms = (pg_loss, vf_loss, entropy, 0.5 * log_ratio.square(), -log_ratio, clipped,
                     rows["advantages"], ratio, rows["returns"], rows["returns"].square(), new_values,
                     (new_values - rows["returns"]).square(), vf_clipped, rows["values"], rows["values"].square())
            sums = torch.stack([(term.double() * mask).sum(1) for term in terms])
        return loss, sums, ratio.detach()[mask.bool()]

    def check_ratio(self, log_ratio, mask):
        """Nothing has been updated yet, so new and recorded log-probs are those of one network: the ratio must be 1."""
        difference, tolerance = log_ratio.detach().abs(), 1e-3 if self.exact else 0.1
        worst = float(difference.max() if self.exact else difference.sum() / mask.sum().clamp(min=1))
        fine = worst <= tolerance or not math.isfinite(worst)       # what is not finite is refused by name, see check_update
        bad = self.reduce(torch.tensor(0.0 if fine else 1.0, device=log_ratio.device))    # all ranks stop, or none
        if bad > 0:
            raise RuntimeError(
                f"the ratio is not 1 before the first update: log-probs differ by {worst:.3g} nats here, {tolerance} is "
                "allowed. Usual causes: a layer that behaves differently in train and eval mode (dropout under another name, "
                "batch norm), weights changed between generate() and step(), or a model that ignores position_ids, the mask or its cache")

    # ------------------------------------------------------------------------------------ (f) book-keeping

    def update_stats(self, sums):
        """Sums per optimizer step (n, len(TERMS) + 3) -> statistics: token means over all processes, then means over steps."""
        sums = self.reduce(sums)
        tokens = sums[:, -3:-2]                                                                           # (n, 1)
        mean = dict(zip(TERMS, (sums[:, :-3] / tokens.clamp(min=1)).unbind(1)))                           # each (n,)
        bessel = (tokens / (tokens - 1).clamp(min=1)).squeeze(1)
        mean["returns/var"] = (mean.pop("returns/square") - mean["returns/mean"].square()) * bessel
        mean["val/var"] = (mean.pop("val/square") - mean["val/mean"].square()) * bessel
        mean["loss/total"] = mean["loss/policy"] + self.config.vf_coef * mean["loss/value"]
        stats = {f"ppo/{name}": float(value.mean()) for name, value in mean.items()}
        variance = stats["ppo/returns/var"]
        # 1 - error / variance: 1 = the values foretell the returns, 0 = no better than their mean
        stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / variance if variance > 0 else 0.0
        stats["ppo/skipped_steps"] = float(sums[:, -2].sum())
        stats["ppo/optimizer_steps"] = float(len(sums))
        stats["ppo/grad_norm"] = float(sums[:, -1].mean())
        return stats

    def batch_stats(self, batch, ref_logprobs, kl, non_score_reward, raw_scores, scores, queries, responses):
        """Statistics of the responses, over all processes. kl: (B, R), 0 outside the mask."""
        from distributed import gather_lists
        mask = batch["mask"]
        query_lengths = torch.tensor([float(len(q)) for q in queries], device=kl.device)                  # (B,)
        response_lengths = batch["response_lengths"].float()
        per_response = {"objective/kl": kl.sum(1), "objective/entropy": -batch["logprobs"].sum(1), "ppo/mean_scores": scores,
                        "ppo/mean_raw_scores": raw_scores, "tokens/queries_len_mean": query_lengths,
                        "tokens/responses_len_mean": response_lengths}                                    # each (B,)
        ones = torch.ones_like(scores)
        stats = {name: float(masked_mean(value.float(), ones, self.reduce)) for name, value in per_response.items()}
        for name, value in (("ppo/std_scores", scores), ("ppo/std_raw_scores", raw_scores),
                            ("tokens/queries_len_std", query_lengths), ("tokens/responses_len_std", response_lengths)):
            stats[name] = float(masked_var(value, ones, self.reduce).sqrt())
        stats["objective/kl_coef"] = self.kl_ctl.value
        stats["ppo/mean_non_score_reward"] = float(masked_mean(non_score_reward, mask, self.reduce))
        for name, value in (("objective/kl_dist", kl.sum(1)), ("tokens/queries_dist", query_lengths),
                            ("tokens/responses_dist", response_lengths)):
            stats[name] = torch.tensor(gather_lists(self.accelerator, value.tolist()))
        stats["objective/logprobs"], stats["objective/ref_logprobs"] = batch["logprobs"].cpu(), ref_logprobs.cpu()
        if stats["objective/kl"] < -1.0:
            logger.warning("the KL to the reference is %.2f, below 0: the policy is paid for being unlike its samples; look for a "
                           "sampler that differs from the policy", stats["objective/kl"])
        if self.steps_done == 0 and quantized(self.ref_model):
            logger.warning("the reference is a rounded copy: before any update the KL to it is already %.4f nats per response, in "
                           "which the penalty sees no fault of the policy", stats["objective/kl"])
        return stats

    def log_stats(self, stats, batch, rewards, columns_to_log=("query", "response")):
        """Send a step's statistics to the tracker named by log_with, and to wandb a table of texts and rewards as well.

        batch: {"query": texts, "response": texts}, of this process; rewards: B numbers.
        """
        from distributed import gather_lists
        if self.config.log_with is None:
            return
        rewards = gather_lists(self.accelerator, [float(r) for r in rewards])
        logs = {name: value for name, value in stats.items() if isinstance(value, (int, float))}
        logs["env/reward_mean"], logs["env/reward_std"] = float(np.mean(rewards)), float(np.std(rewards))
        if self.config.log_with == "wandb":
            import wandb
            columns = [gather_lists(self.accelerator, batch[name]) for name in columns_to_log]
            logs["game_log"] = wandb.Table(columns=[*columns_to_log, "reward"], data=list(zip(*columns, rewards)))
        self.accelerator.log(logs, step=self.steps_done)

    def save_pretrained(self, folder, **kwargs):
        """The policy with its value head and the tokenizer, loadable by from_pretrained. Written by the main process.

        kwargs go to transformers' save_pretrained, `max_shard_size` for one.
        """
        from distributed import full_state_dict, give_usual_modes, unwrap, writes
        state = full_state_dict(self.accelerator, self.model)       # from all processes: under ZeRO-3 each has a share
        with writes(self.accelerator):                              # and none goes on before it is written
            if self.accelerator.is_main_process:
                unwrap(self.model).save_pretrained(folder, state_dict=state, **kwargs)
                self.tokenizer.save_pretrained(folder)
                give_usual_modes(folder)

    def bytes_to_save(self, optimizer=True):
        """What save_checkpoint writes, or save_pretrained without the optimizer: the tensors' bytes, which are nearly all of it."""
        from distributed import unwrap, whole_numel, zero_stage
        from optim import state_bytes
        weights = sum(whole_numel(p) * p.element_size() for p in unwrap(self.model).parameters())
        if not optimizer:
            return weights
        state = torch.tensor(state_bytes(self.optimizer), dtype=torch.float64, device=self.accelerator.device)
        if zero_stage(self.accelerator) == 0:
            return weights + int(state)
        return 2 * weights + int(self.reduce(state))        # a share of the state in each process, and float32 weights beside it

    def save_checkpoint(self, folder):
        """Everything that the next step depends on, in a folder that is whole or not there; see `load_checkpoint`.

        model/ is what save_pretrained writes. The rest: the optimizer's tensors, one file of numbers, and each process's random
        generators. safetensors and JSON only, so reading a checkpoint executes nothing; but under ZeRO each process's share of
        weights and state is DeepSpeed's own file, a pickle.
        """
        from distributed import random_states, whole_folder, writes, zero_stage
        from optim import pack_schedule, pack_state
        from safetensors.torch import save_file
        self.check_weights()                    # or the checkpoint to go back to would be the one that cannot go on
        scaler = self.accelerator.scaler        # fp16's
        state = {"steps_done": self.steps_done, "kl_coef": self.kl_ctl.value, "score_moments": self.score_moments.state_dict(),
                 "lr_scheduler": None if self.lr_scheduler is None else pack_schedule(self.lr_scheduler),
                 "scaler": None if scaler is None else scaler.state_dict(),
                 "zero_stage": zero_stage(self.accelerator), "processes": self.accelerator.num_processes}
        with whole_folder(self.accelerator, folder, needed=self.bytes_to_save()) as partial:
            self.save_pretrained(partial / "model", save_original_format=False)     # as it is, also where the hub has other names
            if state["zero_stage"] > 0:
                self.model.save_checkpoint(str(partial), tag="zero")
            with writes(self.accelerator):
                if self.accelerator.is_main_process:
                    if state["zero_stage"] == 0:
                        tensors, state["optimizer"] = pack_state(self.optimizer)
                        save_file(tensors, partial / "optimizer.safetensors")
                    (partial / "trainer.json").write_text(json.dumps(state), encoding="utf-8")
                states = random_states(self.accelerator.device)
                (partial / f"random-{self.accelerator.process_index}.json").write_text(json.dumps(states), encoding="utf-8")

    def load_checkpoint(self, folder, check=True):
        """Go on where `save_checkpoint` was: the steps that follow are, bit for bit, those that would have followed there.

        Make the trainer as it was made for the first step, with the reference of the untrained model, and feed it the prompts of the
        steps that are left: where `dataloader` stood is not saved. Another number of processes works without DeepSpeed; a process
        beyond the saved number then keeps its own random state.
        check=False: the caller has just compared the folder with its manifest, for which all of it is read.
        ValueError: the folder is damaged, or of another model, optimizer or ZeRO stage.
        """
        from distributed import damage, set_random_states, together, zero_stage
        from optim import unpack_schedule
        folder, accelerator = Path(folder), self.accelerator
        stage, processes = zero_stage(accelerator), accelerator.num_processes
        with together(accelerator):
            problem = damage(folder) if check else None
            if problem is not None:
                raise ValueError(f"{folder} cannot be loaded: {problem}; use an older checkpoint")
            state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
            if state["zero_stage"] != stage or (stage > 0 and state["processes"] != processes):
                raise ValueError(
                    f"{folder} was saved by {state['processes']} processes with ZeRO-{state['zero_stage']} (0 = without) and this run has "
                    f"{processes} with ZeRO-{stage}; launch it as it was saved, or start a new run from {folder / 'model'}")
            own = folder / f"random-{accelerator.process_index}.json"
            if accelerator.process_index < state["processes"] and not own.is_file():
                raise ValueError(f"{folder} cannot be loaded: {own.name} is missing, and with it where the random numbers stood; "
                                 "use an older checkpoint")
        self.load_weights_and_optimizer(folder, state, stage)
        if self.lr_scheduler is not None:
            unpack_schedule(self.lr_scheduler, state["lr_scheduler"])
        if state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        self.steps_done, self.kl_ctl.value = state["steps_done"], state["kl_coef"]
        self.score_moments.load_state_dict(state["score_moments"])
        if own.is_file():
            set_random_states(json.loads(own.read_text(encoding="utf-8")), accelerator.device)

    def load_weights_and_optimizer(self, folder, state, stage):
        from distributed import unwrap
        from optim import unpack_state
        from safetensors.torch import load_file
        if stage > 0:
            loaded, _ = self.model.load_checkpoint(str(folder), tag="zero", load_lr_scheduler_states=False)
            assert loaded is not None, f"DeepSpeed found nothing in {folder / 'zero'}, though the manifest did"
            return
        weights = {name: tensor for path in sorted((folder / "model").glob("*.safetensors")) for name, tensor in load_file(path).items()}
        pairs = match_weights(unwrap(self.model), weights)
        unpack_state(self.optimizer, load_file(folder / "optimizer.safetensors"), state["optimizer"])
        for own, saved in pairs:        # only now that all of it fits: a model that is loaded in part is none
            own.copy_(saved)


class Clock:
    """Seconds between laps, under TRL's names; the letters of the phases are those of scripts/train.py."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.laps = {}

    def lap(self, name):
        now = time.perf_counter()
        self.laps[f"time/ppo/{name}"], self.last = now - self.last, now

    def stats(self):
        return {**self.laps, "time/ppo/total": time.perf_counter() - self.start}


def match_weights(model, weights):
    """-> list of (the model's own tensor, the saved one to copy into it): in place, so that what is shared with the reference stays so.

    Of tied tensors one name is saved. ValueError names a tensor that is missing, left over, or of another shape.
    """
    own, pairs = model.state_dict(), []
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"the checkpoint's {name} is {tuple(tensor.shape)} but the model's is "
                             f"{tuple(own[name].shape) if name in own else 'not there'}; it is of another model")
        pairs.append((own[name], tensor))
    done = {tensor.data_ptr() for tensor, _ in pairs}
    missing = [name for name, tensor in own.items() if tensor.data_ptr() not in done]
    if missing:
        raise ValueError(f"the checkpoint has {len(weights)} tensors but not {missing[0]}; it is of another model")
    return pairs


def quantized(model):
    """True for a model loaded in 8 or 4 bits, which must be neither moved nor wrapped."""
    return getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)


def describe(items):
    if not isinstance(items, (list, tuple)):
        shape = f" of shape {tuple(items.shape)}" if torch.is_tensor(items) else ""
        return f"a {type(items).__name__}{shape}"
    kinds = sorted({f"tensor of shape {tuple(i.shape)}" if torch.is_tensor(i) else type(i).__name__ for i in items})
    return f"a {type(items).__name__} of {len(items)}: {', '.join(kinds[:3])}"


def check_arguments(config, model, ref_model, tokenizer, num_shared_layers):
    """The constructor's arguments, in the order in which they are given."""
    from transformers import PreTrainedTokenizerBase
    from value_head import AutoModelForCausalLMWithValueHead
    if not isinstance(config, PPOConfig):
        raise ValueError(f"config is a {type(config).__name__}; give a PPOConfig")
    for name, each in (("model", model), ("ref_model", ref_model)):
        if not isinstance(each, AutoModelForCausalLMWithValueHead) and not (name == "ref_model" and each is None):
            raise ValueError(f"{name} is a {type(each).__name__}; wrap it with "
                             "AutoModelForCausalLMWithValueHead.from_pretrained(...)")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; give the model's own, from AutoTokenizer.from_pretrained")
    if quantized(model):
        raise ValueError("model is loaded in 8 or 4 bits, and 0 of its quantized weights can be trained; load it without, and only the "
                         "reference in fewer bits")
    if ref_model is not None and num_shared_layers is not None:
        raise ValueError(f"num_shared_layers is {num_shared_layers} but a ref_model is given; leave one of them out, or make the "
                         "reference with create_reference_model(model, num_shared_layers)")


def check_optimizer(optimizer, lr_scheduler, model):
    from optim import pack_schedule
    own = {id(p) for p in model.parameters()}
    strangers = sum(id(p) not in own for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise ValueError(f"{strangers} of the optimizer's parameters are not the model's; build it over model.parameters()")
    if lr_scheduler is None:
        return
    kind = type(lr_scheduler)
    if not isinstance(lr_scheduler, torch.optim.lr_scheduler.LRScheduler) or kind is torch.optim.lr_scheduler.ReduceLROnPlateau:
        raise ValueError(f"lr_scheduler is a {kind.__name__}; give one from torch.optim.lr_scheduler that steps without a metric")
    if lr_scheduler.optimizer is not optimizer:
        raise ValueError("the lr_scheduler was built over another optimizer than the one passed; build it over that one")
    pack_schedule(lr_scheduler)     # now, not at the first checkpoint


if __name__ == "__main__":
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])                                                     # (2, 4)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, -1.0, 0.0, 0.0]])
    advantages, returns = gae(rewards, torch.zeros(2, 4), mask, gamma=1.0, lam=0.95)
    print("advantages\n", advantages.numpy().round(3))
    white = masked_whiten(advantages, mask)
    logits = torch.randn(2, 4, 9, requires_grad=True)
    labels = torch.randint(0, 9, (2, 4))
    old = logprobs_from_logits(logits, labels).detach()                                                   # (2, 4)
    for step in range(3):
        loss, ratio, clipped = policy_loss(logprobs_from_logits(logits, labels), old, white, cliprange=0.2)
        total = masked_mean(loss, mask)
        gradient, = torch.autograd.grad(total, logits)
        logits = (logits - 5.0 * gradient).detach().requires_grad_()
        print(f"step {step}: loss {total:+.4f}, mean ratio {masked_mean(ratio, mask):.3f}, "
              f"clipped {masked_mean(clipped, mask):.0%}, entropy {entropy_from_logits(logits).mean():.3f} nats")
