"""The frozen reference policy: the model as it was before training, which the KL penalty pulls towards.

Why: a policy that maximises a reward model alone soon writes text that only the reward model likes. The penalty needs the
log-probs of the original model, and that model must not move by one bit during training. A second model costs as much as the
first; when both share their first layers, that part is stored once, frozen, and computed once per batch.
Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2. Names are those of TRL 0.11.4.
Differs from TRL 0.11.4 in: layers that are shared really are the same tensors (there, `num_shared_layers` froze the
policy's first layers but kept a second copy of them: 0 of 103 tensors shared); only the embeddings and the first layers
are shared (there, OPT's final norm was frozen too, as it is registered before the layers); a layer number outside the
model is an error with both numbers; the shared layers run once per batch (there, 1 + 1 + ppo_epochs times).
Shapes: the output of the shared layers is (B, T, H), as drawn in ppo_core.py.
Copy me: needs torch. Tested by tests/test_reference.py.
"""
import copy
from contextlib import contextmanager

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
    name, layers = find_layers(model, pattern)
    if not 0 <= num_shared_layers <= len(layers):
        raise ValueError(f"num_shared_layers is {num_shared_layers} but the model has {len(layers)} layers; "
                         f"use a number from 0 to {len(layers)}, or None to share nothing")
    return parameters_below(model, name, num_shared_layers)


def parameters_below(model, layers_name, count):
    """-> list of parameters that are used before block number `count` of the list called `layers_name`."""
    trunk = layers_name[:layers_name.rfind(".") + 1]        # with its dot; "" when the blocks lie at the top
    below, passed = [], False                               # passed: what is registered after the blocks comes after them
    for name, parameter in model.named_parameters():
        if name.startswith(layers_name + "."):
            passed = True
            if int(name[len(layers_name) + 1:].split(".")[0]) < count:
                below.append(parameter)
        elif name.startswith(trunk) and not passed and not after_the_layers(name[len(trunk):]):
            below.append(parameter)
    return below


def unplaced(model, layers_name):
    """-> ids of parameters registered after the blocks beside them that are not known to be used after them: they may feed the blocks."""
    trunk = layers_name[:layers_name.rfind(".") + 1]
    names = [name for name, _ in model.named_parameters() if name.startswith(trunk)]
    last = max(i for i, name in enumerate(names) if name.startswith(layers_name + "."))
    late = {name for name in names[last + 1:] if trunk and not after_the_layers(name[len(trunk):])}
    return {id(p) for name, p in model.named_parameters() if name in late}


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


class SharedTrunk:
    """The first blocks of two models that share them: run once per batch, then replayed.

    Their output is the same in both models and stays so while the policy trains, as everything in them and below them is
    frozen. One pass (or the sampling itself) therefore serves the policy's log-probs, the reference's, and every PPO epoch.
    With nothing shared, `record` and `replay` do nothing.
    """

    def __init__(self, model, reference):
        self.blocks, self.rest = [], None                   # blocks: of both models, the policy's first
        frozen = {id(p) for p in reference.parameters() if not p.requires_grad}
        theirs = dict(reference.named_modules())
        for name, layers in model.named_modules():
            if not isinstance(layers, nn.ModuleList):
                continue
            own = [{id(p) for p in layer.parameters()} for layer in layers]
            count = next((n for n, ids in enumerate(own) if not ids or not ids <= frozen), len(own))
            # Some families hand keys and values of a shared block on to a later one (Gemma3n), so each block has to run.
            hands_on = any(getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False) for layer in layers)
            if count and not hands_on and {id(p) for p in parameters_below(model, name, count)} | unplaced(model, name) <= frozen:
                self.blocks, self.last = [*layers[:count], *theirs[name][:count]], layers[count - 1]
                break

    @contextmanager
    def record(self):
        """The policy runs within it, once. -> dict that then holds "trunk": the blocks' output (b, T, H); {} if none are shared."""
        kept = {}

        def keep(_, inputs, output):
            # GPT-2's blocks give a tensor, Bloom's a tuple with the attention weights, for which nobody has asked
            hidden, *rest = output if isinstance(output, tuple) else (output,)
            if hidden.ndim != 3 or not all(each is None or is_attention(each, hidden) for each in rest):
                self.blocks = []        # more than hidden states goes on from here: these blocks are computed as usual
                return
            self.rest = (None,) * len(rest) if isinstance(output, tuple) else None
            kept["trunk"] = hidden

        handles = [self.last.register_forward_hook(keep)] if self.blocks else []
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replay(self, hidden=None):
        """Within it the shared blocks of either model compute nothing and give `hidden` (b, T, H); None = compute as usual."""
        blocks = [] if hidden is None else self.blocks
        output = hidden if self.rest is None else (hidden, *self.rest)
        before = [vars(block).get("forward") for block in blocks]       # accelerate's hooks put one there too
        for block in blocks:        # their forward, not their place in the list: some models read each block's number or kind
            block.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            for block, forward in zip(blocks, before):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def is_attention(value, hidden):
    """True for attention weights (b, heads, T, T) of hidden states (b, T, H); with keys of earlier tokens (b, heads, T, more)."""
    return getattr(value, "ndim", 0) == 4 and hidden.shape[1] == value.shape[2] <= value.shape[3]


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
    trunk = SharedTrunk(policy, reference)
    with trunk.record() as kept:
        logits = policy(ids).logits
    with trunk.replay(kept["trunk"]):
        print("replayed trunk changes logits by", f"{(policy(ids).logits - logits).abs().max():.1e}")
    print("policy moved by", f"{(policy(ids).logits - before).abs().max():.4f}",
          "reference moved by", (reference(ids).logits - before).abs().max().item())
