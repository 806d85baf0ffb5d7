"""What scripts written for TRL's classic PPOTrainer import: change their import lines, and they run.

    from trl_names import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer, set_seed

Why: such scripts set fields of PPOConfig that say nothing about PPO, read attributes, call helpers of
trl.core, and sample with top_k. The core has none of that. Here each name does what it did, or is refused in
one sentence that says what to write instead. docs/migrating.md lists the settings, and what is refused.
Source: the public interface of TRL 0.11.4 (Apache-2.0); nucleus sampling: Holtzman et al. (arXiv 1904.09751).
Differs from TRL 0.11.4 in: top_k and top_p are settings of PPOConfig, and the truncated distribution that is
sampled is also the one that is trained. The rest is in docs/differences.md.
Shapes: as in ppo_core.py.
Copy me: needs speed.py, adapters.py and what these need. Tested by tests/test_trl_names.py.
"""
import inspect
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch
from accelerate.utils import ProjectConfiguration
from transformers.utils import is_torch_npu_available as is_npu_available
from transformers.utils import is_torch_xpu_available as is_xpu_available

import adapters
import distributed
import ppo_core
from ppo_core import BadNumbers, LengthSampler, entropy_from_logits, knob, masked_whiten, sampling_arguments
from reference import create_reference_model
from rewards import AdaptiveKLController, FixedKLController
from speed import FastPPOTrainer

# ------------------------------------------------------------------------------------- functions of trl.core

set_seed = distributed.seed_everything


def logprobs_from_logits(logits, labels, gather=True):
    """(B, R, V), (B, R) -> (B, R); gather=False: of all tokens, (B, R, V)."""
    return ppo_core.logprobs_from_logits(logits, labels) if gather else logits.log_softmax(-1)


def masked_mean(values, mask, axis=None):
    return (values * mask).sum(axis) / mask.sum(axis)       # axis=None: over all


def masked_var(values, mask, unbiased=True):
    """Of all values whose mask is 1; unbiased divides by one less than their number."""
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return variance * mask.sum() / (mask.sum() - 1) if unbiased else variance


