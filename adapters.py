"""Adapters (LoRA and its relatives, by peft): small trained layers inside a model that stays as it is.

Why: full fine-tuning needs weights, gradients and Adam's state of every parameter, and a second model as the
reference. With adapters a hundredth of the parameters or less is trained, the frozen model may be stored in 8
or 4 bits, and without its adapters it is the reference: no second model is needed.
Source: Hu et al. 2021 (LoRA, arXiv 2106.09685); Dettmers et al. 2023 (4 bits, arXiv 2305.14314).
Differs from TRL 0.11.4 in: adapters that are loaded from a folder are trained unless is_trainable=False, and
are then themselves the reference (see reference.AdapterReference); the value head is saved beside them in
value_head.safetensors.
Shapes: a LoRA of rank r adds x A B to what a layer gives: x (B, T, H), A (H, r), B (r, H'). B starts at 0.
Copy me: needs torch, transformers and peft, and value_head.py beside it. Tested by tests/test_adapters.py.
"""
import copy
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import warnings
from contextlib import contextmanager

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file

import value_head

OLDEST_PEFT = (0, 18)                           # the first for transformers 5


class AutoModelForCausalLMWithValueHead(value_head.AutoModelForCausalLMWithValueHead):
    """value_head's class, for models with adapters too: .pretrained_model is then peft's PeftModel."""

    def __init__(self, pretrained_model, **head_arguments):
        is_peft_model = hasattr(pretrained_model, "get_base_model")
        refuse_other_adapters(pretrained_model, is_peft_model)
        super().__init__(pretrained_model, **head_arguments)
        self.is_peft_model = is_peft_model
        if self.is_peft_model:
            parameters = inspect.signature(pretrained_model.get_base_model().forward).parameters
            self.takes_position_ids = "position_ids" in parameters

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, peft_config=None, is_trainable=True,
                        **kwargs):
        """As in value_head, and: peft_config: peft's settings, such as LoraConfig(r=8): the model is frozen,
        and new adapters are trained. Of a folder of adapters those are used; is_trainable=False freezes them.

        A model in 8 or 4 bits can be trained like this. ValueError: adapters do not fit the model.
        """
        if isinstance(pretrained_model_name_or_path, nn.Module):
            given = kwargs if is_trainable else {"is_trainable": False, **kwargs}
            for key in given:
                if key not in value_head.HEAD_ARGUMENTS:
                    raise ValueError(f"{key} is about a model that is loaded, but a model was given; leave "
                                     "it out, or give a folder's name")
            return cls(add_adapters(pretrained_model_name_or_path, peft_config=peft_config), **kwargs)
        name = os.fspath(pretrained_model_name_or_path)
        place = {key: kwargs[key] for key in value_head.PLACE_ARGUMENTS if key in kwargs}
        base = base_model(name, **place)
        if base is None and not is_trainable:
            raise ValueError(f"is_trainable=False is about saved adapters, and {name!r} has none; leave it "
                             "out")
        if base is not None:        # revision and subfolder belong to the adapters; the base has its own
            kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
        whole = super().from_pretrained(base or name, *args, **kwargs)
        if base is None and peft_config is None:
            return whole
        model = cls(add_adapters(whole.pretrained_model, base and name, peft_config, is_trainable, **place))
        model.v_head = whole.v_head
        head = value_head.find_value_head(name, **place) if base else None
        if head is not None:
            value_head.load_value_head(model.v_head, head, name)
        return model

    @contextmanager
    def without_adapters(self):
        """Inside the `with` block the adapters are switched off."""
        flags = {parameter: parameter.requires_grad for parameter in self.parameters()}
        try:
            with self.pretrained_model.disable_adapter():
                yield
        finally:
            for parameter, flag in flags.items():       # peft turns it on for frozen adapters, too
                parameter.requires_grad_(flag)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """With adapters: their tensors, named as in peft, all else that is trained, and `v_head.*`."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.is_peft_model:
            names = {f"{prefix}{name}" for name in trained_names(self.pretrained_model)}
            for name in [n for n in state if n not in names and not n.startswith(f"{prefix}v_head.")]:
                del state[name]
        return state

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """The inverse of `state_dict`. strict=True: a missing or an unknown tensor is a RuntimeError."""
        if self.is_peft_model:
            missing = set(self.state_dict()) - set(state_dict)
            unknown = set(state_dict) - set(super().state_dict())
            for names, what in ((missing, "trained tensors are missing"), (unknown, "tensors are unknown")):
                if strict and names:
                    raise RuntimeError(f"{len(names)} {what}, {min(names)} first")
            strict = False          # the tensors of the frozen model are not in state_dict
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(self, folder, **kwargs):
        """With adapters: what peft writes, and value_head.safetensors; of kwargs only state_dict is used."""
        if not self.is_peft_model:
            return super().save_pretrained(folder, **kwargs)
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub is True, but adapters are not pushed; upload what is saved")
        state = kwargs.get("state_dict") or self.state_dict()
        # peft would ask a hub whether embeddings were resized; those that are trained are saved in any case.
        self.pretrained_model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        head = {name: tensor.contiguous() for name, tensor in state.items() if name.startswith("v_head.")}
        save_file(head, os.path.join(folder, "value_head.safetensors"), metadata={"format": "pt"})

    def save_merged(self, folder, **kwargs):
        """Write a whole language model, the adapters added to its weights, which needs no peft to be loaded.

        For a moment this needs the memory of a second model.
        """
        copy.deepcopy(self.pretrained_model).merge_and_unload().save_pretrained(folder, **kwargs)

    def adapters_add_nothing(self):
        """True if switching the adapters off changes nothing, as with new ones: each is a pair of LoRA's
        factors A, B of which one is 0, and nothing else of the language model is trained."""
        tensors = dict(self.pretrained_model.named_parameters())

        def is_zero(name):
            return name in tensors and not tensors[name].any()

        factor = "lora_(embedding_)?[AB]"
        pairs = [(re.sub(factor, r"lora_\1A", name), re.sub(factor, r"lora_\1B", name))
                 for name in trained_names(self.pretrained_model)]
        return all(first != second and (is_zero(first) or is_zero(second)) for first, second in pairs)


def base_model(name, **place):
    """-> the base model that adapter_config.json names, if `name` holds adapters; otherwise None.

    name: a folder or a hub id. place: keywords that say where to look, such as cache_dir.
    """
    try:
        path = cached_file(name, "adapter_config.json", _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False, **place)
    except OSError:         # it is not there at all, which value_head says better
        return None
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        base = json.load(file).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapters in {name!r} do not name their base model; write "
                         "base_model_name_or_path into their adapter_config.json")
    return base


def add_adapters(model, name=None, peft_config=None, is_trainable=True, **place):
    """-> `model` in peft's wrapper, frozen, with the adapters saved in `name` (see base_model), or new ones.

    If neither is given: `model` as it is. ValueError: adapters do not fit the model, or peft is too old.
    """
    if name is None and peft_config is None:
        return model
    if peft_config is not None and (name is not None or hasattr(model, "get_base_model")):
        raise ValueError("a peft_config is given, but the model has adapters already; leave it out")
    peft = import_peft()
    if name is None and (not isinstance(peft_config, peft.PeftConfig) or peft_config.is_prompt_learning):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}; give the settings of adapters that "
                         "are inside the layers, such as peft.LoraConfig(r=8)")
    if getattr(model, "is_quantized", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            mode = model.training       # a new wrapper is in train mode
            wrapped = (peft.get_peft_model(model, peft_config) if name is None else
                       peft.PeftModel.from_pretrained(model, name, is_trainable=is_trainable, **place))
            return wrapped.train(mode)
    except torch.OutOfMemoryError:      # a RuntimeError that says nothing about the adapters
        raise
    except (RuntimeError, ValueError, UserWarning) as error:    # other sizes, other layers, missing tensors
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the adapters of {name or 'peft_config'} do not fit the model "
                         f"{model.config.name_or_path!r} ({reason}); take those of this model") from error


def refuse_other_adapters(model, is_peft_model):
    """ValueError: `model` has adapters of a kind that cannot be trained or saved here."""
    if getattr(model, "_hf_peft_config_loaded", False):     # transformers' way: the model itself holds them
        raise ValueError("the model's adapters were loaded by transformers; give from_pretrained the name of "
                         "their folder, or load them by peft.AutoPeftModelForCausalLM")
    names = list(model.peft_config) if is_peft_model else ["default"]
    if names != ["default"]:
        raise ValueError(f"the model has {len(names)} adapters ({', '.join(names)}), but it can have one, "
                         "named default; merge the others into the model (merge_and_unload), and give no "
                         "adapter_name")
    if is_peft_model and model.active_peft_config.is_prompt_learning:
        raise ValueError(f"the adapters are of type {model.active_peft_config.peft_type.value}, which adds "
                         "tokens to the prompt; use adapters inside the layers, such as peft.LoraConfig(r=8)")


def lora_settings(r):
    """-> peft's LoraConfig of rank r for all linear layers but lm_head, scaled by 2 as is usual."""
    return import_peft().LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")


