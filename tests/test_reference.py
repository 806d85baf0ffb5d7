"""reference.py: the reference never moves by one bit, and what is shared is really the same memory.

What should be shared is written down by hand for each family (SHARED) and compared by address, not by value: two equal
copies have equal values too.
"""
import copy

import pytest
import torch
from torch import nn
from transformers import (AutoModelForCausalLM, BloomConfig, Gemma3nTextConfig, Gemma4TextConfig, GPT2Config, GPTNeoXConfig,
                          LlamaConfig, MptConfig, OPTConfig, Qwen2Config)

from reference import create_reference_model, find_layers, shared_bytes
from value_head import AutoModelForCausalLMWithValueHead

V, LAYERS = 40, 3
IDS = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, **IDS}
CONFIGS = {
    "gpt2": lambda: GPT2Config(n_embd=16, n_layer=LAYERS, n_head=2, n_positions=32, **IDS),
    "gpt_neox": lambda: GPTNeoXConfig(intermediate_size=32, **SIZES),
    "llama": lambda: LlamaConfig(num_key_value_heads=1, intermediate_size=32, **SIZES),
    "bloom": lambda: BloomConfig(hidden_size=16, n_layer=LAYERS, n_head=2, **IDS),
    # Narrow embeddings, so that there is a projection before and after the blocks, as in OPT-350m.
    "opt": lambda: OPTConfig(ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=8, **SIZES),
    "qwen2": lambda: Qwen2Config(num_key_value_heads=1, intermediate_size=32, tie_word_embeddings=True, **SIZES),
}
# The list of blocks, and every parameter below the first block by all its names. A tied lm_head is the embedding.
SHARED = {
    "gpt2": ("transformer.h.", ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"]),
    "gpt_neox": ("gpt_neox.layers.", ["gpt_neox.embed_in.weight"]),
    "llama": ("model.layers.", ["model.embed_tokens.weight"]),
    "bloom": ("transformer.h.", ["transformer.word_embeddings.weight", "transformer.word_embeddings_layernorm.weight",
                                 "transformer.word_embeddings_layernorm.bias", "lm_head.weight"]),
    "opt": ("model.decoder.layers.", ["model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight",
                                      "model.decoder.project_in.weight", "lm_head.weight"]),
    "qwen2": ("model.layers.", ["model.embed_tokens.weight", "lm_head.weight"]),
}
every_family = pytest.mark.parametrize("family", CONFIGS)


def small_policy(family="gpt2"):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(CONFIGS[family]())
    model = AutoModelForCausalLMWithValueHead.from_pretrained(lm)
    with torch.no_grad():
        for parameter in model.parameters():        # a fresh model has biases of 0, which would look alike
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def some_ids():
    return torch.randint(1, V, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model):
    training = model.training
    logits, _, values = model.eval()(some_ids(), attention_mask=torch.ones(2, 9, dtype=torch.long))
    model.train(training)
    return logits, values


def named(model):
    """Every name of every parameter, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def expected_names(model, family, layers):
    blocks, embeddings = SHARED[family]
    first = tuple(f"pretrained_model.{blocks}{i}." for i in range(layers))
    return {name for name in named(model) if name.removeprefix("pretrained_model.") in embeddings or name.startswith(first)}


def same_memory(model, reference):
    theirs = named(reference)
    return {name for name, parameter in named(model).items() if theirs[name].data_ptr() == parameter.data_ptr()}


def ten_adam_steps(model):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    ids = some_ids()
    for _ in range(10):
        _, loss, values = model(ids, attention_mask=torch.ones_like(ids), labels=ids)
        optimizer.zero_grad()
        (loss + values.square().mean()).backward()
        optimizer.step()


# ---------------------------------------------------------------------------------------------- nothing is shared


@every_family
def test_without_sharing_the_reference_is_an_equal_frozen_copy(family):
    policy = small_policy(family).train()
    reference = create_reference_model(policy)
    for ours, theirs in zip(outputs(policy), outputs(reference)):
        assert torch.equal(ours, theirs)
    assert not any(p.requires_grad for p in reference.parameters())
    assert not any(module.training for module in reference.modules())


@every_family
def test_without_sharing_the_policy_stays_as_it_was(family):
    policy = small_policy(family).train()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    addresses = {name: p.data_ptr() for name, p in policy.named_parameters()}
    reference = create_reference_model(policy)
    assert all(p.requires_grad for p in policy.parameters())
    assert policy.training
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert {name: p.data_ptr() for name, p in policy.named_parameters()} == addresses
    assert same_memory(policy, reference) == set()
    assert shared_bytes(policy, reference) == 0


# ---------------------------------------------------------------------------------------------- shared layers


@every_family
@pytest.mark.parametrize("layers", [0, 2, LAYERS])
def test_embeddings_and_the_first_layers_are_the_same_memory_and_nothing_else_is(family, layers):
    policy = small_policy(family)
    reference = create_reference_model(policy, num_shared_layers=layers)
    expected = expected_names(policy, family, layers)
    assert len(expected) > len(SHARED[family][1]) or layers == 0
    assert same_memory(policy, reference) == expected
    # No tensor of one model hides under another name in the other one, buffers included.
    ours = {t.data_ptr() for name, t in [*named(policy).items(), *policy.named_buffers()] if name not in expected and t.numel()}
    theirs = {t.data_ptr() for _, t in [*named(reference).items(), *reference.named_buffers()]}
    assert not ours & theirs


@every_family
def test_shared_layers_are_frozen_in_the_policy_and_the_rest_is_trainable(family):
    policy = small_policy(family)
    reference = create_reference_model(policy, num_shared_layers=2)
    frozen = {name for name, p in named(policy).items() if not p.requires_grad}
    assert frozen == expected_names(policy, family, 2)
    assert not any(p.requires_grad for p in reference.parameters())
    assert not reference.training


@every_family
@pytest.mark.parametrize("layers", [None, 0, 2, LAYERS])
def test_the_reference_is_bit_constant_over_ten_updates_of_the_policy(family, layers):
    policy = small_policy(family).train()
    reference = create_reference_model(policy, num_shared_layers=layers)
    before, policy_before = outputs(reference), outputs(policy)
    ten_adam_steps(policy)
    for now, then in zip(outputs(reference), before):
        assert torch.equal(now, then)
    for now, then in zip(outputs(policy), policy_before):
        assert (now - then).abs().max() > 0.01


def test_the_final_norm_of_opt_is_not_shared():
    """It is registered before the layers, so whoever goes by the order of the parameters takes it for an embedding."""
    policy = small_policy("opt")
    names = list(dict(policy.named_parameters()))
    norm = "pretrained_model.model.decoder.final_layer_norm.weight"
    assert names.index(norm) < names.index("pretrained_model.model.decoder.layers.0.self_attn.k_proj.weight")
    reference = create_reference_model(policy, num_shared_layers=LAYERS)
    assert norm not in same_memory(policy, reference)
    assert named(policy)[norm].requires_grad
    assert named(policy)["pretrained_model.model.decoder.project_out.weight"].requires_grad


def test_a_language_model_without_value_head_is_shared_too():
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(CONFIGS["gpt2"]())
    reference = create_reference_model(policy, num_shared_layers=1)
    blocks, embeddings = SHARED["gpt2"]
    assert same_memory(policy, reference) == {n for n in named(policy) if n in embeddings or n.startswith(blocks + "0.")}


# ---------------------------------------------------------------------------------------------- bytes


@every_family
@pytest.mark.parametrize("layers", [0, 2, LAYERS])
def test_shared_bytes_are_those_of_the_shared_parameters(family, layers):
    policy = small_policy(family)
    expected = expected_names(policy, family, layers)
    # named_parameters() gives a tied tensor once
    numbers = sum(p.numel() for name, p in policy.named_parameters() if name in expected)
    assert shared_bytes(policy, create_reference_model(policy, layers)) == 4 * numbers > 0


def test_shared_bytes_count_two_bytes_for_a_half_precision_number():
    full, half = small_policy(), small_policy()
    half.pretrained_model.to(torch.bfloat16)
    ours, theirs = (shared_bytes(model, create_reference_model(model, 2)) for model in (full, half))
    assert ours == 2 * theirs > 0


# ---------------------------------------------------------------------------------------------- errors and patterns


@pytest.mark.parametrize("number", [-1, LAYERS + 1])
def test_a_number_of_layers_outside_the_model_is_an_error_with_both_numbers(number):
    policy = small_policy()
    with pytest.raises(ValueError, match=f"num_shared_layers is {number} but the model has {LAYERS} layers"):
        create_reference_model(policy, num_shared_layers=number)
    assert all(p.requires_grad for p in policy.parameters())


class Backbone(nn.Module):
    """A trunk whose blocks have a name that no pattern knows."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(V, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(LAYERS))
        self.out_norm = nn.LayerNorm(8)

    def forward(self, ids):
        hidden = self.tokens(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden).tanh()
        return self.out_norm(hidden)


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.lm_head = nn.Linear(8, V)

    def forward(self, ids):
        return self.lm_head(self.backbone(ids))


class Flat(Backbone):
    """The same with no trunk around the blocks: they and the head lie side by side."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(8, V)

    def forward(self, ids):
        return self.lm_head(super().forward(ids))


def test_an_unknown_architecture_is_an_error_that_names_the_pattern_argument():
    with pytest.raises(ValueError, match="cannot find the layers of Wrapper.*pattern="):
        create_reference_model(Wrapper(), num_shared_layers=1)
    with pytest.raises(ValueError, match=r"backbone\.layers.*pattern="):
        create_reference_model(Wrapper(), num_shared_layers=1, pattern="backbone.layers.{layer}")


@pytest.mark.parametrize("make, prefix", [(Wrapper, "backbone."), (Flat, "")], ids=["trunk", "flat"])
def test_a_pattern_shares_what_lies_before_the_cut_of_an_unknown_architecture(make, prefix):
    torch.manual_seed(0)
    policy = make()
    reference = create_reference_model(policy, num_shared_layers=1, pattern=prefix + "blocks.{layer}")
    assert same_memory(policy, reference) == {prefix + "tokens.weight", prefix + "blocks.0.weight", prefix + "blocks.0.bias"}
    before = reference(some_ids())
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    policy(some_ids()).square().mean().backward()
    optimizer.step()
    assert torch.equal(reference(some_ids()), before)
    assert not torch.equal(policy(some_ids()), before)


def test_a_pattern_works_for_a_family_of_transformers_that_is_not_listed():
    """MPT calls its blocks `transformer.blocks` and its final norm `norm_f`, after them."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(MptConfig(d_model=16, n_layers=LAYERS, n_heads=2, vocab_size=V))
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(lm)
    with pytest.raises(ValueError, match="MptForCausalLM.*pattern="):
        create_reference_model(policy, num_shared_layers=1)
    reference = create_reference_model(policy, num_shared_layers=1, pattern="transformer.blocks.{layer}")
    shared = {name.removeprefix("pretrained_model.") for name in same_memory(policy, reference)}
    assert {name for name in shared if ".blocks." not in name} == {"transformer.wte.weight", "lm_head.weight"}
    assert {name.split(".")[2] for name in shared if ".blocks." in name} == {"0"}


def test_find_layers_gives_the_name_and_the_blocks():
    policy = small_policy("opt")
    name, layers = find_layers(policy)
    assert name == "pretrained_model.model.decoder.layers"
    assert layers is policy.pretrained_model.model.decoder.layers and len(layers) == LAYERS


# ------------------------------------------------------------------------- the trunk, computed once: speed.py
from speed import SharedTrunk      # noqa: E402


def block_calls(model, family):
    """-> list that grows by the number of each block whose own forward is run (replay puts another in its place)."""
    _, layers = find_layers(model)
    calls = []
    for number, layer in enumerate(layers):
        own = layer.forward
        layer.forward = lambda *args, own=own, number=number, **kwargs: (calls.append(number), own(*args, **kwargs))[1]
    return calls


@every_family
@pytest.mark.parametrize("layers", [1, 2, LAYERS])
def test_a_replayed_trunk_gives_both_models_their_own_outputs_and_runs_no_shared_block(family, layers):
    policy = small_policy(family).eval()
    reference = create_reference_model(policy, layers)
    with torch.no_grad():
        for parameter in policy.parameters():       # as after some updates: the two models now differ above the trunk
            if parameter.requires_grad:
                parameter.mul_(1.1)
    expected = [outputs(policy), outputs(reference)]
    assert not torch.equal(expected[0][0], expected[1][0])
    trunk = SharedTrunk(policy, reference)
    with trunk.record() as kept:
        recorded = outputs(policy)
    assert torch.equal(recorded[0], expected[0][0]) and kept["trunk"].shape == (2, 9, 16) and not kept["trunk"].requires_grad
    calls = block_calls(policy, family)
    with trunk.replay(kept["trunk"]):
        for model, (logits, values) in zip((policy, reference), expected):
            for ours, theirs in zip(outputs(model), (logits, values)):
                assert torch.allclose(ours, theirs, atol=1e-5)
    assert calls == list(range(layers, LAYERS))
    assert outputs(policy) and calls[LAYERS - layers:] == list(range(LAYERS))       # and all is as before afterwards


def test_what_is_replayed_is_what_the_models_see():
    policy = small_policy().eval()
    reference = create_reference_model(policy, 2)
    trunk = SharedTrunk(policy, reference)
    with trunk.record() as kept:
        before = outputs(policy)[0]
    with trunk.replay(kept["trunk"].flip(-1)):
        assert not torch.allclose(outputs(policy)[0], before, atol=1e-2)


def test_the_trunk_is_not_reused_where_something_below_it_is_trained():
    policy = small_policy("llama")
    reference = create_reference_model(policy, 2)
    assert SharedTrunk(policy, reference).blocks
    policy.pretrained_model.model.embed_tokens.weight.requires_grad_(True)
    assert not SharedTrunk(policy, reference).blocks


@pytest.mark.parametrize("layers", [None, 0])
def test_without_shared_blocks_there_is_nothing_to_record_or_replay(layers):
    policy = small_policy()
    trunk = SharedTrunk(policy, create_reference_model(policy, layers))
    with trunk.record() as kept:
        before = outputs(policy)[0]
    assert kept == {}
    with trunk.replay(None):
        assert torch.equal(outputs(policy)[0], before)


def test_replay_gives_back_the_forward_it_found_even_when_the_model_raises():
    policy = small_policy()
    trunk = SharedTrunk(policy, create_reference_model(policy, 2))
    block = policy.pretrained_model.transformer.h[0]
    for placed in (None, lambda *args, **kwargs: 1 / 0):        # accelerate puts its own forward on a block
        if placed is not None:
            block.forward = placed
        with pytest.raises(KeyError), trunk.replay(torch.zeros(2, 9, 16)):
            raise KeyError
        assert vars(block).get("forward") is placed


class Block(nn.Module):
    def __init__(self, extra=()):
        super().__init__()
        self.linear, self.extra = nn.Linear(4, 4), extra

    def forward(self, hidden):
        return (self.linear(hidden), *self.extra)


class Trunk(nn.Module):
    """A family of its own: blocks that give a tuple, and parameters registered after them that feed them (as Gemma3n's)."""

    def __init__(self, extra=(), late_input=False):
        super().__init__()
        self.layers = nn.ModuleList(Block(extra) for _ in range(3))
        if late_input:
            self.per_layer_projection = nn.Linear(4, 4)

    def forward(self, hidden):
        hidden = self.per_layer_projection(hidden) if hasattr(self, "per_layer_projection") else hidden
        for layer in self.layers:
            hidden, *_ = layer(hidden)
        return hidden


class WithHead(nn.Module):
    def __init__(self, *arguments, **keywords):
        super().__init__()
        self.model, self.lm_head = Trunk(*arguments, **keywords), nn.Linear(4, 9)

    def forward(self, hidden):
        return self.lm_head(self.model(hidden))


@pytest.mark.parametrize("extra, reused", [((), True), ((None,), True), ((torch.ones(1),), False)])
def test_a_trunk_is_replayed_only_where_hidden_states_are_all_that_goes_on(extra, reused):
    policy = WithHead(extra)
    reference = create_reference_model(policy, 2, pattern="model.layers.{layer}")
    trunk, hidden = SharedTrunk(policy, reference), torch.randn(2, 5, 4)
    with trunk.record() as kept:
        expected = policy(hidden)
    assert bool(kept) == bool(trunk.blocks) == reused
    with trunk.replay(kept.get("trunk")):
        assert torch.allclose(policy(hidden), expected) and torch.allclose(reference(hidden), expected)


def test_a_trunk_with_parameters_that_may_feed_the_blocks_is_not_reused():
    for late_input in (False, True):
        policy = WithHead(late_input=late_input)
        reference = create_reference_model(policy, 2, pattern="model.layers.{layer}")
        assert bool(SharedTrunk(policy, reference).blocks) == (not late_input)


@pytest.mark.parametrize("family, own", [
    (Gemma3nTextConfig, {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6}),
    (Gemma4TextConfig, {"global_head_dim": 8})], ids=["gemma3n", "gemma4"])
@pytest.mark.parametrize("count", [4, None])
def test_blocks_that_read_keys_and_values_of_shared_ones_find_them(family, own, count):
    """Blocks 4 and 5 have none of their own: they read those of 2 and 3. Were 2 and 3 skipped, there would be nothing to read."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32, "pad_token_id": 0}
    config = family(num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3, hidden_size_per_layer_input=4,
                    vocab_size_per_layer_input=V, **own, **sizes)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(AutoModelForCausalLM.from_config(config))
    assert [layer.self_attn.is_kv_shared_layer for layer in policy.pretrained_model.model.layers] == [False] * 4 + [True] * 2
    if count is None:       # all but the last block is one: no parameter that may feed the blocks stands in the way of a replay
        shared = [p.requires_grad_(False) for name, p in policy.named_parameters() if ".layers.5." not in name]
        reference = copy.deepcopy(policy, {id(p): p for p in shared}).requires_grad_(False)
    else:
        reference = create_reference_model(policy, count)
    trunk = SharedTrunk(policy, reference)
    assert shared_bytes(policy, reference) > 0 and not trunk.blocks
    with trunk.record() as kept:
        logits, values = outputs(policy)
    with trunk.replay(kept.get("trunk")):
        for model in (policy, reference):
            assert torch.equal(outputs(model)[0], logits) and torch.equal(outputs(model)[1], values)
