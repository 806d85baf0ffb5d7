"""The frozen reference policy: the model as it was before training, towards which the KL penalty pulls.

Why: a policy that only maximises a reward model soon writes text that only the reward model likes. The
penalty needs the log-probs of the original model, which must not change by one bit. A second model costs as
much memory as the first. There are three ways: a copy; a copy that shares its first layers with the policy,
stored once and frozen; and, where only adapters are trained, the policy without its adapters.
Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2. Names are those of TRL 0.11.4.
Differs from TRL 0.11.4 in: shared layers are the same tensors in both models (TRL kept a second copy of
them); only the embeddings and the first layers are shared (TRL froze OPT's final norm too, because it is
registered before the layers); a layer number outside the model is an error; adapters that were trained
before are their own reference (in TRL the model without them was).
Shapes: every layer maps hidden states (B, T, H) to (B, T, H), as drawn in ppo_core.py.
Copy me: needs torch. Tested by tests/test_reference.py and tests/test_adapters.py.
"""
import copy
import logging
from contextlib import contextmanager

import torch
from torch import nn

logger = logging.getLogger(__name__)

# Where each family keeps its list of layers. The first that fits is used; `pattern=` replaces them all.
LAYER_PATTERNS = (
    "transformer.h.{layer}",            # GPT-2, GPT-J, GPT-Neo, CodeGen, Bloom, Falcon
    "model.decoder.layers.{layer}",     # OPT
    "gpt_neox.layers.{layer}",          # GPT-NeoX, Pythia
    "model.layers.{layer}",             # Llama, Mistral, Qwen, Gemma, Phi, SmolLM
)


def create_reference_model(model, num_shared_layers=None, pattern=None):
    """A frozen copy of `model` in eval mode.

    num_shared_layers: how many of the first layers are shared, together with the embeddings: the same tensors
    in both models, frozen in both. None = nothing is shared and the whole policy can be trained. A tied
    `lm_head` is the same tensor as the embedding, so it is shared and frozen too.
    pattern: where the layers are, for a family not in LAYER_PATTERNS, such as "backbone.blocks.{layer}".
    A model with adapters shares everything: -> an AdapterReference.
    ValueError: the layers are not found, or num_shared_layers is below 0 or above their number.
    """
    if getattr(model, "is_peft_model", False):
        if num_shared_layers is not None:
            raise ValueError(f"num_shared_layers is {num_shared_layers}, but with adapters all layers are "
                             "shared already; leave it out")
        return AdapterReference(model)
    shared = [] if num_shared_layers is None else shared_parameters(model, num_shared_layers, pattern)
    for parameter in shared:
        parameter.requires_grad_(False)
    # The second argument of deepcopy lists objects that it takes as already copied.
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    return reference.requires_grad_(False).eval()


class AdapterReference(nn.Module):
    """The reference of a policy with adapters (adapters.py): that policy itself, without a second model.

    New adapters add nothing, so they are switched off. Adapters that were trained before belong to the
    starting policy: a frozen copy of them takes their place while the reference computes.
    """

    def __init__(self, model):
        super().__init__()
        self.policy, self.start = [model], None     # in a list, or its parameters would be this module's too
        self.trained = [p for p in model.pretrained_model.parameters() if p.requires_grad]
        if not model.adapters_add_nothing():
            self.start = nn.ParameterList(p.detach().clone() for p in self.trained).requires_grad_(False)
        if self.start:
            logger.warning("without its adapters this would be another model: a frozen copy of them "
                           "(%.1f MB) is the reference", sum(p.nbytes for p in self.start) / 1e6)

    @contextmanager
    def in_force(self):
        """Context -> the policy's module, which computes as the reference inside the `with` block."""
        if self.start is None:
            with self.policy[0].without_adapters():
                yield self.policy[0]
            return
        now = [parameter.data for parameter in self.trained]
        try:
            for parameter, start in zip(self.trained, self.start):
                parameter.data = start.to(parameter.device, parameter.dtype)
            yield self.policy[0]
        finally:
            for parameter, data in zip(self.trained, now):
                parameter.data = data

    def forward(self, *args, **kwargs):
        with torch.no_grad(), self.in_force() as model:
            return model(*args, **kwargs)


def shared_parameters(model, num_shared_layers, pattern=None):
    """-> list of the parameters of the embeddings and of the first `num_shared_layers` layers."""
    name, layers = find_layers(model, pattern)
    if not 0 <= num_shared_layers <= len(layers):
        raise ValueError(f"num_shared_layers is {num_shared_layers} but the model has {len(layers)} layers; "
                         f"use a number from 0 to {len(layers)}, or None to share nothing")
    return parameters_below(model, name, num_shared_layers)


def parameters_below(model, layers_name, count):
    """-> list of the parameters used before layer number `count` of the list called `layers_name`."""
    trunk = layers_name[:layers_name.rfind(".") + 1]    # such as "transformer."; "" if there is none
    below, layers_seen = [], False
    for name, parameter in model.named_parameters():
        if name.startswith(layers_name + "."):
            layers_seen = True
            number = int(name.removeprefix(layers_name + ".").split(".")[0])
            if number < count:
                below.append(parameter)
        # A parameter that is registered after the layers is taken to be used after them.
        elif name.startswith(trunk) and not layers_seen and not after_the_layers(name[len(trunk):]):
            below.append(parameter)
    return below


def after_the_layers(name):
    """True for a module that is used after the layers: the final norm, or OPT's project_out.

    name: of a parameter, inside the inner model, such as "ln_f.weight".
    """
    return name.split(".")[0] in {"ln_f", "norm", "final_layer_norm", "final_layernorm", "project_out"}


def find_layers(model, pattern=None):
    """-> (dotted name, ModuleList) of the model's layers. ValueError if no pattern fits."""
    patterns = list(LAYER_PATTERNS) if pattern is None else [pattern]
    modules = dict(model.named_modules())
    for candidate in patterns:
        suffix = candidate.replace(".{layer}", "")
        for name, module in modules.items():
            if isinstance(module, nn.ModuleList) and (name == suffix or name.endswith("." + suffix)):
                return name, module
    kind = type(getattr(model, "pretrained_model", model)).__name__
    raise ValueError(f"cannot find the layers of {kind}: tried {patterns}; "
                     "pass pattern='path.to.layers.{layer}'")


def shared_bytes(model, reference):
    """Bytes of the parameters that are the same memory in both models: what sharing saves."""
    addresses = {p.data_ptr() for p in model.parameters()}
    return sum(p.numel() * p.element_size() for p in reference.parameters() if p.data_ptr() in addresses)


if __name__ == "__main__":
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0)
    policy = GPT2LMHeadModel(config).eval()
    reference = create_reference_model(policy, num_shared_layers=2)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = reference(ids).logits          # (1, 4, 50)
    policy(ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1).step()
    print("bytes shared:", shared_bytes(policy, reference), "of", sum(p.nbytes for p in policy.parameters()))
    print("policy moved by", f"{(policy(ids).logits - before).abs().max():.4f}",
          "reference moved by", (reference(ids).logits - before).abs().max().item())