def import_peft():
    """-> the module. ValueError: it is missing, or too old."""
    version = importlib.metadata.version("peft") if importlib.util.find_spec("peft") else "0.0"
    if tuple(map(int, version.split(".")[:2])) < OLDEST_PEFT:
        raise ValueError(f"peft is {version} (0.0 = not installed), and adapters need "
                         f"{'.'.join(map(str, OLDEST_PEFT))} or newer; run: pip install -U peft")
    import peft
    return peft


def trained_names(model):
    """-> set of the names of the adapters' tensors and of all else that is trained. model: a PeftModel."""
    part = f".{model.active_adapter}"       # ".default": in the name of every tensor of the adapters
    return {name for name, parameter in model.named_parameters()
            if parameter.requires_grad or f"{part}." in name or name.endswith(part)}


if __name__ == "__main__":
    from peft import LoraConfig
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        GPT2LMHeadModel(config), peft_config=LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = model.eval()(ids)[0]                                                                # (1, 4, 50)
    with model.pretrained_model.disable_adapter():
        print("new adapters change a logit by", (model(ids)[0] - logits).abs().max().item())
    print("trained:", sum(p.numel() for p in model.parameters() if p.requires_grad), "of",
          sum(p.numel() for p in model.parameters()), "parameters")
    print("first of", len(model.state_dict()), "saved tensors:", min(model.state_dict()))
