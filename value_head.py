"""A causal language model with a value head: one network that writes the text and predicts its reward.

Why: PPO needs a baseline. Without one, every token is credited with the whole score, and the gradient is so
noisy that the policy collapses before it learns. One linear layer is enough.
Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.1. Names and checkpoints are as in TRL 0.11.4.
Differs from TRL 0.11.4 in: position ids come from the attention mask, so left padding changes nothing (in
TRL it changed GPT-2's log-probs by 0.3); the head reads the input of `lm_head`; with `logit_positions`,
logits are computed only where they are needed; weights load as float32 by default.
Shapes: (B, T) token ids -> logits (B, T, V), values (B, T). values[:, t] is V(all tokens up to and including
t), so it is known before token t+1 is chosen; ppo_core.py draws the picture.
Copy me: needs torch and transformers, and bitsandbytes for 8 or 4 bits. Tested by tests/test_value_head.py.
"""
import importlib.util
import inspect
import json
import logging
import os
import re
from contextlib import contextmanager
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import cached_file

logger = logging.getLogger(__name__)
HEAD_ARGUMENTS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")
# These keywords of from_pretrained also say where to look for the head.
PLACE_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


class ValueHead(nn.Module):
    """Hidden states (B, T, H) -> values (B, T, 1), in float32 even when the language model computes in bf16.

    v_head_init_strategy: None = as in nn.Linear; "normal" = N(0, v_head_initializer_range) and a zero bias;
    "zero" = every value starts at 0, so the first advantages come from the rewards alone.
    """

    def __init__(self, hidden_size, summary_dropout_prob=0.1, v_head_initializer_range=0.2,
                 v_head_init_strategy=None):
        super().__init__()
        self.dropout = nn.Dropout(summary_dropout_prob or 0.0)
        self.alone = False      # True: the value loss trains the head alone
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        if v_head_init_strategy not in (None, "normal", "zero"):
            raise ValueError(f"v_head_init_strategy is {v_head_init_strategy!r}; "
                             "use None, 'normal' or 'zero'")
        if v_head_init_strategy is not None:
            std = v_head_initializer_range if v_head_init_strategy == "normal" else 0.0
            nn.init.normal_(self.summary.weight, std=std)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden):
        hidden = hidden.detach() if self.alone else hidden
        # Autocast would use bf16: an error of 1 % in a value is as large as a typical advantage.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(self.dropout(hidden.to(self.summary.weight.dtype)))


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal language model (`.pretrained_model`) and a ValueHead (`.v_head`)."""

    is_peft_model = False       # see adapters.py

    def __init__(self, pretrained_model, **head_arguments):
        super().__init__()
        lm_head = pretrained_model.get_output_embeddings()
        if lm_head is None or getattr(pretrained_model.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(pretrained_model).__name__} has no causal language-model head; "
                             "load it with AutoModelForCausalLM, not AutoModel or a seq2seq class")
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.is_loaded_in_8bit = getattr(pretrained_model, "is_loaded_in_8bit", False)
        self.is_loaded_in_4bit = getattr(pretrained_model, "is_loaded_in_4bit", False)
        # Not config.hidden_size: OPT-350m projects 1,024 to 512 before lm_head.
        self.v_head = ValueHead(lm_head.in_features, **head_arguments).to(lm_head.weight.device)
        self.train(pretrained_model.training)      # the same mode for the head's dropout
        # Bloom computes positions from the mask and takes no position_ids.
        self.takes_position_ids = "position_ids" in inspect.signature(pretrained_model.forward).parameters

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load from a folder or a hub id, or wrap a model that is already loaded.

        HEAD_ARGUMENTS go to ValueHead, all others to `AutoModelForCausalLM.from_pretrained`. If no head was
        saved, a new one is made. A model in 8 or 4 bits can only be a reference. No pickle is executed,
        and code from the folder only if `trust_remote_code=True` is given.
        ValueError: no model is found, or a part of it would be random.
        """
        head_arguments = {key: kwargs.pop(key) for key in HEAD_ARGUMENTS if key in kwargs}
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            return cls(pretrained_model_name_or_path, **head_arguments)
        name = os.fspath(pretrained_model_name_or_path)
        adapt_arguments(kwargs)
        try:
            with without_report_of_head():
                language_model, report = AutoModelForCausalLM.from_pretrained(
                    name, *args, output_loading_info=True, **kwargs)
            head = find_value_head(name, **{key: kwargs[key] for key in PLACE_ARGUMENTS if key in kwargs})
        except OSError as error:
            raise ValueError(f"no model found at {name!r}: it is no folder with config.json and weights, "
                             "and no hub id in reach; pass a folder made by save_pretrained") from error
        refuse_partly_random(name, language_model, report)
        was_saved_with_head = vars(language_model.config).pop("value_head", False)      # see save_pretrained
        model = cls(language_model, **head_arguments)
        if head is None:
            # This is normal, unless the model was saved with a head.
            level = logging.WARNING if was_saved_with_head else logging.INFO
            logger.log(level, "no value head in %s: a new one was made", name)
            return model
        load_value_head(model.v_head, head, name)
        return model

    def forward(self, input_ids, attention_mask=None, past_key_values=None, position_ids=None,
                logit_positions=None, return_past_key_values=False, **kwargs):
        """-> (lm_logits (B, T, V) float32, loss or None, values (B, T) float32[, past_key_values]).

        input_ids, attention_mask: (B, T), padded on either side; 1 in the mask = a real token.
        logit_positions: (B, R), the columns to compute: logits are then (B, R, V) and values (B, R). All
        logits, (B, T, V), would be the largest tensor of a PPO step.
        """
        if position_ids is None and attention_mask is not None and self.takes_position_ids:
            # Position 0 is the first real token, wherever the padding is.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)          # (B, past + T)
            position_ids = position_ids[:, -input_ids.shape[1]:]                        # (B, T)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        head_inputs = []

        def read_input(_, inputs):
            hidden = inputs[0]                                                          # (B, T, H)
            if logit_positions is not None:
                index = logit_positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
                hidden = hidden.gather(1, index)                                        # (B, R, H)
            head_inputs.append(hidden)
            return (hidden,) + inputs[1:]

        # A hook works for every family, also where the logits are scaled or capped after lm_head.
        with self.pretrained_model.get_output_embeddings().register_forward_pre_hook(read_input):
            output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask,
                                           past_key_values=past_key_values, **kwargs)
        values = self.v_head(head_inputs[0]).squeeze(-1).float()                        # (B, T) or (B, R)
        result = (output.logits.float(), output.loss, values)
        return result + (output.past_key_values,) if return_past_key_values else result

    def generate(self, *args, **kwargs):
        """Generate with the language model alone."""
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args, **kwargs):
        self.pretrained_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self):
        self.pretrained_model.gradient_checkpointing_disable()

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The tensors of the language model, named as in transformers, and `v_head.*`, as in TRL."""
        state = self.pretrained_model.state_dict(*args, destination=destination, prefix=prefix,
                                                 keep_vars=keep_vars)
        return self.v_head.state_dict(destination=state, prefix=f"{prefix}v_head.", keep_vars=keep_vars)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """The inverse of `state_dict`. With strict=True, a missing value head is an error."""
        head = {k.removeprefix("v_head."): v for k, v in state_dict.items() if k.startswith("v_head.")}
        rest = {k: v for k, v in state_dict.items() if not k.startswith("v_head.")}
        self.v_head.load_state_dict(head, strict=strict, assign=assign)
        return self.pretrained_model.load_state_dict(rest, strict=strict, assign=assign)

    def save_pretrained(self, folder, **kwargs):
        """Write config.json and safetensors; transformers loads them too, without the head."""
        kwargs.setdefault("state_dict", self.state_dict())
        # This entry of config.json tells from_pretrained that a head was saved. It is deleted afterwards,
        # because the language model may also be saved alone.
        self.config.value_head = True
        self.pretrained_model.save_pretrained(folder, **kwargs)
        del self.config.value_head
        # An earlier save with another shard size may have left the other one of these two files.
        paths = [os.path.join(folder, name) for name in ("model.safetensors", "model.safetensors.index.json")]
        if all(os.path.isfile(path) for path in paths):
            os.remove(min(paths, key=lambda path: os.stat(path).st_mtime_ns))


def refuse_partly_random(name, model, report):
    """ValueError if weights and config.json do not fit. report: the loading_info of transformers.

    transformers makes missing tensors at random and ignores unknown ones. An unknown tensor of a known layer
    is often an old buffer and harmless; an unknown layer means that config.json is of another model.
    """
    # Older files start the names at the inner model: "h.0." where the whole model has "transformer.h.0.".
    parts = {part for module in (model, model.base_model) for part, _ in module.named_children()}
    names = "".join(f" .{tensor}" for tensor in model.state_dict())
    wrong = list(report["missing_keys"])
    for tensor in sorted(report["unexpected_keys"]):
        part = tensor.split(".")[0]
        if part in ("score", "classifier", "qa_outputs"):
            # If its lm_head is tied to the embedding, no tensor is missing, but lm_head was not trained.
            raise ValueError(f"the model {name!r} is a classifier: its weights hold {tensor} and 0 trained "
                             "language-model heads; pass a causal language model")
        layer = re.match(r".+?\.\d+\.", tensor)
        if layer and part in parts and f".{layer[0]}" not in names:
            wrong.append(tensor)
    if wrong:
        raise ValueError(f"the model {name!r} would be loaded in part: {len(wrong)} tensors of its weights "
                         f"and its config.json do not fit, {min(wrong)} first; get its files again")


def adapt_arguments(kwargs):
    """Change the keywords of from_pretrained, in place, to what transformers 5 and PPO need."""
    # transformers 5 takes a quantization_config instead of load_in_8bit and load_in_4bit.
    bits = {key: kwargs.pop(key) for key in ("load_in_8bit", "load_in_4bit") if key in kwargs}
    if any(bits.values()):
        if kwargs.get("quantization_config") is not None:
            raise ValueError(f"{' and '.join(bits)} and a quantization_config are given; give one of them")
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"{' and '.join(bits)} needs bitsandbytes; run: pip install bitsandbytes")
        kwargs["quantization_config"] = BitsAndBytesConfig(**bits)
    # device_map="auto" spreads a model over all devices.
    on_gpu = torch.cuda.is_available()
    if kwargs.get("device_map") == "auto" and (on_gpu or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        device = int(os.environ.get("LOCAL_RANK", 0)) if on_gpu else "cpu"
        kwargs["device_map"] = {"": device}
        logger.warning("device_map='auto' was replaced by %r: PPO needs one device per process", device)
    # The type in the file may be bf16, and a PPO update is smaller than the last bit of a bf16 weight.
    if not ({"dtype", "torch_dtype", "quantization_config"} & set(kwargs)):
        kwargs["dtype"] = torch.float32
    # Otherwise transformers asks on the terminal whether code from the folder may run.
    kwargs.setdefault("trust_remote_code", False)


@contextmanager
def without_report_of_head():
    """Hide transformers' report of weights that it did not expect, if it lists `v_head.*` alone."""
    def is_to_be_shown(record):
        lines = record.getMessage().splitlines()
        rows = [line for line in lines if "|" in line and re.search("UNEXPECTED|MISSING|MISMATCH", line)]
        return not rows or not all("v_head." in row for row in rows)
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(is_to_be_shown)
    try:
        yield
    finally:
        log.removeFilter(is_to_be_shown)


