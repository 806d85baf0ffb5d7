"""Proximal policy optimization for language models: the settings, the maths, and the trainer that joins them.

Why: a reward says how good a whole response was, not which token made it so, and after one optimizer step the
response is no longer the policy's own. PPO spreads the reward over the tokens by generalised advantage
estimation (GAE), and clips each update so that a few epochs over the same responses stay safe.
Source: Schulman et al. 2017 (PPO, arXiv 1707.06347), Schulman et al. 2016 (GAE, arXiv 1506.02438), Ziegler et
al. 2019 (PPO for language models, arXiv 1909.08593). Names, defaults and statistics are those of TRL 0.11.4.
Differs from TRL 0.11.4 in: see docs/differences.md. In short, the loss is a mean over the response tokens of
all processes and of the whole optimizer step; the distribution that is sampled is the one that is trained.
Left out on purpose: what only makes a step faster. speed.py does that, with the same numbers.
Shapes, for a batch of B prompts, Q_i and R_i tokens long (all other files refer to this picture):

      query (Q tokens)   response (R tokens)   padding on the right in training, on the left in generation
      q q q q          | r0 r1 r2 EOS  .  .
      the logits at column Q-1+t score r_t; values[t] = V(all tokens before r_t), from the same column
      mask               1  1  1  1   0  0     1 = a token the policy chose, EOS included; made from lengths
      rewards           -k -k -k -k+score      k = kl_coef * kl[t]

    input_ids, attention_mask: (B, T), T = the longest query + response. Response tokens: (B, R).
Copy me: the upper half needs torch and numpy; the trainer needs checks.py and the five concept files.
Tested by tests/test_ppo_core.py and, number by number against TRL, by tests/test_golden.py.
"""
import copy
import functools
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch

logger = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------------- settings


def knob(default, help):
    """A dataclass field whose help text is what `scripts/train.py --help` prints."""
    return field(default=default, metadata={"help": help})


