"""A causal language model with a value head: one network that writes the text and predicts its reward.

Why: PPO needs a baseline. Without one, every token is credited with the whole score, and the gradient is so
noisy that the policy collapses before it learns. One linear layer is enough.
Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.1. The names are those of TRL 0.11.4, so checkpoints
move both ways.
Differs from TRL 0.11.4 in: position ids come from the attention mask, so left padding changes nothing (in
TRL, it changed GPT-2's log-probs by 0.3); the head reads the input of `lm_head`; `logit_positions` computes
logits only where they are needed; weights load as float32 by default.
Shapes: (B, T) token ids -> logits (B, T, V), values (B, T). values[:, t] is V(all tokens up to and including
token t), so it is known before token t+1 is chosen; ppo_core.py draws the picture.
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


class ValueHead(nn.Module):
    """Hidden states (B, T, H) -> values (B, T, 1), in float32 even when the language model computes in bf16.

    v_head_init_strategy: None = torch's own; "normal" = N(0, v_head_initializer_range) and a zero bias;
    "zero" = every value starts at 0, so the first advantages come from the rewards alone.
    """

    def __init__(self, hidden_size, summary_dropout_prob=0.1, v_head_initializer_range=0.2,
                 v_head_init_strategy=None):
        super().__init__()
        self.dropout = nn.Dropout(summary_dropout_prob or 0.0)
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        if v_head_init_strategy not in (None, "normal", "zero"):
            raise ValueError(f"v_head_init_strategy is {v_head_init_strategy!r}; "
                             "use None, 'normal' or 'zero'")
        if v_head_init_strategy is not None:
            std = v_head_initializer_range if v_head_init_strategy == "normal" else 0.0
            nn.init.normal_(self.summary.weight, mean=0.0, std=std)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden):
        # float32 also under bf16 autocast: a value error of 1 % is the size of a typical advantage
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(self.dropout(hidden.to(self.summary.weight.dtype)))


# keywords of from_pretrained that say where the files are: the head is looked for where the weights are
PLACE_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
HEAD_ARGUMENTS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal language model (`.pretrained_model`) and a ValueHead (`.v_head`)."""

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
        # Not config.hidden_size: OPT-350m projects 1,024 down to 512 before lm_head.
        self.v_head = ValueHead(lm_head.in_features, **head_arguments).to(lm_head.weight.device)
        self.train(pretrained_model.training)      # the same mode for the head's dropout
        # Bloom computes positions from the mask and takes no position_ids.
        self.takes_position_ids = "position_ids" in inspect.signature(pretrained_model.forward).parameters

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load from a folder or a hub id, or wrap a model that is already loaded.

        HEAD_ARGUMENTS go to ValueHead, all others to `AutoModelForCausalLM.from_pretrained`. A saved head is
        loaded, or else a new one is made. With `load_in_8bit=True` or `load_in_4bit=True` the model can only
        be a reference. No pickle is executed, and no code from the folder without `trust_remote_code=True`.
        ValueError: no model is found, or a part of it would be random.
        """
        head_arguments = {key: kwargs.pop(key) for key in HEAD_ARGUMENTS if key in kwargs}
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            return cls(pretrained_model_name_or_path, **head_arguments)
        name = os.fspath(pretrained_model_name_or_path)
        translate_bits(kwargs)
        keep_on_one_device(kwargs)
        if not ({"dtype", "torch_dtype", "quantization_config"} & set(kwargs)):
            # not the file's type: a PPO update is smaller than the last bit of a bf16 weight
            kwargs["dtype"] = torch.float32
        kwargs.setdefault("trust_remote_code", False)       # None: transformers asks on the terminal
        try:
            with without_report_of_head():
                language_model, report = AutoModelForCausalLM.from_pretrained(
                    name, *args, output_loading_info=True, **kwargs)
            head = find_value_head(name, **{key: kwargs[key] for key in PLACE_ARGUMENTS if key in kwargs})
        except OSError as error:
            raise ValueError(f"no model found at {name!r}: it is neither a folder with config.json and "
                             "weights nor a hub id that could be reached or is cached; pass a folder made by "
                             "save_pretrained") from error
        refuse_partly_random(name, language_model, report)
        was_saved_with_head = vars(language_model.config).pop("value_head", False)      # see save_pretrained
        model = cls(language_model, **head_arguments)
        if head is None:
            # Normal for a plain language model, but not for one that was saved with a head.
            level = logging.WARNING if was_saved_with_head else logging.INFO
            logger.log(level, "no value head in %s: a new one was made", name)
            return model
        shapes = {key: tuple(tensor.shape) for key, tensor in model.v_head.state_dict().items()}
        found = {key: tuple(tensor.shape) for key, tensor in head.items()}
        if found != shapes:
            raise ValueError(f"the value head of {name!r} is {found} but {shapes} was expected; "
                             "get its files again")
        model.v_head.load_state_dict(head)
        return model

    def forward(self, input_ids, attention_mask=None, past_key_values=None, position_ids=None,
                logit_positions=None, return_past_key_values=False, **kwargs):
        """-> (lm_logits (B, T, V) float32, loss or None, values (B, T) float32[, past_key_values]).

        input_ids, attention_mask: (B, T), padded on either side; 1 in the mask = a real token.
        logit_positions: (B, R) columns of T; then logits are (B, R, V) and values (B, R), of these columns,
        and the largest tensor of a PPO step, logits (B, T, V) with prompt and padding, is not made.
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
        handle = self.pretrained_model.get_output_embeddings().register_forward_pre_hook(read_input)
        try:
            output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask,
                                           past_key_values=past_key_values, **kwargs)
        finally:
            handle.remove()
        values = self.v_head(head_inputs[0]).squeeze(-1).float()                        # (B, T) or (B, R)
        result = (output.logits.float(), output.loss, values)
        return result + (output.past_key_values,) if return_past_key_values else result

    def generate(self, *args, **kwargs):
        """`generate` of the language model."""
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args, **kwargs):
        self.pretrained_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self):
        self.pretrained_model.gradient_checkpointing_disable()

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The tensors of the language model by their names in transformers, and `v_head.*`, as in TRL."""
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
        # By this entry from_pretrained knows that a head was saved. The language model may also be saved
        # alone, so it does not stay.
        self.config.value_head = True
        self.pretrained_model.save_pretrained(folder, **kwargs)
        del self.config.value_head
        remove_older_layout(folder)


def refuse_partly_random(name, model, report):
    """ValueError if weights and config.json do not fit. report: the loading_info of transformers.

    transformers makes missing tensors at random and leaves out unknown ones. An unknown tensor of a layer is
    often an old buffer and harmless; a whole unknown layer is not.
    """
    # A classifier whose lm_head is tied to the embedding misses no tensor; its lm_head was not trained.
    for tensor in sorted(report["unexpected_keys"]):
        if tensor.split(".")[0] in ("score", "classifier", "qa_outputs"):
            raise ValueError(f"the model {name!r} is a classifier: its weights hold {tensor} and 0 trained "
                             "language-model heads; pass a causal language model")
    # Older files start the names at the inner model: "h.0." where the whole model has "transformer.h.0.".
    parts = {part for module in (model, model.base_model) for part, _ in module.named_children()}
    names = "".join(f" .{tensor}" for tensor in model.state_dict())
    wrong = list(report["missing_keys"])
    for tensor in report["unexpected_keys"]:
        layer = re.match(r".+?\.\d+\.", tensor)
        if layer and f".{layer[0]}" not in names and tensor.split(".")[0] in parts:
            wrong.append(tensor)
    if wrong:
        raise ValueError(f"the model {name!r} would be loaded in part: {len(wrong)} tensors of its weights "
                         f"and its config.json do not fit each other, {min(wrong)} first; "
                         "get its files again")


def translate_bits(kwargs):
    """Replace load_in_8bit and load_in_4bit in `kwargs` by the quantization_config of transformers 5."""
    bits = {name: kwargs.pop(name) for name in ("load_in_8bit", "load_in_4bit") if name in kwargs}
    if not any(bits.values()):
        return
    if kwargs.get("quantization_config") is not None:
        raise ValueError(f"both {' and '.join(bits)} and a quantization_config are given; give one of them")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{' and '.join(bits)} needs bitsandbytes; run: pip install bitsandbytes")
    kwargs["quantization_config"] = BitsAndBytesConfig(**bits)


def keep_on_one_device(kwargs):
    """Replace device_map="auto", which spreads a model over devices: PPO needs one device per process."""
    on_gpu = torch.cuda.is_available()
    if kwargs.get("device_map") == "auto" and (on_gpu or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0)) if on_gpu else "cpu"}
        logger.warning("device_map='auto' was replaced by %s: PPO computes on one device per process",
                       kwargs["device_map"])


@contextmanager
def without_report_of_head():
    """transformers does not report `v_head.*` as unexpected weights, but all other ones."""
    def about_other_weights(record):
        lines = record.getMessage().splitlines()
        rows = [line for line in lines if "|" in line and re.search("UNEXPECTED|MISSING|MISMATCH", line)]
        return not rows or not all("v_head." in row for row in rows)
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(about_other_weights)
    try:
        yield
    finally:
        log.removeFilter(about_other_weights)


def remove_older_layout(folder):
    """If `folder` has both a single weights file and an index of shards, remove the older of them."""
    layouts = [os.path.join(folder, name) for name in ("model.safetensors", "model.safetensors.index.json")]
    if all(os.path.isfile(path) for path in layouts):
        os.remove(min(layouts, key=lambda path: os.stat(path).st_mtime_ns))


def find_value_head(name, **place):
    """The saved head as {"summary.weight": (1, H), "summary.bias": (1,)}, or None. name: folder or hub id."""
    place.update(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    # transformers loads the first of these that exists, so the head is read from it. Older TRL wrote .bin.
    candidates = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                  "pytorch_model.bin.index.json")
    paths = (cached_file(name, candidate, **place) for candidate in candidates)
    path = next((path for path in paths if path is not None), None)
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
        head.update(read_head(file))
    return head or None


def read_head(file):
    """-> the tensors of one weights file whose names start with "v_head.", by the rest of their names."""
    if file.endswith(".bin"):
        # weights_only=True refuses a pickle that would run code. The oldest format has no mmap.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
        return {key[len("v_head."):]: tensor for key, tensor in tensors.items() if key.startswith("v_head.")}
    with safe_open(file, framework="pt") as tensors:
        keys = [key for key in tensors.keys() if key.startswith("v_head.")]
        return {key[len("v_head."):]: tensors.get_tensor(key) for key in keys}


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
