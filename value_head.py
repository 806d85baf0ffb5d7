"""A causal language model with a value head: one network that writes the text and guesses how it will end.

Why: PPO needs a baseline. Without V(prefix) every token of a response is credited with the whole score, and the
gradient is so noisy that the policy collapses before it learns. One linear layer on the trunk's last hidden state is
enough, and costs nothing next to the language model.
Source: Ziegler et al. 2019 (arXiv 1909.08593), section 2.1: the value function shares the policy's trunk. Class, argument
and state-dict names are those of TRL 0.11.4, so checkpoints move both ways.
Differs from TRL 0.11.4 in: position ids are made from the attention mask, so left padding changes nothing (there, GPT-2's
log-probs were off by 0.3); the head reads the very tensor that feeds `lm_head`, so no list of all hidden states is kept;
`logit_positions` and `score` limit the vocabulary-sized work to the tokens that are scored, some of them at a time; weights
load as float32 unless another type is asked for; the head stays float32 (unless DeepSpeed casts all); a head that is missing from a checkpoint is said aloud.
Shapes: (B, T) token ids -> logits (B, T, V), values (B, T). values[:, t] is V(everything up to and including token t),
which is what the model knew before it chose token t+1; ppo_core.py draws the picture.
Copy me: needs torch and transformers, and bitsandbytes for 8 or 4 bits. Tested by tests/test_value_head.py.
"""
import importlib.util
import inspect
import json
import logging
import os
import re
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import cached_file

logger = logging.getLogger(__name__)


class ValueHead(nn.Module):
    """hidden states (B, T, H) -> values (B, T, 1), in float32 whatever the trunk computes in.

    summary_dropout_prob is TRL's knob and default; PPOTrainer sets every dropout to 0, see ppo_core.disable_dropout.
    init_strategy: None = torch's own uniform init; "normal" = N(0, initializer_range) and a zero bias; "zero" = every value
    starts at 0, so that the first advantages are the rewards themselves and not the noise of a random head.
    """

    def __init__(self, hidden_size, summary_dropout_prob=0.1, v_head_initializer_range=0.2, v_head_init_strategy=None):
        super().__init__()
        self.dropout = nn.Dropout(summary_dropout_prob or 0.0)
        self.summary = nn.Linear(hidden_size, 1, dtype=torch.float32)
        if v_head_init_strategy not in (None, "normal", "zero"):
            raise ValueError(f"v_head_init_strategy is {v_head_init_strategy!r}; use None, 'normal' or 'zero'")
        if v_head_init_strategy is not None:
            std = v_head_initializer_range if v_head_init_strategy == "normal" else 0.0
            nn.init.normal_(self.summary.weight, mean=0.0, std=std)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden):
        # float32 even under bf16 autocast: a value error of 1 % is the size of a typical advantage.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.summary(self.dropout(hidden.to(self.summary.weight.dtype)))