@dataclass
class PPOConfig:
    """Settings of PPOTrainer, with TRL 0.11.4's names and defaults. ValueError: the settings cannot work."""

    # ---- the run
    model_name: str = knob("gpt2", "language model to train: a folder or a hub id")
    reward_model: Optional[str] = knob(None, "text classifier that gives the scores: a folder or a hub id")
    seed: int = knob(0, "read by scripts/train.py; the same seed gives the same run")
    log_with: Optional[Literal["wandb", "tensorboard"]] = knob(None, "also log to: wandb or tensorboard")
    tracker_project_name: str = knob("plainppo", "project of the run in the tracker")
    # ---- batches: batch_size is a multiple of mini_batch_size x gradient_accumulation_steps
    batch_size: int = knob(128, "responses per step() and process")
    mini_batch_size: Optional[int] = knob(None, "responses per forward pass and process; default: batch_size")
    gradient_accumulation_steps: int = knob(1, "mini-batches per optimizer step")
    ppo_epochs: int = knob(4, "passes over each batch of responses")
    # ---- optimizer
    learning_rate: float = knob(1.41e-5, "of Adam, the default optimizer")
    max_grad_norm: Optional[float] = knob(None, "clip the gradient's norm to this; default: no clipping")
    gradient_checkpointing: bool = knob(False, "compute activations twice: less memory, more time")
    # ---- the KL penalty, in nats
    init_kl_coef: float = knob(0.2, "reward lost per nat of KL to the reference, at the start")
    adap_kl_ctrl: bool = knob(True, "adapt it, so that the KL per response approaches `target`")
    target: float = knob(6.0, "KL per response that the adaptive controller aims at")
    horizon: float = knob(10000.0, "samples over which that controller reacts; smaller is faster")
    kl_penalty: Literal["kl", "abs", "mse", "full"] = knob("kl", "log-ratio, abs, half square, or exact")
    # ---- advantages
    gamma: float = knob(1.0, "discount per token; 1 = none, as responses are short")
    lam: float = knob(0.95, "GAE's lambda; 1 = Monte Carlo returns, 0 = one-step differences")
    lam_value: Optional[float] = knob(None, "the lambda of the returns that values learn; default: lam")
    whiten_rewards: bool = knob(False, "scale rewards around their mean to std 1: [1, 3] -> [1.29, 2.71]")
    # ---- the loss
    cliprange: float = knob(0.2, "new/old probability is clipped to 1 +- this")
    cliprange_value: float = knob(0.2, "a new value is clipped to the old one +- this")
    vf_coef: float = knob(0.1, "weight of the value loss beside the policy loss")
    critic_warmup_steps: int = knob(0, "first steps, in which the value head alone is trained")
    value_learning_rate: Optional[float] = knob(None, "of the value head; default: learning_rate")
    ratio_threshold: float = knob(10.0, "skip an optimizer step whose mean ratio exceeds this")
    early_stopping: bool = knob(False, "end a step's epochs once the policy moved over 1.5 x target_kl")
    target_kl: float = knob(1.0, "nats per token, new policy against rollout policy")
    # ---- sampling
    temperature: float = knob(1.0, "divides all logits: of sampler, rollout, update and reference")
    # ---- scores, in units of the reward model
    use_score_scaling: bool = knob(False, "divide scores by the std of all scores so far")
    use_score_norm: bool = knob(False, "also subtract their mean; needs use_score_scaling")
    score_clip: Optional[float] = knob(None, "clip processed scores to +- this; default: no clipping")
    # ---- memory
    optimize_device_cache: Optional[bool] = knob(None, "empty the device cache before and after the update")
    optimize_cuda_cache: Optional[bool] = knob(None, "older name of optimize_device_cache")
    ds3_gather_for_generation: bool = knob(True, "ZeRO-3: gather all weights for a rollout; False: by layer")

    def __post_init__(self):
        if self.mini_batch_size is None:
            self.mini_batch_size = self.batch_size
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "target",
                     "temperature", "cliprange", "cliprange_value", "horizon", "ratio_threshold", "target_kl",
                     "score_clip", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be greater than 0")
        for name, high in (("gamma", 1), ("lam", 1), ("lam_value", 1), ("init_kl_coef", np.inf),
                           ("learning_rate", np.inf), ("value_learning_rate", np.inf), ("vf_coef", np.inf),
                           ("critic_warmup_steps", np.inf)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= high:
                raise ValueError(f"{name} is {value}; it must be between 0 and {high}")
        if self.log_with not in (None, "wandb", "tensorboard"):
            raise ValueError(f"log_with is {self.log_with!r}; use 'wandb', 'tensorboard' or None")
        if self.kl_penalty not in ("kl", "abs", "mse", "full"):
            raise ValueError(f"kl_penalty is {self.kl_penalty!r}; use 'kl', 'abs', 'mse' or 'full'")
        if self.batch_size % self.backward_batch_size:
            suggestion = -(-self.batch_size // self.backward_batch_size) * self.backward_batch_size
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of mini_batch_size "
                             f"({self.mini_batch_size}) x gradient_accumulation_steps "
                             f"({self.gradient_accumulation_steps}); try {suggestion}")
        if self.use_score_norm and not self.use_score_scaling:
            raise ValueError("use_score_norm is on but use_score_scaling is off; turn both on")
        newer, older = self.optimize_device_cache, self.optimize_cuda_cache
        if None not in (newer, older) and newer != older:
            raise ValueError(f"optimize_device_cache is {newer} but optimize_cuda_cache, its older name, is "
                             f"{older}; give one")
        self.optimize_device_cache = bool(newer or older)

    @property
    def backward_batch_size(self):
        """Responses per optimizer step and process."""
        return self.mini_batch_size * self.gradient_accumulation_steps


# -------------------------------------------------------------------------------------------------- the maths
# Functions of tensors alone. A mask is 1 for a token that counts. `reduce` sums a tensor over all processes.


def sum_over_one_process(tensor):
    return tensor


def masked_mean(values, mask, reduce=sum_over_one_process):
    """Mean of values (B, R) where mask (B, R) is 1, over all processes; 0 if there is no such token. -> ()"""
    total, count = reduce(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    return total / count.clamp(min=1)


def masked_var(values, mask, reduce=sum_over_one_process):
    """Sample variance (n - 1) of the same values; 0 if there are fewer than two. -> ()"""
    centered = values - masked_mean(values, mask, reduce)
    total, count = reduce(torch.stack([(centered.square() * mask).sum(), mask.sum().to(values.dtype)]))
    return total / (count - 1).clamp(min=1)


def masked_whiten(values, mask, shift_mean=True, reduce=sum_over_one_process):
    """(B, R) -> (B, R) with variance 1, and mean 0 if shift_mean, over the tokens of all processes."""
    mean, var = masked_mean(values, mask, reduce), masked_var(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def logprobs_from_logits(logits, labels):
    """log p(label) per token: (B, R, V), (B, R) -> (B, R)."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits):
    """Entropy of each token's distribution, in nats: (B, R, V) -> (B, R)."""
    logp = logits.log_softmax(-1)
    # A token that the model rules out has log-prob -inf and adds 0. Without the clamp 0 * -inf would be NaN.
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


def gae(rewards, values, mask, gamma, lam, lam_value=None):
    """Generalised advantage estimation, equations 11 and 16 of arXiv 1506.02438.

    rewards, values, mask: (B, R) -> advantages (B, R), returns (B, R) = advantages + values, both before
    whitening and 0 outside the mask. The value after the last token is 0. Tokens that are masked in the
    middle are passed over, as if not there. lam_value: lambda of the returns alone (arXiv 2503.01491).
    """
    if lam_value is not None:
        return gae(rewards, values, mask, gamma, lam)[0], gae(rewards, values, mask, gamma, lam_value)[1]
    rewards, values, chosen = rewards * mask, values * mask, mask.bool()
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])        # (B,), of the chosen token after t
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(chosen[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(chosen[:, t], values[:, t], next_value)
        advantages[:, t] = advantage * mask[:, t]
    return advantages, advantages + values


def policy_loss(new_logprobs, logprobs, advantages, cliprange):
    """Clipped surrogate objective per token, equation 7 of arXiv 1707.06347. All (B, R).

    -> loss, ratio, clipped (1 where clipping took the gradient away), each (B, R). Only the caller knows of
    how many tokens to take the mean.
    """
    ratio = torch.exp(new_logprobs - logprobs)     # 1 at the first optimizer step, which clips nothing
    loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return torch.maximum(loss, clipped_loss), ratio, (clipped_loss > loss).float()


def value_loss(new_values, values, returns, cliprange_value):
    """Half the squared error of the new value, or of it clipped to the old one +- cliprange_value if that is
    larger: clipping never makes an error look smaller. From OpenAI's baselines.

    All (B, R) -> loss (B, R), clipped (B, R): 1 where the clipped error was the larger.
    """
    clipped_values = torch.clamp(new_values, values - cliprange_value, values + cliprange_value)
    error, clipped_error = (new_values - returns).square(), (clipped_values - returns).square()
    return 0.5 * torch.maximum(error, clipped_error), (clipped_error > error).float()


def collate(queries, responses, response_masks, pad_token_id):
    """Lists of B tensors (Q_i,), (R_i,) -> dict of tensors, padded on the right as drawn at the top.

    input_ids, attention_mask (B, T); labels (B, R): the response tokens; positions (B, R): the columns that
    score them; mask (B, R); response_lengths (B,); lengths (B,) with the query. response_masks: None, or a
    list of (R_i,) with 0 for tokens that do not count.
    """
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    input_ids = pad([torch.cat([q, r]) for q, r in zip(queries, responses)], padding_value=pad_token_id)
    device = input_ids.device
    query_lengths = torch.tensor([len(q) for q in queries], device=device)
    response_lengths = torch.tensor([len(r) for r in responses], device=device)
    lengths = query_lengths + response_lengths
    column = torch.arange(input_ids.shape[1], device=device)                                            # (T,)
    t = torch.arange(max(1, int(response_lengths.max())), device=device)                                # (R,)
    positions = (query_lengths[:, None] - 1 + t).clamp(max=input_ids.shape[1] - 1)                    # (B, R)
    mask = (t < response_lengths[:, None]).long()
    if response_masks is not None:
        chosen = pad([(m != 0).long() for m in response_masks]).to(device)                         # (B, <= R)
        mask[:, :chosen.shape[1]] *= chosen
    labels = input_ids.gather(1, (positions + 1).clamp(max=input_ids.shape[1] - 1))                  # (B, R)
    return {"input_ids": input_ids, "attention_mask": (column < lengths[:, None]).long(), "labels": labels,
            "positions": positions, "mask": mask, "response_lengths": response_lengths, "lengths": lengths}


def disable_dropout(model):
    """Set every dropout rate in `model` to 0: with dropout, rollout, update and reference would differ.

    The model's config keeps the rates, and so does what is saved.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            # nn.Dropout's `p`, and plain numbers that attention functions read, such as attention_dropout
            rate = "drop" in name or (name == "p" and isinstance(module, torch.nn.Dropout))
            if rate and isinstance(value, float):
                setattr(module, name, 0.0)


class LengthSampler:
    """Draws a response length from [min_value, max_value), in tokens, from numpy's global generator."""

    def __init__(self, min_value, max_value):
        if not 0 < min_value < max_value:
            raise ValueError(f"LengthSampler({min_value}, {max_value}) needs 0 < first < second")
        self.values = list(range(min_value, max_value))

    def __call__(self):
        return int(np.random.choice(self.values))


# Settings of `generate` that never change the sampled distribution; and others, with the values that do not
# change it. None never does. The first value is passed to `generate`, unless it is None.
HARMLESS = {"max_new_tokens", "max_length", "pad_token_id", "eos_token_id", "bos_token_id", "use_cache",
            "stopping_criteria"}
NEUTRAL = {"do_sample": (True,), "top_k": (0,), "top_p": (1.0,), "min_p": (0.0,), "typical_p": (1.0,),
           "repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "num_beams": (1,),
           "min_length": (0, -1), "min_new_tokens": (None, 0), "num_return_sequences": (1,),
           "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "renormalize_logits": (False,),
           "guidance_scale": (1.0,), "remove_invalid_values": (False,)}


def sampling_arguments(temperature, overrides, allow_other_distribution=False):
    """-> keyword arguments for transformers' `generate` that sample exactly softmax(logits / temperature).

    A setting that changes the distribution is a ValueError: tokens would be drawn from one distribution and
    scored under another, and the policy would be paid for the difference, which shows as a negative KL.
    """
    neutral = {"temperature": (temperature,), **NEUTRAL}
    arguments = {name: values[0] for name, values in neutral.items() if values[0] is not None}
    for name, value in overrides.items():
        same_distribution = value is None or value in neutral.get(name, ())
        if name in HARMLESS or (allow_other_distribution and not same_distribution):
            arguments[name] = value
        elif not same_distribution:
            expected = neutral.get(name, ("nothing",))[0]
            where = "; set it in PPOConfig" if name == "temperature" else ""
            raise ValueError(f"generate(..., {name}={value!r}) would sample from another distribution than "
                             f"the one PPO trains ({name}={expected!r}){where}; leave it out, or say "
                             "allow_other_distribution=True to evaluate only")
    return arguments


# What an update measures per token: summed over mini-batches and processes, then divided by all their tokens.
TERMS = (
    "loss/policy",              # see policy_loss; what is minimised is this + vf_coef * loss/value
    "loss/value",               # see value_loss
    "policy/entropy",           # nats; falls slowly while the policy learns, and at once when it collapses
    "policy/approxkl",          # half the squared log-ratio (k2): how far these epochs have moved the policy
    "policy/policykl",    # minus the log-ratio (k1): the same, unbiased and noisy; early stopping looks at it
    "policy/clipfrac",   # share of tokens without policy gradient; 0 = could learn faster, 0.5 = far too fast
    "policy/advantages_mean",
    "policy/ratio_mean",    # far from 1: the learning rate is too high, or the sampler is not the policy
    "returns/mean",
    "returns/square",           # becomes returns/var
    "val/vpred",                # new values
    "val/error",                # squared, against the returns; with returns/var it gives val/var_explained
    "val/clipfrac",
    "val/mean",                 # recorded values
    "val/square",               # becomes val/var
)

# ------------------------------------------------ the trainer: from here on this file needs its neighbours
from transformers import GenerationConfig

import checks
import distributed
import optim
import reference
import rewards
from checks import BadNumbers           # users import it from here


class PPOTrainer:
    """Trains a policy: generate() samples responses, you score them, step() updates the policy.

    config: PPOConfig. model: AutoModelForCausalLMWithValueHead. ref_model: the same class, or None for a
    frozen copy that shares `num_shared_layers` layers. tokenizer: of the model. dataset: then `.dataloader`
    gives shuffled batches of batch_size rows, joined by data_collator. optimizer: default Adam over the
    trainable parameters. lr_scheduler: stepped once per step(). accelerator: default: distributed.start().
    """

    def __init__(self, config=None, model=None, ref_model=None, tokenizer=None, dataset=None, optimizer=None,
                 data_collator=None, num_shared_layers=None, lr_scheduler=None, accelerator=None):
        checks.check_inputs(config, model, ref_model, tokenizer, num_shared_layers, optimizer, lr_scheduler)
        self.config, self.tokenizer, self.lr_scheduler = config, tokenizer, lr_scheduler
        if tokenizer.pad_token is None:
            logger.warning("the tokenizer has no pad token: using its EOS, %r (padding is masked by length)",
                           tokenizer.eos_token)
            tokenizer.pad_token = tokenizer.eos_token
        folder = "runs" if config.log_with else None
        self.accelerator = accelerator or distributed.start(log_with=config.log_with, project_dir=folder)
        self.reduce = distributed.sum_over_processes(self.accelerator)
        self.together = functools.partial(distributed.together, self.accelerator)       # for checks.py
        self.prepare(model, ref_model, optimizer, num_shared_layers)
        self.dataloader = self.make_dataloader(dataset, data_collator) if dataset is not None else None
        if config.adap_kl_ctrl:
            self.kl_ctl = rewards.AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        else:
            self.kl_ctl = rewards.FixedKLController(config.init_kl_coef)
        self.score_moments = rewards.RunningMoments()
        self.steps_done, self.where = 0, "before the first step"       # `where` is for error messages
        if config.log_with is not None:
            self.init_trackers()

    def init_trackers(self, **arguments):       # {tracker: settings}
        config, folder = self.config, self.accelerator.logging_dir
        settings = {k: v for k, v in vars(config).items() if isinstance(v, (int, float, str))}
        trackers = distributed.tracker_arguments(config.log_with, folder, arguments)
        self.accelerator.init_trackers(config.tracker_project_name, settings, trackers)

    def prepare(self, model, ref_model, optimizer, num_shared_layers):
        """Set self.model, ref_model and optimizer: on their device, without dropout, wrapped for this run."""
        config = self.config
        if ref_model is None:
            with distributed.whole_weights(model):
                ref_model = reference.create_reference_model(model, num_shared_layers)
        disable_dropout(model)
        disable_dropout(ref_model)
        if config.gradient_checkpointing:
            # Non-reentrant: it also works where the first layers are frozen and no input needs a gradient.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if optimizer is None:
            parameters = optim.trainable_parameters(model, config.value_learning_rate)
            optimizer = optim.make_optimizer("adam", parameters, config.learning_rate)
        # not the scheduler, which accelerate would step once per process
        self.model, self.optimizer = distributed.prepare_model(
            self.accelerator, model, optimizer, config.mini_batch_size, config.max_grad_norm,
            config.gradient_accumulation_steps)
        self.ref_model = distributed.prepare_reference(self.accelerator, ref_model)
        self.rounded_reference = distributed.quantized(ref_model)
        self.language_model = distributed.unwrap(self.model)       # with its value head, without any wrapper
        self.first_bad_weight = functools.partial(distributed.first_not_finite, self.model)

    def make_dataloader(self, dataset, data_collator):
        """-> shuffled batches of batch_size rows for this process; rows that fill no batch are left out."""
        needed = self.config.batch_size * self.accelerator.num_processes
        if len(dataset) < needed:
            raise ValueError(f"the dataset has {len(dataset)} rows but a step takes {needed} (batch_size x "
                             "processes); give more rows or a smaller batch_size")
        loader = torch.utils.data.DataLoader(dataset, batch_size=self.config.batch_size, shuffle=True,
                                             drop_last=True, collate_fn=data_collator)
        return self.accelerator.prepare(loader)

    # ---------------------------------------------------------------------------------------- (a) rollout

    @torch.no_grad()
    def generate(self, query_tensor, length_sampler=None, batch_size=4, return_prompt=True,
                 generate_ref_response=False, allow_other_distribution=False, **generation_kwargs):
        """Sample a response to each query: pure sampling at config.temperature, as sampling_arguments says.

        query_tensor: (Q,) -> (1, Q + R); a list of (Q_i,) -> a list of (Q_i + R_i,), each cut after its first
        EOS. batch_size: queries at once. length_sampler: callable that gives max_new_tokens of a batch.
        return_prompt=False leaves the prompt out. generate_ref_response: -> (responses, the reference's).
        ValueError: a setting that changes the distribution, or more tokens than the model has positions.
        BadNumbers, on this process alone: logits that are not finite.
        """
        single = torch.is_tensor(query_tensor)
        queries = [query_tensor] if single else query_tensor
        gather = self.config.ds3_gather_for_generation
        arguments = sampling_arguments(self.config.temperature, generation_kwargs, allow_other_distribution)
        batch_count, results = -(-len(queries) // batch_size), []
        for model in (self.model, self.ref_model) if generate_ref_response else (self.model,):
            responses = []
            unwrapped = distributed.unwrapped_for_generation(self.accelerator, model, gather, batch_count)
            with unwrapped as (bare, arguments["synced_gpus"]):
                for start in range(0, len(queries), batch_size):
                    if length_sampler is not None:
                        arguments["max_new_tokens"] = length_sampler()
                    rows = slice(start, start + batch_size)
                    arguments["logits_processor"] = checks.watch_rollout(self, bare, queries, rows, arguments)
                    responses += self.generate_batch(bare, queries[rows], arguments)
            if return_prompt:
                responses = [torch.cat([q.to(r.device), r]) for q, r in zip(queries, responses)]
            results.append(responses[0].unsqueeze(0) if single else responses)
        return tuple(results) if generate_ref_response else results[0]

    def generate_batch(self, language_model, queries, arguments):
        """One left-padded batch: list of queries (Q_i,) -> list of responses (R_i,), with their EOS."""
        arguments = {"eos_token_id": self.tokenizer.eos_token_id, "pad_token_id": self.tokenizer.pad_token_id,
                     **arguments}
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        device, inner = self.accelerator.device, language_model.pretrained_model
        input_ids = pad(list(queries), padding_value=self.tokenizer.pad_token_id).to(device)          # (B, Q)
        attention_mask = pad([torch.ones_like(q) for q in queries]).to(device)                        # (B, Q)
        # Many models ship a top_k, say, which `generate` would use where `arguments` names none.
        shipped, inner.generation_config = inner.generation_config, GenerationConfig()
        language_model.eval()
        try:
            with self.accelerator.autocast():
                tokens = inner.generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)
        finally:
            inner.generation_config = shipped
        responses = tokens[:, input_ids.shape[1]:]                                                    # (B, R)
        is_eos = torch.isin(responses, torch.as_tensor(arguments["eos_token_id"], device=device)).long()
        lengths = (is_eos.cumsum(1) - is_eos == 0).sum(1)       # of the tokens that have no EOS before them
        return [row[:n] for row, n in zip(responses, lengths.tolist())]

    # ---------------------------------------------------------------------------------------------- step

    def step(self, queries, responses, scores, response_masks=None):
        """One PPO step on B = batch_size responses. -> dict of statistics, see docs/metrics.md.

        queries, responses: lists of B tensors (Q_i,), (R_i,) of token ids. scores: B numbers, or B tensors
        (R_i,), one per token. response_masks: B tensors (R_i,), 0 = not chosen by the policy (a tool's text).
        ValueError: wrong arguments. BadNumbers: NaN or infinity, which has reached neither weights nor
        optimizer; optimizer steps that this call took before it stay.
        """
        config, device, times = self.config, self.accelerator.device, [time.perf_counter()]
        checks.check_batch(self, queries, responses, scores, response_masks)
        batch = collate([q.to(device) for q in queries], [r.to(device) for r in responses], response_masks,
                        self.tokenizer.pad_token_id)
        mask, scaling = batch["mask"], config.use_score_scaling                                     # (B, R)
        moments = copy.copy(self.score_moments)     # kept at the end, so that a refused batch leaves no trace
        token_scores = [torch.as_tensor(s, dtype=torch.float32, device=device).view(-1) for s in scores]
        batch["raw_scores"] = torch.stack([s.sum() for s in token_scores])                          # (B,)
        if scaling:
            moments.update(batch["raw_scores"], self.reduce)
        batch["scores"] = rewards.process_scores(batch["raw_scores"], moments if scaling else None,
                                                 config.use_score_norm, config.score_clip)          # (B,)
        # (a) rollout, second part: log-probs and values of these tokens, and the reference's log-probs
        batch["logprobs"], batch["values"], batch["ref_logprobs"], batch["kl"] = self.record(batch)
        times.append(time.perf_counter())
        # (c) rewards: the KL penalty at each token, the score at the last
        batch["rewards"], batch["non_score_reward"] = rewards.token_rewards(
            batch["scores"], batch["kl"], mask, self.kl_ctl.value, token_scores)
        checks.check_numbers(self, batch)       # before a mean over all processes spreads what is not finite
        if config.whiten_rewards:
            batch["rewards"] = masked_whiten(batch["rewards"], mask, shift_mean=False, reduce=self.reduce)
        times.append(time.perf_counter())
        # (d) advantages: how much better than expected each token was. Whitened, so that the policy's step
        # does not depend on the scale of the rewards; the values have to learn that scale.
        unwhitened, batch["returns"] = gae(batch["rewards"], batch["values"], mask, config.gamma, config.lam,
                                           config.lam_value)
        batch["advantages"] = masked_whiten(unwhitened, mask, reduce=self.reduce)
        times.append(time.perf_counter())
        # (e) update: the recorded log-probs and values stay, however far the policy moves
        optimizer_steps, ratios = self.update(batch)
        times.append(time.perf_counter())
        # (f) book-keeping: the KL coefficient changes last, so that the one in use is logged
        stats = {**self.update_stats(optimizer_steps), **self.batch_stats(batch),
                 "ppo/policy/ratio": ratios.cpu(), "ppo/learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.kl_ctl.update(stats["objective/kl"], config.batch_size * self.accelerator.num_processes)
        self.score_moments = moments
        self.count_step()
        times.append(time.perf_counter())
        phases = ("forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats")
        stats.update({f"time/ppo/{name}": end - start for name, start, end in zip(phases, times, times[1:])})
        return {**stats, "time/ppo/total": times[-1] - times[0]}

    def count_step(self):
        """Count a step. To go on after BadNumbers call it yourself: the schedule is to end on time."""
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.steps_done += 1

    def mini_batches(self, batch, index):
        """Row numbers `index` (n,) -> mini-batches: (row numbers (b,), these rows of every tensor)."""
        for part in index.split(self.config.mini_batch_size):
            yield part, {name: tensor[part] for name, tensor in batch.items()}

    def forward(self, model, rows, keep_logits=False):
        """A mini-batch -> logprobs, values, entropy, each (b, R), at config.temperature, 0 outside the mask.

        keep_logits: logits (b, R, V) in place of the entropy. The exact KL needs those of both models.
        """
        with self.accelerator.autocast():       # the reference too: both have to compute in one precision
            logits, _, values = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"],
                                      logit_positions=rows["positions"], use_cache=False)
        logits, ignored = logits / self.config.temperature, rows["mask"] == 0                      # (b, R, V)
        logprobs = logprobs_from_logits(logits, rows["labels"]).masked_fill(ignored, 0.0)
        rest = logits if keep_logits else entropy_from_logits(logits).masked_fill(ignored, 0.0)
        return logprobs, values.masked_fill(ignored, 0.0), rest

    @torch.no_grad()
    def record(self, batch):
        """-> logprobs, values, ref_logprobs, kl, each (B, R) and 0 outside the mask."""
        full = self.config.kl_penalty == "full"
        all_rows, columns = torch.arange(len(batch["mask"]), device=batch["mask"].device), []        # (B,)
        self.model.eval()
        for _, rows in self.mini_batches(batch, all_rows):
            logprobs, values, rest = self.forward(self.model, rows, keep_logits=full)
            ref_logprobs, _, ref_rest = self.forward(self.ref_model, rows, keep_logits=full)
            if full:        # of the logits, where the other kinds need only the log-probs
                kl = rewards.full_kl(rest, ref_rest).masked_fill(rows["mask"] == 0, 0.0)
            else:
                kl = rewards.kl_penalty(logprobs, ref_logprobs, self.config.kl_penalty)
            columns.append(torch.stack([logprobs, values, ref_logprobs, kl]))                      # (4, b, R)
        return torch.cat(columns, 1).unbind(0)

    # -------------------------------------------------------------------------------------- (e) update

    def update(self, batch):
        """ppo_epochs passes over the batch. -> list of optimizer_step's sums, ratios (tokens,)."""
        if self.config.optimize_device_cache:       # the update needs blocks of other sizes than the rollout
            distributed.clear_device_cache(self.accelerator.device)
        self.model.train()    # for gradient checkpointing, which is off in eval mode; every dropout rate is 0
        self.language_model.v_head.alone = self.steps_done < self.config.critic_warmup_steps
        optimizer_steps, ratios = [], []
        rows_per_step = self.config.mini_batch_size * self.config.gradient_accumulation_steps
        for epoch in range(self.config.ppo_epochs):
            # numpy's global generator, as in TRL: the same seed gives the same mini-batches
            order = torch.from_numpy(np.random.permutation(self.config.batch_size)).to(batch["mask"].device)
            for index in order.split(rows_per_step):
                self.where = (f"step {self.steps_done + 1}, epoch {epoch + 1}, "
                              f"optimizer step {len(optimizer_steps) + 1}")
                sums, ratio = self.optimizer_step(batch, index, first=not optimizer_steps)
                optimizer_steps.append(sums)
                ratios.append(ratio)
            # By the last optimizer step's sums over all processes: so all of them stop, or none does.
            moved = sums["policy/policykl"] / max(1, sums["tokens"])
            if self.config.early_stopping and moved > 1.5 * self.config.target_kl:
                break
        if self.config.optimize_device_cache:
            distributed.clear_device_cache(self.accelerator.device)
        return optimizer_steps, torch.cat(ratios)

    def optimizer_step(self, batch, index, first):
        """One optimizer step on the rows `index` (n,), in mini-batches.

        -> {term: sum over the tokens of all processes}, with "tokens", "skipped" and "grad_norm"; and the
        ratios (tokens,) of this process.
        """
        # The loss is a mean over the tokens of the whole optimizer step and of all processes. A mean of the
        # mini-batches' means would weigh tokens of short responses more: the weights' change was 25 % off.
        config, collected = self.config, []
        tokens = float(self.reduce(batch["mask"][index].sum().float()))
        count = -(-len(index) // config.mini_batch_size)
        for number, (part, rows) in enumerate(self.mini_batches(batch, index), start=1):
            with distributed.accumulate(self.accelerator, self.model, last=number == count) as backward:
                loss, terms, ratio = self.minibatch_loss(rows, first)
                # times the processes: gradients are averaged over them, but `tokens` is their sum
                backward(loss / max(1.0, tokens) * self.accelerator.num_processes)
            collected.append((terms, ratio, part))
        terms, ratios, order = zip(*collected)
        terms = torch.cat(terms, 1)                                                               # (TERMS, n)
        sums = dict(zip(TERMS, self.reduce(terms.sum(1)).tolist()))
        checks.check_update(self, sums, terms, torch.cat(order))
        norm = None         # no step is taken
        # By sums over all processes: so all of them take this step, or none does.
        if tokens > 0 and sums["policy/ratio_mean"] / tokens <= config.ratio_threshold:
            norm = distributed.take_step(self.accelerator, self.model, self.optimizer, config.max_grad_norm)
        checks.check_gradients(self, norm, index)
        taken = norm is not None and np.isfinite(norm)
        if not taken:
            self.drop_gradients()
        sums.update(tokens=tokens, skipped=float(not taken), grad_norm=norm if taken else 0.0)
        return sums, torch.cat(ratios)

    def drop_gradients(self):
        """Forget the gradients of a step that is not taken."""
        distributed.drop_step(self.accelerator, self.model, self.optimizer)

    def minibatch_loss(self, rows, first):
        """-> loss () summed over tokens, TERMS by sample (TERMS, b), ratios (tokens,). first: of a batch."""
        config, mask = self.config, rows["mask"]                                                      # (b, R)
        advantages, values, returns = rows["advantages"], rows["values"], rows["returns"]    # (b, R) each
        new_logprobs, new_values, entropy = self.forward(self.model, rows)
        log_ratio = (new_logprobs - rows["logprobs"]) * mask
        checks.check_ratio(self, log_ratio, mask, first)
        # Outside the mask the new log-probs are made equal to the old ones: 0 times infinity would be NaN.
        pg_loss, ratio, clipped = policy_loss(rows["logprobs"] + log_ratio, rows["logprobs"], advantages,
                                              config.cliprange)
        vf_loss, vf_clipped = value_loss(new_values, values, returns, config.cliprange_value)
        loss = ((pg_loss * (not self.language_model.v_head.alone) + config.vf_coef * vf_loss) * mask).sum()
        with torch.no_grad():
            # in the order of TERMS
            terms = (pg_loss, vf_loss, entropy, 0.5 * log_ratio.square(), -log_ratio, clipped, advantages,
                     ratio, returns, returns.square(), new_values, (new_values - returns).square(),
                     vf_clipped, values, values.square())
            # float64, because variances are differences of these sums
            sums = torch.stack([(term.double() * mask).sum(1) for term in terms])                 # (TERMS, b)
        return loss, sums, ratio.detach()[mask.bool()]

    # ------------------------------------------------------------------------------ (f) book-keeping

    def update_stats(self, optimizer_steps):
        """Sums of each optimizer step -> statistics: means over tokens, then over optimizer steps."""
        per_step = {name: np.array([sums[name] for sums in optimizer_steps]) for name in optimizer_steps[0]}
        tokens = per_step["tokens"]                                                       # (optimizer steps,)
        mean = {name: per_step[name] / np.maximum(tokens, 1) for name in TERMS}
        bessel = tokens / np.maximum(tokens - 1, 1)         # sample variances divide by n - 1
        mean["returns/var"] = (mean.pop("returns/square") - mean["returns/mean"] ** 2) * bessel
        mean["val/var"] = (mean.pop("val/square") - mean["val/mean"] ** 2) * bessel
        mean["loss/total"] = mean["loss/policy"] + self.config.vf_coef * mean["loss/value"]
        stats = {f"ppo/{name}": float(value.mean()) for name, value in mean.items()}
        variance = stats["ppo/returns/var"]
        # 1 - error / variance: 1 = the values predict the returns exactly, 0 = no better than their mean
        stats["ppo/val/var_explained"] = 1 - stats["ppo/val/error"] / variance if variance > 0 else 0.0
        stats["ppo/skipped_steps"] = float(per_step["skipped"].sum())
        stats["ppo/optimizer_steps"] = float(len(tokens))
        stats["ppo/grad_norm"] = float(per_step["grad_norm"].mean())
        return stats

    def batch_stats(self, batch):
        """Statistics of the responses of all processes; those per token are of this process."""
        raw_scores, scores = batch["raw_scores"], batch["scores"]                              # (B,) each
        mask, kl = batch["mask"], batch["kl"].sum(1)                                           # (B, R), (B,)
        response_lengths = batch["response_lengths"].float()
        query_lengths = batch["lengths"] - response_lengths                                    # (B,)
        means = {"objective/kl": kl, "objective/entropy": -batch["logprobs"].sum(1),
                 "ppo/mean_scores": scores, "ppo/mean_raw_scores": raw_scores,
                 "tokens/queries_len_mean": query_lengths, "tokens/responses_len_mean": response_lengths}
        stds = {"ppo/std_scores": scores, "ppo/std_raw_scores": raw_scores,
                "tokens/queries_len_std": query_lengths, "tokens/responses_len_std": response_lengths}
        ones = torch.ones_like(scores)
        stats = {name: float(masked_mean(value, ones, self.reduce)) for name, value in means.items()}
        for name, value in stds.items():
            stats[name] = float(masked_var(value, ones, self.reduce).sqrt())
        stats["objective/kl_coef"] = self.kl_ctl.value
        stats["ppo/mean_non_score_reward"] = float(masked_mean(batch["non_score_reward"], mask, self.reduce))
        for name, value in (("objective/kl_dist", kl), ("tokens/queries_dist", query_lengths),
                            ("tokens/responses_dist", response_lengths)):
            stats[name] = self.accelerator.gather(value).cpu()                 # (B x processes,)
        stats["objective/logprobs"] = batch["logprobs"].cpu()
        stats["objective/ref_logprobs"] = batch["ref_logprobs"].cpu()
        stats["ppo/policy/advantages"] = batch["advantages"][mask.bool()].cpu()
        if stats["objective/kl"] < -1.0:
            logger.warning("the KL to the reference is %.2f, and a KL is never below 0: look for a sampler "
                           "that differs from the policy", stats["objective/kl"])
        if self.steps_done == 0 and self.rounded_reference:
            logger.warning("the reference is a rounded copy: before any update the KL to it is already %.4f "
                           "nats per response", stats["objective/kl"])
        return stats

    def log_stats(self, stats, batch, rewards, columns_to_log=("query", "response")):
        """Send a step's statistics to the tracker; to wandb also a table of texts and rewards.

        batch: {"query": texts, "response": texts} of this process; rewards: its B scores.
        """
        if self.config.log_with is None:
            return
        sums = [float(torch.as_tensor(reward).sum()) for reward in rewards]
        rewards = distributed.gather_lists(self.accelerator, sums)
        stats = {**stats, "env/reward_mean": np.mean(rewards), "env/reward_std": np.std(rewards),
                 "env/reward_dist": np.array(rewards)}
        arrays = {name: value.detach().float().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)
                  for name, value in stats.items()}
        # Of several numbers wandb makes a histogram; accelerate's tensorboard leaves them out.
        logs = {name: array.item() if array.size == 1 else array for name, array in arrays.items()}
        if self.config.log_with == "wandb":
            import wandb
            columns = [distributed.gather_lists(self.accelerator, batch[name]) for name in columns_to_log]
            table = list(zip(*columns, rewards))
            logs["game_log"] = wandb.Table(columns=[*columns_to_log, "reward"], data=table)
        self.accelerator.log(logs, step=self.steps_done)

    # ------------------------------------------------------------------------------------------ saving

    def save_pretrained(self, folder, **kwargs):
        """Write policy, value head and tokenizer for from_pretrained. All processes must call it.

        kwargs go to transformers' save_pretrained, such as max_shard_size.
        """
        weights = distributed.full_state_dict(self.accelerator, self.model)
        with distributed.writes(self.accelerator):
            if self.accelerator.is_main_process:
                self.language_model.save_pretrained(folder, state_dict=weights, **kwargs)
                # On a full disk the tokenizers library raises a plain Exception, and Python an OSError,
                # which `writes` expects. So Python writes the large file first.
                if self.tokenizer.is_fast:
                    text = self.tokenizer.backend_tokenizer.to_str(pretty=True)
                    (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")
                self.tokenizer.save_pretrained(folder)

    def state_dict(self):
        """All that a step changes; under ZeRO without weights and optimizer, which DeepSpeed saves."""
        scaler = self.accelerator.scaler        # fp16's
        state = {"steps_done": self.steps_done, "kl_coef": self.kl_ctl.value,
                 "score_moments": self.score_moments.state_dict(),
                 "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
                 "scaler": None if scaler is None else scaler.state_dict(),
                 "random": distributed.random_state(self.accelerator.device)}
        if distributed.zero_stage(self.accelerator) == 0:
            state["model"] = self.language_model.state_dict()
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state):
        """The inverse of state_dict, in place, so that shared layers stay shared."""
        if "model" in state:
            self.language_model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.steps_done, self.kl_ctl.value = state["steps_done"], state["kl_coef"]
        self.score_moments.load_state_dict(state["score_moments"])
        if "random" in state:
            distributed.set_random_state(state["random"], self.accelerator.device)


if __name__ == "__main__":
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])                                                 # (2, 4)
    token_rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, -1.0, 0.0, 0.0]])
    advantages, _ = gae(token_rewards, torch.zeros(2, 4), mask, gamma=1.0, lam=0.95)
    print("advantages\n", advantages.numpy().round(3))
    advantages = masked_whiten(advantages, mask)
    logits, labels = torch.randn(2, 4, 9, requires_grad=True), torch.randint(0, 9, (2, 4))
    logprobs = logprobs_from_logits(logits, labels).detach()                                          # (2, 4)
    for step in range(3):
        loss, ratio, clipped = policy_loss(logprobs_from_logits(logits, labels), logprobs, advantages, 0.2)
        gradient, = torch.autograd.grad(masked_mean(loss, mask), logits)
        logits = (logits - 5.0 * gradient).detach().requires_grad_()
        print(f"step {step}: loss {masked_mean(loss, mask):+.4f}, ratio {masked_mean(ratio, mask):.3f}, "
              f"clipped {masked_mean(clipped, mask):.0%}, entropy {entropy_from_logits(logits).mean():.3f}")