def whiten(values, shift_mean=True):
    """(B, R) -> (B, R) with variance 1, and mean 0 if shift_mean."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


def clip_by_value(x, tensor_min, tensor_max):
    return torch.max(torch.min(x, tensor_max), tensor_min)


@torch.no_grad()
def respond_to_batch(model, queries, txt_len=20, top_k=0, top_p=1.0):
    """queries (B, Q), all of one length -> responses (B, txt_len), sampled without a cache, past any EOS."""
    ids = queries
    for _ in range(txt_len):
        logits = model(ids)[0][:, -1:]                                                             # (B, 1, V)
        if top_k > 0 or top_p < 1:
            logits = logits.masked_fill(~kept_tokens(logits, None, top_k, top_p), -torch.inf)
        ids = torch.cat([ids, torch.multinomial(logits[:, 0].softmax(-1), 1)], 1)
    return ids[:, -txt_len:]


# Names of TRL that are not here, and what to do instead.
MISSING = {"TextEnvironment": "run the tool yourself and give step() response_masks",
           "TextHistory": "keep the tokens in lists", "build_bert_batch_from_txt": "use the tokenizer",
           "BestOfNSampler": "sample several responses, score them, and take the best",
           "PPODecorators": "set optimize_device_cache in PPOConfig",
           "PreTrainedModelWrapper": "use AutoModelForCausalLMWithValueHead",
           "top_k_top_p_filtering": "set top_k and top_p in PPOConfig",
           **dict.fromkeys(("flatten_dict", "stack_dicts", "stats_to_np", "convert_to_scalar", "add_suffix",
                            "pad_to_size"), "step() returns plain numbers, in one flat dict"),
           **dict.fromkeys((f"{name}{kind}" for name in ("DPO", "SFT", "Reward")
                            for kind in ("Trainer", "Config")), "keep TRL for it")}


def __getattr__(name):
    """Called for a name that is not here."""
    if name in MISSING:
        raise ImportError(f"{name} is not there; {MISSING[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --------------------------------------------------------------------------------------------------- models


class AutoModelForCausalLMWithValueHead(adapters.AutoModelForCausalLMWithValueHead):
    """The class of adapters.py; what TRL would have understood otherwise is refused."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if "reward_adapter" in kwargs:
            raise ValueError("reward_adapter is given, but a model has one adapter here; load the reward "
                             "model as a model of its own")
        try:
            return super().from_pretrained(*args, **kwargs)
        except TypeError as error:      # the model's class gets every keyword that is left
            unknown = re.search(r"unexpected keyword argument ('\w+')", str(error))
            if unknown is None:
                raise
            raise ValueError(f"from_pretrained does not know the keyword {unknown[1]}; leave it out"
                             ) from error
        except RuntimeError as error:
            if "device_map" not in kwargs or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"device_map is {kwargs['device_map']!r}, which this machine cannot do "
                             f"({reason}); leave device_map out") from error

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
        if torch.is_tensor(past_key_values):
            raise ValueError("the third argument is a tensor, but attention_mask is the second one here (in "
                             "TRL it was the third); give it by name")
        return super().forward(input_ids, attention_mask, past_key_values, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        raise ValueError("push_to_hub is not there; upload what save_pretrained wrote")


class AutoModelForSeq2SeqLMWithValueHead:
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        raise ValueError("encoder-decoder models cannot be trained; use a causal language model and "
                         "AutoModelForCausalLMWithValueHead")


# ------------------------------------------------------------------------------------------------- settings


@dataclass
class PPOConfig(ppo_core.PPOConfig):
    """ppo_core.PPOConfig, every other field of TRL 0.11.4's, and top_k and top_p.

    ValueError: the settings cannot work, or would do nothing.
    """

    top_k: int = knob(0, "sample from the k likeliest tokens, and train that distribution; 0 = from all")
    top_p: float = knob(1.0, "the same with the likeliest tokens that have this probability together")
    seed: Optional[int] = knob(0, "of the trainer's draws; None = they come from the global generators")
    tracker_project_name: str = knob("trl", "project of the run in the tracker")
    # ---- information that a script reads back
    reward_model: Optional[str] = knob("sentiment-analysis:lvwerra/distilbert-imdb", "any text")
    steps: int = knob(20000, "total_ppo_epochs is this / batch_size, rounded up; the loop is yours")
    exp_name: Optional[str] = knob(None, "default: the name of the script")
    task_name: Optional[str] = knob(None, "any text")
    query_dataset: str = knob("stanfordnlp/imdb", "any text")
    dataset_num_proc: Optional[int] = knob(None, "any number")
    compare_steps: int = knob(1, "any number; it was used with push_to_hub_if_best_kwargs alone")
    # ---- these do what they did
    remove_unused_columns: bool = knob(True, "of a `datasets` dataset, those that the model cannot take")
    forward_batch_size: Optional[int] = knob(None, "older name of mini_batch_size, which it replaces")
    tracker_kwargs: Optional[dict] = knob(None, "for the tracker, such as {'wandb': {'name': 'run 1'}}")
    accelerator_kwargs: Optional[dict] = knob(None, "for accelerate's Accelerator")
    project_kwargs: Optional[dict] = knob(None, "for accelerate's ProjectConfiguration")
    # ---- this must be empty
    push_to_hub_if_best_kwargs: Optional[dict] = knob(None, "nothing is pushed")
    # ---- set by PPOConfig and PPOTrainer, whatever is given
    backward_batch_size: Optional[int] = knob(None, "responses per optimizer step and process")
    global_backward_batch_size: Optional[int] = knob(None, "and of all processes")
    global_batch_size: Optional[int] = knob(None, "responses per step() of all processes")
    world_size: Optional[int] = knob(None, "processes")
    is_encoder_decoder: Optional[bool] = knob(None, "always False")
    is_peft_model: Optional[bool] = knob(None, "whether the model has adapters")

    def __post_init__(self):
        for name in ("tracker_kwargs", "accelerator_kwargs", "project_kwargs", "push_to_hub_if_best_kwargs"):
            setattr(self, name, dict(getattr(self, name) or {}))
        if self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        if self.mini_batch_size is None:
            self.mini_batch_size = self.batch_size
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        super().__post_init__()
        if self.push_to_hub_if_best_kwargs:
            raise ValueError("push_to_hub_if_best_kwargs is given, but nothing is pushed; upload what "
                             "save_pretrained wrote")
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder is True, but encoder-decoder models cannot be trained; use "
                             "a causal language model")
        self.top_k, self.top_p = self.top_k or 0, 1.0 if self.top_p is None else self.top_p
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k is {self.top_k} and top_p is {self.top_p}; use at least 0 (0 = off), "
                             "and a number above 0 and up to 1 (1 = off)")
        self.exp_name = self.exp_name or Path(sys.argv[0]).stem
        self.total_ppo_epochs = -(-self.steps // self.batch_size)

    @property
    def truncates(self):
        """Whether tokens are sampled from a part of the vocabulary."""
        return self.top_k > 0 or self.top_p < 1

    def to_dict(self):
        return dict(vars(self))


# ------------------------------------------------------------------------------------------- top_k and top_p


def kept_tokens(logits, labels=None, top_k=0, top_p=1.0):
    """The tokens that top_k and top_p leave to be sampled: (b, R, V), labels (b, R) -> bool (b, R, V).

    The same as in transformers, also where logits are equal. A label is always among them: it was sampled,
    and another pass may round its logit a little differently.
    """
    ordered, order = logits.sort(-1)                    # the likeliest last                       # (b, R, V)
    first = ordered.shape[-1] - min(int(top_k) or ordered.shape[-1], ordered.shape[-1])
    kept = ordered >= ordered[..., first:first + 1]     # also those that are as likely as the last of k
    probabilities = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
    if top_p < 1:       # the unlikeliest go, which have at most 1 - top_p together; the likeliest stays
        kept &= probabilities.cumsum(-1) > 1 - top_p
        kept[..., -1] = True
    kept = torch.zeros_like(kept).scatter(-1, order, kept)
    return kept if labels is None else kept.scatter(-1, labels.unsqueeze(-1), True)


# --------------------------------------------------------------------------------------------- the trainer

# Method of TRL's PPOTrainer that a subclass may define: the method to override here instead.
TRL_METHODS = {"batched_forward_pass": "record", "prepare_model_inputs": "record", "loss": "minibatch_loss",
               "compute_rewards": "step, or give step() a score per token", "compute_advantages": "step",
               "train_minibatch": "optimizer_step", "prepare_dataloader": "make_dataloader",
               "record_step_stats": "batch_stats", "gather_stats": "batch_stats", "_early_stop": "update",
               "_kl_penalty": "record", "_generate_batched": "generate_batch", "_step_safety_checker": "step"}
# What a generation config may say that is not about the distribution: the values without any effect.
NO_EFFECT = {**dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits",
                              "return_dict_in_generate"), (None, False)),
             "early_stopping": (None, True, False, "never"), "length_penalty": (None, 1.0)}