# Of from_pretrained's keywords those that say where the files are; the head must come from the place of the weights.
PLACE_ARGUMENTS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
HEAD_ARGUMENTS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A transformers causal LM at `.pretrained_model` and a ValueHead at `.v_head`; build it with `from_pretrained`."""

    def __init__(self, pretrained_model, **head_arguments):
        super().__init__()
        lm_head = pretrained_model.get_output_embeddings()
        if lm_head is None or getattr(pretrained_model.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(pretrained_model).__name__} has no causal language-model head; "
                             "load it with AutoModelForCausalLM (GPT-2, Llama, ...), not AutoModel or a seq2seq class")
        self.pretrained_model = pretrained_model
        self.config = pretrained_model.config
        self.is_loaded_in_8bit = getattr(pretrained_model, "is_loaded_in_8bit", False)
        self.is_loaded_in_4bit = getattr(pretrained_model, "is_loaded_in_4bit", False)
        # lm_head's input width, not config.hidden_size: OPT-350m projects its 1,024 down to 512 before the head.
        self.v_head = ValueHead(lm_head.in_features, **head_arguments).to(lm_head.weight.device)
        self.train(pretrained_model.training)      # from_pretrained gives eval mode, and the head's dropout must follow
        # Bloom derives positions from the mask itself and takes no position_ids.
        self.takes_position_ids = "position_ids" in inspect.signature(pretrained_model.forward).parameters

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load from a folder, a hub id, or wrap a model that is already loaded.

        Keywords for the head (`summary_dropout_prob`, `v_head_init_strategy`, `v_head_initializer_range`) are taken out,
        all others go to `AutoModelForCausalLM.from_pretrained`; `load_in_8bit=True` and `load_in_4bit=True`, the older spelling of
        a `quantization_config`, are understood (such a model is fit for a reference, not for training). A `v_head.*` found
        beside the weights is loaded; otherwise a new one is made and that is logged. No code of the folder is executed unless
        `trust_remote_code=True` says so, and no pickle. ValueError if there is no such model, it has no LM head, or a file of it is
        damaged: a model that would be loaded in part, the rest random, is none.
        """
        head_arguments = {k: kwargs.pop(k) for k in HEAD_ARGUMENTS if k in kwargs}
        if isinstance(pretrained_model_name_or_path, PreTrainedModel):
            return cls(pretrained_model_name_or_path, **head_arguments)
        name = os.fspath(pretrained_model_name_or_path)
        translate_bits(kwargs)
        if kwargs.get("device_map") == "auto" and (torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", 1)) > 1):
            # PPO computes on one device per process; "auto" would spread the model over all, those of other processes included.
            kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"}
        if not ({"dtype", "torch_dtype", "quantization_config"} & set(kwargs)):
            # transformers 5 keeps the checkpoint's type. PPO's updates are far smaller than a bf16 weight's last bit.
            kwargs["dtype"] = torch.float32
        kwargs.setdefault("trust_remote_code", False)       # not said, transformers asks the terminal, which a run may not have
        try:
            with value_head_expected():
                language_model, report = AutoModelForCausalLM.from_pretrained(name, *args, output_loading_info=True, **kwargs)
            head = find_value_head(name, **{k: kwargs[k] for k in PLACE_ARGUMENTS if k in kwargs})
        except Exception as error:      # each library has its own for a damaged file, and tokenizers' is a plain Exception
            problem = why_not_loaded(name, error, "config.json")
            if isinstance(error, OSError) and "damaged" not in problem:
                raise ValueError(f"no model found at {name!r}: it is neither a folder with config.json and weights nor a hub id "
                                 "that could be reached or is cached; pass a folder made by save_pretrained") from error
            raise ValueError(f"the model {name!r} cannot be loaded: {problem}") from error
        wrong = half_loaded(report, language_model)
        if wrong:
            raise ValueError(f"the model {name!r} would be loaded in part: {len(wrong)} tensors of its weights and its config.json do not fit "
                             f"each other, {wrong[0]} first; get its files again")
        model = cls(language_model, **head_arguments)
        if head is None:
            logger.warning("no value head in %s: a new one was made (normal for a plain language model)", name)
            return model
        shapes = {key: tuple(tensor.shape) for key, tensor in model.v_head.state_dict().items()}
        found = {key: tuple(tensor.shape) for key, tensor in head.items()}
        if found != shapes:
            raise ValueError(f"the value head of {name!r} is {found} but {shapes} was expected; get its files again")
        model.v_head.load_state_dict(head)
        return model

    def forward(self, input_ids, attention_mask=None, past_key_values=None, position_ids=None, logit_positions=None,
                score=None, score_mask=None, chunk=None, return_past_key_values=False, **kwargs):
        """-> (lm_logits (B, T, V) float32, loss or None, values (B, T) float32[, past_key_values]).

        input_ids, attention_mask: (B, T), padding on either side, 1 = a real token.
        logit_positions: (B, R) columns of T. With it, logits are (B, R, V) and values (B, R), at those columns only:
        the (B, T, V) tensor over prompt and padding, the largest of a PPO step, is then never made.
        score, score_mask (B, R), chunk: instead of logits, what `score` makes of them; see `score_tokens`.
        """
        if position_ids is None and attention_mask is not None and self.takes_position_ids:
            # Position 0 is the first real token, wherever the padding is. Padding gets 0; nobody looks at it.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1]:]    # (B, T)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        if score is not None:
            # the trunk alone: what the language model does after it is done below, for the tokens that count
            output = self.pretrained_model.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            return self.score_tokens(output, logit_positions, score_mask, score, chunk)
        seen = []

        def read_input(_, inputs):
            hidden = inputs[0]                                                                          # (B, T, H)
            if logit_positions is not None:
                index = logit_positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
                hidden = hidden.gather(1, index)                                                        # (B, R, H)
            seen.append(hidden)
            return (hidden,) + inputs[1:]

        # A hook, because it holds for every family, with whatever it does around its head (soft-caps, scales, biases).
        handle = self.pretrained_model.get_output_embeddings().register_forward_pre_hook(read_input)
        try:
            output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask,
                                           past_key_values=past_key_values, **kwargs)
        finally:
            handle.remove()
        values = self.v_head(seen[0]).squeeze(-1).float()                                           # (B, T) or (B, R)
        result = (output.logits.float(), output.loss, values)
        return result + (output.past_key_values,) if return_past_key_values else result

    def score_tokens(self, output, positions, mask, score, chunk=None):
        """-> (what `score` gives, each (B, R, ...)), None, values (B, R); all 0 where mask (B, R) is 0.

        output: the trunk's. score: function(logits (n, V) float32, index (n,)) -> tuple of tensors (n, ...); index: which of the
        B * R places the n tokens have. chunk: tokens whose logits may be held at once; None = all. Beyond the first chunk the logits
        are computed again in the backward pass instead of being kept: more time, and no memory that grows with B x R x V.
        """
        hidden = output.last_hidden_state                                                               # (B, T, H)
        index = mask.flatten().nonzero().squeeze(1)                                                     # (N,)
        columns = positions + torch.arange(len(positions), device=hidden.device)[:, None] * hidden.shape[1]
        count, padding = len(index), index.new_zeros(even_size(max(1, len(index))) - len(index))
        index = torch.cat([index, padding])                     # computed, and left out of what is given back
        hidden = hidden.flatten(0, 1)[columns.flatten()[index]]                                         # (N, H)

        def some(hidden, index):
            logits, values = self.head(output, hidden)
            return (*score(logits, index), values)

        pieces = list(zip(hidden.split(chunk or len(hidden)), index.split(chunk or len(hidden))))
        if len(pieces) > 1 and torch.is_grad_enabled():
            done = [checkpoint(some, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        else:
            done = [some(*piece) for piece in pieces]
        *scored, values = [torch.cat(each)[:count] for each in zip(*done)]                              # (N, ...) each
        places = [each.new_zeros(mask.numel(), *each.shape[1:]).index_copy(0, index[:count], each) for each in (*scored, values)]
        *scored, values = [each.unflatten(0, mask.shape) for each in places]
        return tuple(scored), None, values

    def head(self, output, hidden):
        """What the language model makes of its trunk's output: hidden (n, H) -> logits (n, V) float32, values (n,) float32.

        The model itself is run on a trunk that has its answer ready, because families differ in what they do around `lm_head`
        (soft-caps, scales, biases).
        """
        trunk, seen = self.pretrained_model.base_model, []
        before = vars(trunk).get("forward")             # accelerate's hooks put one there too
        trunk.forward = lambda *args, **kwargs: type(output)(**{**output, "last_hidden_state": hidden.unsqueeze(0)})
        reader = self.pretrained_model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = self.pretrained_model().logits.squeeze(0)
        finally:
            reader.remove()
            del trunk.forward
            if before is not None:
                trunk.forward = before
        return logits.float(), self.v_head(seen[0]).view(-1).float()

    def generate(self, *args, **kwargs):
        """The language model's own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args, **kwargs):
        self.pretrained_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self):
        self.pretrained_model.gradient_checkpointing_disable()

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The language model's own names plus `v_head.*`: a checkpoint that transformers and TRL both read."""
        state = self.pretrained_model.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.v_head.state_dict(destination=state, prefix=f"{prefix}v_head.", keep_vars=keep_vars)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """The inverse of `state_dict`. With strict=True a missing value head is an error, as any missing tensor is."""
        head = {k.removeprefix("v_head."): v for k, v in state_dict.items() if k.startswith("v_head.")}
        rest = {k: v for k, v in state_dict.items() if not k.startswith("v_head.")}
        self.v_head.load_state_dict(head, strict=strict, assign=assign)
        return self.pretrained_model.load_state_dict(rest, strict=strict, assign=assign)

    def save_pretrained(self, folder, **kwargs):
        """config.json and safetensors (sharded by `max_shard_size`); plain transformers loads it too, without the head."""
        kwargs.setdefault("state_dict", self.state_dict())
        self.pretrained_model.save_pretrained(folder, **kwargs)
        remove_older_layout(folder)


def even_size(n):   # same as ppo_core.even_size
    """n rounded up to one of few sizes: 8, 16, ... 128, 144, ... 256, 288, ... Each size that is new costs a kernel of its own."""
    step = max(8, 2 ** ((n - 1).bit_length() - 4))
    return -(-n // step) * step


def why_not_loaded(folder, error, suspect):
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


def first_line(error):
    """An exception as part of a sentence: a library's may be a page."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")


def half_loaded(report, model):
    """-> tensors that a transformers model misses in its file, or that the file has more of, as those of another layer.

    report: transformers' loading_info. What is missing it makes up, and what is too many it leaves out, each with a warning. It may leave
    out a pooler beside the layers, or a buffer of older days in one, but not a whole layer.
    """
    tops = {name for part in (model, model.base_model) for name, _ in part.named_children()}     # older files name them from the inner one
    own = "".join(f" .{name}" for name in model.state_dict())
    layers = [(name, re.match(r"(.+?\.\d+\.|)", name)[0]) for name in report["unexpected_keys"] if name.split(".")[0] in tops]
    return sorted([*report["missing_keys"], *(name for name, layer in layers if layer and f".{layer}" not in own)])


def translate_bits(kwargs):
    """load_in_8bit / load_in_4bit in `kwargs` -> a BitsAndBytesConfig, which is how transformers 5 wants it, in place."""
    bits = {name: kwargs.pop(name) for name in ("load_in_8bit", "load_in_4bit") if name in kwargs}
    if not any(bits.values()):
        return
    if kwargs.get("quantization_config") is not None:
        raise ValueError(f"both {' and '.join(bits)} and a quantization_config are given; give one of them")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{' and '.join(bits)} needs the package bitsandbytes, which is not installed; run: pip install bitsandbytes")
    kwargs["quantization_config"] = BitsAndBytesConfig(**bits)


@contextmanager
def value_head_expected():
    """Keep transformers from reporting `v_head.*` as unexpected weights; what else it has to report still comes through."""
    def other_news(record):
        rows = [line for line in record.getMessage().splitlines() if re.search(r"UNEXPECTED|MISSING|MISMATCH", line) and "|" in line]
        return not rows or not all("v_head." in row for row in rows)
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(other_news)
    try:
        yield
    finally:
        log.removeFilter(other_news)


def remove_older_layout(folder):
    """One file or shards with an index: whichever an earlier save left in `folder` would be loaded instead of the newer."""
    layouts = [os.path.join(folder, name) for name in ("model.safetensors", "model.safetensors.index.json")]
    if all(os.path.isfile(path) for path in layouts):
        os.remove(min(layouts, key=lambda path: os.stat(path).st_mtime_ns))


def find_value_head(name, **place):
    """The saved head as {"summary.weight": (1, H), "summary.bias": (1,)}, or None. name: folder or hub id."""
    quiet = dict(_raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **place)
    head = {}
    # In the order of transformers, which takes the first that is there; .bin is the format of older TRL checkpoints.
    for weights in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        found = cached_file(name, weights, **quiet)
        if found is None:
            continue
        paths = [found]
        if weights.endswith(".json"):
            with open(found, encoding="utf-8") as f:
                files = {file for key, file in json.load(f)["weight_map"].items() if key.startswith("v_head.")}
            paths = [cached_file(name, file, **quiet) for file in sorted(files)]
        for path in paths:
            if path.endswith(".bin"):
                # weights_only: a pickle that would do more than make tensors is an UnpicklingError. The older format has no mmap.
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
                head.update({k: v for k, v in tensors.items() if k.startswith("v_head.")})
            else:
                with safe_open(path, framework="pt") as tensors:
                    head.update({k: tensors.get_tensor(k) for k in tensors.keys() if k.startswith("v_head.")})
        break
    return {k.removeprefix("v_head."): v for k, v in head.items()} or None


if __name__ == "__main__":
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    padded, mask = torch.tensor([[0, 0, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        logits, _, values = model(ids, torch.ones_like(ids))
        _, _, left = model(padded, mask)
        some, _, _ = model(ids, torch.ones_like(ids), logit_positions=torch.tensor([[1, 2]]))
    print("logits", tuple(logits.shape), "values", values.numpy().round(4))
    print("largest change of a value by left padding:", f"{(left[:, 2:] - values).abs().max():.1e}")
    print("largest change of a logit by asking for two positions only:", f"{(some - logits[:, 1:3]).abs().max():.1e}")
