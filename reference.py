"""The frozen reference policy: the model as it was before training, which the KL penalty pulls towards.

Why: a policy that maximises a reward model alone soon writes text that only the reward model likes. The penalty needs the
log-probs of the original model, and that model must not move by one bit during training.
Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2. Names are those of TRL 0.11.4.
Differs from TRL 0.11.4 in: layers that are shared really are the same tensors (there, `num_shared_layers` froze the
policy's first layers but kept a second copy of them: 0 of 103 tensors shared); only the embeddings and the first layers
are shared (there, OPT's final norm was frozen too, as it is registered before the layers); a layer number outside the
model is an error with both numbers.
Shapes: none; this file deals in modules and parameters.
Copy me: needs torch. Tested by tests/test_reference.py.
"""
import copy

from torch import nn

# Where each family keeps its list of blocks. The first that is found wins; `pattern=` names any other.
LAYER_PATTERNS = (
    "transformer.h.{layer}",            # GPT-2, GPT-J, GPT-Neo, CodeGen, Bloom, Falcon
    "model.decoder.layers.{layer}",     # OPT
    "gpt_neox.layers.{layer}",          # GPT-NeoX, Pythia
    "model.layers.{layer}",             # Llama, Mistral, Qwen, Gemma, Phi, SmolLM
)


def create_reference_model(model, num_shared_layers=None, pattern=None):
    """A frozen copy of `model` in eval mode.

    num_shared_layers: how many of the first layers, with the embeddings below them, are shared: the same tensors in both
    models, frozen in both. None = nothing is shared and the policy stays fully trainable. A tied `lm_head` is the embedding,
    so it is shared and frozen with it.
    pattern: where the layers are, for a family that is not listed above, such as "backbone.blocks.{layer}".
    ValueError: the layers cannot be found; a number below 0 or above the number of layers.
    """
    shared = [] if num_shared_layers is None else shared_parameters(model, num_shared_layers, pattern)
    for parameter in shared:
        parameter.requires_grad_(False)
    # deepcopy keeps whatever its memo already holds: the shared tensors are not copied, everything else is.
    reference = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    return reference.requires_grad_(False).eval()


def shared_parameters(model, num_shared_layers, pattern=None):
    """-> list of parameters: all that is computed before block number `num_shared_layers` (embeddings and blocks)."""
    layers_name, layers = find_layers(model, pattern)
    if not 0 <= num_shared_layers <= len(layers):
        raise ValueError(f"num_shared_layers is {num_shared_layers} but the model has {len(layers)} layers; "
                         f"use a number from 0 to {len(layers)}, or None to share nothing")
    trunk = layers_name[:layers_name.rfind(".") + 1]        # with its dot; "" when the blocks lie at the top
    shared, passed = [], False                              # passed: what is registered after the blocks comes after them
    for name, parameter in model.named_parameters():
        if name.startswith(layers_name + "."):
            passed = True
            index = int(name[len(layers_name) + 1:].split(".")[0])
            if index < num_shared_layers:
                shared.append(parameter)
        elif name.startswith(trunk) and not passed and not after_the_layers(name[len(trunk):]):
            shared.append(parameter)
    return shared


def after_the_layers(name):
    """True for what a trunk computes after its blocks: the final norm (ln_f, norm, final_layer_norm) and OPT's project_out.

    Everything else beside the blocks is part of the embedding: tokens, positions, their norm (Bloom), project_in (OPT).
    """
    return name.split(".")[0] in {"ln_f", "norm", "final_layer_norm", "final_layernorm", "project_out"}


def find_layers(model, pattern=None):
    """-> (dotted name, ModuleList) of the model's blocks. ValueError names `pattern=` when there is no such list."""
    modules = dict(model.named_modules())
    for candidate in LAYER_PATTERNS if pattern is None else (pattern,):
        suffix = candidate.replace(".{layer}", "")
        for name, module in modules.items():
            if isinstance(module, nn.ModuleList) and (name == suffix or name.endswith("." + suffix)):
                return name, module
    raise ValueError(f"cannot find the layers of {type(getattr(model, 'pretrained_model', model)).__name__}: tried "
                     f"{[pattern] if pattern else list(LAYER_PATTERNS)}; pass pattern='path.to.layers.{{layer}}'")


def shared_bytes(model, reference):
    """Bytes that both models use together: the memory that sharing saves."""
    kept = {p.data_ptr() for p in model.parameters()}
    return sum(p.numel() * p.element_size() for p in reference.parameters() if p.data_ptr() in kept)


if __name__ == "__main__":
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
    reference = create_reference_model(policy, num_shared_layers=2)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = reference(ids).logits                                                            # (1, 4, 50)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    policy(ids, labels=ids).loss.backward()
    optimizer.step()
    print("bytes shared:", shared_bytes(policy, reference), "of", sum(p.nbytes for p in policy.parameters()))
    print("policy moved by", f"{(policy(ids).logits - before).abs().max():.4f}",
          "reference moved by", (reference(ids).logits - before).abs().max().item())