class PPOTrainer(FastPPOTrainer):
    """FastPPOTrainer with the arguments, attributes and methods that scripts for TRL use."""

    def __init__(self, config=None, model=None, ref_model=None, tokenizer=None, dataset=None, optimizer=None,
                 data_collator=None, num_shared_layers=None, lr_scheduler=None, training_data_collator=None,
                 accelerator=None):
        if not isinstance(config, PPOConfig):
            raise ValueError(f"config is a {type(config).__module__}.{type(config).__name__}; give a "
                             "trl_names.PPOConfig")
        if training_data_collator is not None:
            raise ValueError("training_data_collator is given, but ppo_core.collate pads the batch; leave it "
                             "out")
        name = next((name for name in TRL_METHODS if hasattr(self, name)), None)
        if name is not None:
            raise ValueError(f"{type(self).__name__} defines {name}, which nothing would call; override "
                             f"{TRL_METHODS[name]}")
        if accelerator is None:
            project = ProjectConfiguration(**{"project_dir": "runs", **config.project_kwargs})
            accelerator = distributed.start(
                **{"log_with": config.log_with, "project_config": project, **config.accelerator_kwargs})
        super().__init__(config, model, ref_model, tokenizer, dataset, optimizer, data_collator,
                         num_shared_layers, lr_scheduler, accelerator)
        processes = config.world_size = self.accelerator.num_processes
        config.global_batch_size = config.batch_size * processes
        config.global_backward_batch_size = config.backward_batch_size * processes
        config.is_encoder_decoder, config.is_peft_model = False, model.is_peft_model
        self.current_device, self.is_distributed = self.accelerator.device, processes > 1
        self.own_random = None
        with self.own_draws():          # seeds them
            pass

    def init_trackers(self):
        super().init_trackers(**self.config.tracker_kwargs)

    def make_dataloader(self, dataset, data_collator):
        if self.config.remove_unused_columns and hasattr(dataset, "remove_columns"):    # of `datasets`
            forward = type(self.language_model).forward
            used = {*inspect.signature(forward).parameters, "label", "query", "response"}
            dataset = dataset.remove_columns([name for name in dataset.column_names if name not in used])
        loader = super().make_dataloader(dataset, data_collator)
        if self.config.seed is not None:
            # With several processes accelerate wraps the batch sampler of the DataLoader.
            batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)
            batches.sampler.generator = torch.Generator().manual_seed(self.config.seed)
        return loader

    def generate(self, query_tensor, length_sampler=None, batch_size=4, return_prompt=True,
                 generate_ref_response=False, allow_other_distribution=False, remove_padding=True,
                 generation_config=None, **generation_kwargs):
        """As in ppo_core, and: generation_config: of transformers; its entries are taken as keywords.

        eos_token_id: a number or several; by default that of the model's generation config. The responses
        of a list of queries end at the tokenizer's EOS too. remove_padding=False: padded to one length.
        """
        if generation_config is not None:
            entries = generation_config.to_diff_dict().items()
            entries = {k: v for k, v in entries if k != "transformers_version" and not k.startswith("_")}
            generation_kwargs = {**entries, **generation_kwargs}
        if "attention_mask" in generation_kwargs:
            raise ValueError("generate(..., attention_mask=...) is made from the lengths of the queries, "
                             "which hold 0 tokens of padding; leave it out")
        generation_kwargs = {name: value for name, value in generation_kwargs.items()
                             if value not in NO_EFFECT.get(name, ())}
        single, language_model = torch.is_tensor(query_tensor), self.language_model.pretrained_model
        eos = generation_kwargs.get("eos_token_id", language_model.generation_config.eos_token_id)
        if eos is not None:
            ids = [eos] if isinstance(eos, int) else list(eos)
            generation_kwargs["eos_token_id"] = ids if single else [*ids, self.tokenizer.eos_token_id]
        if not allow_other_distribution:
            generation_kwargs = self.checked_arguments(generation_kwargs)
            allow_other_distribution = self.config.truncates        # they have just been checked
        with self.own_draws():
            result = super().generate(query_tensor, length_sampler, batch_size, return_prompt,
                                      generate_ref_response, allow_other_distribution, **generation_kwargs)
        if remove_padding or single:
            return result
        padded = [list(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True,
                                                       padding_value=self.tokenizer.pad_token_id))
                  for rows in (result if generate_ref_response else (result,))]
        return tuple(padded) if generate_ref_response else padded[0]

    def checked_arguments(self, generation_kwargs):
        """-> arguments of `generate` for the config's top_k and top_p. ValueError: another distribution."""
        rest = dict(generation_kwargs)
        for name in ("top_k", "top_p"):
            expected, given = getattr(self.config, name), rest.pop(name, None)
            if given not in (None, expected):
                raise ValueError(f"generate(..., {name}={given}) would sample from another distribution than "
                                 f"the one PPO trains ({name}={expected}); set it in PPOConfig({name}=...)")
        sampling_arguments(self.config.temperature, rest)
        if not self.config.truncates:
            return rest
        return {**rest, "top_k": self.config.top_k, "top_p": self.config.top_p}

    def step(self, queries, responses, scores, response_masks=None):
        """As in ppo_core. queries and responses may also be tensors (B, Q) and (B, R) without padding."""
        queries, responses = (list(rows) if torch.is_tensor(rows) and rows.ndim == 2 else rows
                              for rows in (queries, responses))
        with self.own_draws():
            return super().step(queries, responses, scores, response_masks)

    # With top_k or top_p these three do what the plain trainer does: whole logits of whole mini-batches.

    def forward(self, model, rows, keep_logits=False):
        if not self.config.truncates:
            return super().forward(model, rows, keep_logits)
        _, values, logits = ppo_core.PPOTrainer.forward(self, model, rows, keep_logits=True)       # (b, R, V)
        # Chosen by the policy that sampled, whose pass is the first; the reference and the update take the
        # same tokens. So the ratio is 1 at first, and the KL is that of the truncated distributions.
        if "kept" not in rows:
            rows["kept"] = kept_tokens(logits, rows["labels"], self.config.top_k, self.config.top_p)
        logits, ignored = logits.masked_fill(~rows["kept"], -torch.inf), rows["mask"] == 0
        logprobs = logprobs_from_logits(logits, rows["labels"]).masked_fill(ignored, 0.0)
        rest = logits if keep_logits else entropy_from_logits(logits).masked_fill(ignored, 0.0)
        return logprobs, values, rest

    def mini_batches(self, batch, index):
        if not self.config.truncates:
            yield from super().mini_batches(batch, index)
            return
        for part, rows in ppo_core.PPOTrainer.mini_batches(self, batch, index):
            yield part, rows
            if "kept" not in batch:         # in `record`, after its pass over these rows
                self.kept.append(rows["kept"])

    def record(self, batch):
        if not self.config.truncates:
            return super().record(batch)
        self.kept = []
        recorded = ppo_core.PPOTrainer.record(self, batch)
        batch["kept"] = torch.cat(self.kept)                                                       # (B, R, V)
        return recorded

    @contextmanager
    def own_draws(self):
        """Inside the `with` block the global random generators are the trainer's own, seeded by config.seed.

        So a run can be repeated from its config. Afterwards the user's generators are as they were before.
        """
        if self.config.seed is None:
            yield
            return
        device = self.accelerator.device
        users = distributed.random_state(device)
        if self.own_random is None:
            distributed.seed_everything(self.config.seed, self.accelerator.process_index)
        else:
            distributed.set_random_state(self.own_random, device)
        try:
            yield
        finally:
            self.own_random = distributed.random_state(device)
            distributed.set_random_state(users, device)

    def state_dict(self):
        """As in ppo_core, and in "random" beside the user's generators the trainer's own, as "trainer"."""
        state = super().state_dict()
        if self.config.seed is not None:
            name, keys, *rest = self.own_random["numpy"]        # as lists, which checkpoint.py can read
            state["random"]["trainer"] = {**self.own_random, "numpy": (name, list(map(int, keys)), *rest)}
        return state

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.config.seed is not None:
            self.own_random = state.get("random", {}).get("trainer", self.own_random)

    def push_to_hub(self, *args, **kwargs):
        self.language_model.push_to_hub()

    def _save_pretrained(self, save_directory):
        self.save_pretrained(save_directory)

    def create_model_card(self, path, model_name="plainppo model"):
        """Write README.md, which names the base model and the settings."""
        Path(path).mkdir(parents=True, exist_ok=True)
        settings = "\n".join(f"- {name}: {value}" for name, value in self.config.to_dict().items())
        text = f"# {model_name}\n\nTrained by PPO, with these settings:\n\n{settings}\n"
        (Path(path) / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    config = PPOConfig(steps=1000, batch_size=64, mini_batch_size=16, task_name="sentiment")
    print(config.task_name, "epochs of the whole run:", config.total_ppo_epochs)
    logits = torch.tensor([[[4.0, 3.0, 2.0, 1.0, 0.0]]])                                           # (1, 1, 5)
    for settings in ({"top_k": 2}, {"top_p": 0.9}):
        kept = kept_tokens(logits, **settings)
        print(settings, "keeps", kept.int().tolist(), "with probability",
              round(float((logits.softmax(-1) * kept).sum()), 3))
    print("clipped", clip_by_value(torch.tensor([-2.0, 3.0]), torch.tensor(0.0), torch.tensor(1.0)).tolist())