def find_value_head(name, **place):
    """The saved head as {"summary.weight": (1, H), "summary.bias": (1,)}, or None. name: folder or hub id."""
    place.update(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    # The first is written beside adapters. Of the others transformers loads the first that exists, and so the
    # head is in it. Older TRL wrote .bin.
    candidates = ("value_head.safetensors", "model.safetensors", "model.safetensors.index.json",
                  "pytorch_model.bin", "pytorch_model.bin.index.json")
    paths = (cached_file(name, candidate, **place) for candidate in candidates)
    path = next(filter(None, paths), None)
    if path is None:
        return None
    files = [path]
    if path.endswith(".json"):
        with open(path, encoding="utf-8") as index:
            weight_map = json.load(index)["weight_map"]
        shards = {shard for key, shard in weight_map.items() if key.startswith("v_head.")}
        files = [cached_file(name, shard, **place) for shard in sorted(shards)]
    head = {}
    for file in files:
        if file.endswith(".bin"):
            # weights_only=True refuses a pickle that would run code. The oldest format has no mmap.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        else:
            with safe_open(file, framework="pt") as weights:
                tensors = {k: weights.get_tensor(k) for k in weights.keys() if k.startswith("v_head.")}
        head.update({k.removeprefix("v_head."): v for k, v in tensors.items() if k.startswith("v_head.")})
    return head or None


def load_value_head(v_head, head, name):
    expected = {key: tuple(tensor.shape) for key, tensor in v_head.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in head.items()}
    if found != expected:
        raise ValueError(f"the value head of {name!r} is {found}, not {expected}; get its files again")
    v_head.load_state_dict(head)


if __name__ == "__main__":
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(GPT2LMHeadModel(config)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    padded, mask = torch.tensor([[0, 0, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        logits, _, values = model(ids, torch.ones_like(ids))
        _, _, left = model(padded, mask)
    print("logits", tuple(logits.shape), "values", values.numpy().round(4))
    print("largest change of a value by left padding:", f"{(left[:, 2:] - values).abs().max():.1e}")
