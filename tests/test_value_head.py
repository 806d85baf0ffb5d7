"""value_head.py: the same numbers whatever the padding, the family, and however often the model was saved and loaded.

Every model is tiny and random. All weights are drawn anew (small_model), because a fresh model has biases of 0 and norms
of 1, and what forgets or swaps those would go unseen.
"""
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, BitsAndBytesConfig, BloomConfig, CodeGenConfig, GPT2Config, GPT2Model, GPTJConfig, GPTNeoConfig,
                          GPTNeoXConfig, LlamaConfig, OPTConfig, T5Config, T5ForConditionalGeneration)

from value_head import AutoModelForCausalLMWithValueHead, ValueHead

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden" / "models"
V = 40
IDS = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0}
GPT2_SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **IDS}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **IDS}
CONFIGS = {
    "gpt2": lambda: GPT2Config(**GPT2_SIZES),
    "gptj": lambda: GPTJConfig(rotary_dim=4, **GPT2_SIZES),
    # A window of 3: the local attention has to count real tokens, not padding.
    "gpt_neo": lambda: GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
                                    window_size=3, max_position_embeddings=32, **IDS),
    "gpt_neox": lambda: GPTNeoXConfig(intermediate_size=32, max_position_embeddings=32, **SIZES),
    "codegen": lambda: CodeGenConfig(rotary_dim=4, **{**GPT2_SIZES, "n_head": 4}),
    "opt": lambda: OPTConfig(ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16, **SIZES),
    # As OPT-350m: the embedding and the head are narrower than the trunk, and the norm comes after each block.
    "opt_projected": lambda: OPTConfig(ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=8,
                                       do_layer_norm_before=False, **SIZES),
    "bloom": lambda: BloomConfig(hidden_size=16, n_layer=2, n_head=2, **IDS),
    "llama": lambda: LlamaConfig(num_key_value_heads=1, intermediate_size=32, max_position_embeddings=32, **SIZES),
}
every_family = pytest.mark.parametrize("family", CONFIGS)
some_families = pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])


def small_lm(family="gpt2", seed=0, **changes):
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return lm


def small_model(family="gpt2", seed=0, **changes):
    lm = small_lm(family, seed, **changes)
    return AutoModelForCausalLMWithValueHead.from_pretrained(lm).eval()


def some_ids(rows=2, columns=9):
    ids = torch.randint(1, V, (rows, columns), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids)


@torch.no_grad()
def outputs(model):
    """-> logits and values on fixed inputs, for comparing two models bit by bit."""
    logits, _, values = model(*some_ids())
    return logits, values


def some_loss(logits, values):
    """-> a number whose gradient reaches the language model through both of its outputs."""
    return logits.logsumexp(-1).sum() + values.square().sum()


def assert_same_outputs(one, other):
    for a, b in zip(outputs(one), outputs(other)):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------- forward


@every_family
def test_forward_returns_float32_logits_loss_and_values(family):
    model = small_model(family)
    ids, mask = some_ids()
    logits, loss, values = model(ids, attention_mask=mask)
    assert logits.shape == (2, 9, V) and logits.dtype == torch.float32
    assert values.shape == (2, 9) and values.dtype == torch.float32
    assert loss is None
    assert values.requires_grad and logits.requires_grad


@every_family
def test_padding_on_either_side_changes_no_logprob_and_no_value(family):
    model = small_model(family)
    lengths = (9, 6, 2)
    rows = [some_ids(1, n)[0][0] for n in lengths]
    width = 12
    # The filler is an ordinary token: it must not matter what stands in the padding.
    left, right, left_mask, right_mask = (torch.full((3, width), x) for x in (7, 7, 0, 0))
    for i, row in enumerate(rows):
        left[i, width - len(row):], left_mask[i, width - len(row):] = row, 1
        right[i, :len(row)], right_mask[i, :len(row)] = row, 1
    with torch.no_grad():
        left_logits, _, left_values = model(left, attention_mask=left_mask)
        right_logits, _, right_values = model(right, attention_mask=right_mask)
        for i, row in enumerate(rows):
            logits, _, values = model(row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long))
            n = len(row)
            expected = logits[0].log_softmax(-1)                                                        # (n, V)
            for padded_logits, padded_values in ((left_logits[i, width - n:], left_values[i, width - n:]),
                                                 (right_logits[i, :n], right_values[i, :n])):
                assert (padded_logits.log_softmax(-1) - expected).abs().max() < 1e-4
                assert (padded_values - values[0]).abs().max() < 1e-4


def test_the_padding_test_would_notice_missing_position_ids():
    """Plain GPT-2 on the same kind of input is far off: the 1e-4 above is not met by chance."""
    lm = small_lm()
    ids, mask = some_ids()
    padding = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        plain = lm(ids, attention_mask=mask).logits
        left = lm(torch.cat([padding, ids], 1), attention_mask=torch.cat([padding, mask], 1)).logits[:, 3:]
    assert (left.log_softmax(-1) - plain.log_softmax(-1)).abs().max() > 0.1


def test_given_position_ids_are_used_as_they_are():
    model = small_model()
    ids, mask = some_ids()
    positions = torch.arange(9).flip(0).expand(2, 9)
    with torch.no_grad():
        logits, _, _ = model(ids, attention_mask=mask, position_ids=positions)
        expected = model.pretrained_model(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(logits, expected)
    assert not torch.allclose(logits, outputs(model)[0], atol=0.1)


@every_family
def test_logit_positions_give_the_same_columns_as_the_plain_forward(family):
    model = small_model(family)
    ids, mask = some_ids()
    columns = torch.tensor([[1, 2, 8, 8], [0, 3, 4, 7]])                                                # (B, R)
    widths = []
    hook = model.pretrained_model.get_output_embeddings().register_forward_hook(lambda _, __, out: widths.append(out.shape))
    with torch.no_grad():
        some_logits, _, some_values = model(ids, attention_mask=mask, logit_positions=columns)
    hook.remove()
    logits, values = outputs(model)
    assert widths == [(2, 4, V)]        # the (B, T, V) tensor was never made
    assert some_values.shape == (2, 4)
    assert (some_logits - logits.gather(1, columns[..., None].expand(-1, -1, V))).abs().max() < 1e-5
    assert (some_values - values.gather(1, columns)).abs().max() < 1e-5


@pytest.mark.parametrize("selected", [True, False], ids=["logit_positions", "all_columns"])
@some_families
def test_gradients_of_logits_and_values_reach_the_whole_model(family, selected):
    """They equal those of the plain model's logits and of its last hidden state times the head's weights."""
    ids, mask = some_ids()
    columns = torch.tensor([[1, 2, 8], [0, 3, 4]]) if selected else torch.arange(9).expand(2, 9)        # (B, R)
    model = small_model(family)
    logits, _, values = model(ids, attention_mask=mask, logit_positions=columns if selected else None)
    some_loss(logits, values).backward()
    plain = small_model(family)
    output = plain.pretrained_model(ids, attention_mask=mask, output_hidden_states=True)
    values = output.hidden_states[-1] @ plain.v_head.summary.weight[0] + plain.v_head.summary.bias      # (B, T)
    some_loss(output.logits.gather(1, columns[..., None].expand(-1, -1, V)), values.gather(1, columns)).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4), name


@every_family
def test_labels_give_the_loss_of_the_plain_model(family):
    model = small_model(family)
    ids, mask = some_ids()
    with torch.no_grad():
        _, loss, _ = model(ids, attention_mask=mask, labels=ids)
        assert torch.equal(loss, model.pretrained_model(ids, attention_mask=mask, labels=ids).loss)


@every_family
def test_values_are_the_head_on_the_last_hidden_state(family):
    model = small_model(family)
    ids, mask = some_ids()
    with torch.no_grad():
        hidden = model.pretrained_model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]  # (B, T, H)
        expected = hidden @ model.v_head.summary.weight[0] + model.v_head.summary.bias                  # (B, T)
    assert (outputs(model)[1] - expected).abs().max() < 1e-5


def test_forward_leaves_no_hook_behind_even_when_the_model_raises():
    model = small_model()
    with pytest.raises(Exception):
        model(torch.full((1, 3), V + 1), attention_mask=torch.ones(1, 3, dtype=torch.long))
    outputs(model)
    assert not model.pretrained_model.get_output_embeddings()._forward_pre_hooks


@some_families
def test_past_key_values_continue_a_left_padded_batch(family):
    model = small_model(family)
    ids, mask = some_ids()
    mask[1, :3] = 0                                                                                     # left padding
    with torch.no_grad():
        logits, _, values = model(ids, attention_mask=mask)
        first = model(ids[:, :6], attention_mask=mask[:, :6], return_past_key_values=True, use_cache=True)
        assert len(first) == 4
        later, _, later_values = model(ids[:, 6:], attention_mask=mask, past_key_values=first[3])
    assert (later.log_softmax(-1) - logits[:, 6:].log_softmax(-1)).abs().max() < 1e-4
    assert (later_values - values[:, 6:]).abs().max() < 1e-4


@some_families
def test_generate_continues_a_left_padded_batch_greedily(family):
    model = small_model(family)
    ids, mask = some_ids()
    mask[1, :3] = 0         # left padding that only the mask tells from text: its tokens are not the pad token
    tokens = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=4, eos_token_id=None,
                            pad_token_id=0)
    assert tokens.shape == (2, 13) and torch.equal(tokens[:, :9], ids)
    with torch.no_grad():
        logits, _, _ = model(tokens, attention_mask=torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1))
    assert torch.equal(logits[:, 8:-1].argmax(-1), tokens[:, 9:])


# ---------------------------------------------------------------------------------------------- names and state


@every_family
def test_state_dict_names_are_those_of_the_language_model_and_the_head(family):
    lm = small_lm(family)
    names = list(lm.state_dict())
    model = AutoModelForCausalLMWithValueHead.from_pretrained(lm)
    assert list(model.state_dict()) == names + ["v_head.summary.weight", "v_head.summary.bias"]


def test_load_state_dict_restores_the_model_and_the_head():
    model, other = small_model(seed=0), small_model(seed=1)
    assert not torch.equal(outputs(model)[1], outputs(other)[1])
    other.load_state_dict(model.state_dict())
    assert_same_outputs(model, other)


def test_load_state_dict_refuses_a_state_without_head():
    model = small_model()
    state = {k: v for k, v in model.state_dict().items() if k != "v_head.summary.bias"}
    with pytest.raises(RuntimeError, match="summary.bias"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="summary.weight"):
        model.load_state_dict(small_lm().state_dict())
    model.load_state_dict(small_lm(seed=1).state_dict(), strict=False)      # as asked: the head stays what it was


def test_load_state_dict_refuses_a_state_without_a_layer():
    model = small_model()
    state = {k: v for k, v in model.state_dict().items() if k != "transformer.ln_f.bias"}
    with pytest.raises(RuntimeError, match="ln_f.bias"):
        model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------- save and load


def our_messages(caplog):
    """What value_head.py logged; transformers has its own report of what it loaded."""
    return [record.getMessage() for record in caplog.records if record.name == "value_head"]


@every_family
def test_a_saved_model_loads_bit_equal(family, tmp_path):
    model = small_model(family)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    assert_same_outputs(model, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).eval())


@some_families
def test_a_sharded_model_loads_bit_equal(family, tmp_path):
    model = small_model(family)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 3
    assert not (tmp_path / "model.safetensors").exists()
    torch.manual_seed(99)
    assert_same_outputs(model, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize("sizes", [("4KB", "1GB"), ("1GB", "4KB")], ids=["sharded_then_whole", "whole_then_sharded"])
def test_saving_again_with_another_shard_size_replaces_model_and_head(sizes, tmp_path):
    small_model(seed=0).save_pretrained(tmp_path, max_shard_size=sizes[0])
    newer = small_model(seed=1)
    newer.save_pretrained(tmp_path, max_shard_size=sizes[1])
    assert_same_outputs(newer, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize("older", ["pytorch_model.bin", "shards"])
def test_the_head_comes_from_the_file_that_the_weights_come_from(older, tmp_path):
    """transformers takes model.safetensors if there is one; what an older save left beside it is not looked at."""
    old, new = small_model(seed=0), small_model(seed=1)
    if older == "shards":
        old.save_pretrained(tmp_path / "old", max_shard_size="4KB")
    else:
        (tmp_path / "old").mkdir()
        torch.save(dict(old.state_dict()), tmp_path / "old" / older)
    new.save_pretrained(tmp_path / "new")
    for file in (tmp_path / "old").glob("*model*"):
        shutil.copy(file, tmp_path / "new")
    assert_same_outputs(new, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "new").eval())


@some_families
def test_plain_transformers_loads_a_saved_model_with_equal_logits(family, tmp_path):
    model = small_model(family)
    model.save_pretrained(tmp_path)
    ids, mask = some_ids()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids, attention_mask=mask).logits
    assert torch.equal(plain, outputs(model)[0])


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_a_checkpoint_of_trl_loads_with_its_value_head(family, caplog):
    saved = load_file(GOLDEN / family / "model.safetensors")
    with caplog.at_level(logging.WARNING, logger="value_head"):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / family)
    state = model.state_dict()
    assert {"v_head.summary.weight", "v_head.summary.bias"} <= set(saved)
    for name, tensor in saved.items():
        assert torch.equal(state[name], tensor), name
    assert not our_messages(caplog)


def test_a_value_head_in_a_pytorch_bin_checkpoint_is_loaded(tmp_path):
    """The format of older TRL checkpoints; transformers still reads it, so the head in it must not get lost."""
    model = small_model()
    model.save_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    torch.save(dict(model.state_dict()), tmp_path / "pytorch_model.bin")
    assert_same_outputs(model, AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).eval())


def test_a_plain_language_model_loads_and_its_missing_head_is_said_aloud(tmp_path, caplog):
    """At level INFO: a language model without a head is the usual start of a run."""
    lm = small_lm()
    lm.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="value_head"):
        model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path)).eval()
    record, = [record for record in caplog.records if record.name == "value_head"]
    assert f"no value head in {tmp_path}" in record.getMessage() and record.levelno == logging.INFO
    ids, mask = some_ids()
    with torch.no_grad():
        assert torch.equal(outputs(model)[0], lm(ids, attention_mask=mask).logits)


def test_a_head_that_was_saved_and_is_missing_is_a_warning_and_half_of_one_is_refused(tmp_path, caplog):
    small_model().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("v_head.summary.bias")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the value head of .*get its files again"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    state.pop("v_head.summary.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, logger="value_head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    message, = our_messages(caplog)
    assert f"no value head in {tmp_path}" in message


def test_a_language_model_saved_alone_after_its_head_was_saved_expects_no_head(tmp_path, caplog):
    small_model().save_pretrained(tmp_path / "with_head")
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "with_head")
    loaded.save_pretrained(tmp_path / "again")
    loaded.pretrained_model.save_pretrained(tmp_path / "alone")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("with_head", "again", "alone")]
    assert [config.get("value_head") for config in configs] == [True, True, None]
    with caplog.at_level(logging.WARNING, logger="value_head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "alone")
    assert not our_messages(caplog)


def test_from_pretrained_takes_a_string_a_path_and_a_loaded_model(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    assert_same_outputs(model, AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path)).eval())
    assert_same_outputs(model, AutoModelForCausalLMWithValueHead.from_pretrained(Path(tmp_path)).eval())
    lm = small_lm()
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(lm)
    assert wrapped.pretrained_model is lm and wrapped.config is lm.config


# ----------------------------------------------------------------------------------------------------- keywords


@pytest.mark.parametrize("keyword", ["torch_dtype", "dtype"])
def test_a_type_that_is_asked_for_holds_for_the_model_but_not_for_the_head(keyword, tmp_path):
    small_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, **{keyword: torch.bfloat16})
    assert {p.dtype for p in model.pretrained_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.v_head.parameters()} == {torch.float32}
    logits, values = outputs(model)
    assert logits.dtype == torch.float32 and values.dtype == torch.float32


def test_a_bf16_model_keeps_its_float32_head_through_save_and_load(tmp_path):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(small_lm().to(torch.bfloat16)).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert_same_outputs(model, again)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_weights_load_as_float32_from_a_half_precision_checkpoint(stored, tmp_path):
    small_lm().to(stored).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {stored}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_head_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    head, hidden = ValueHead(64, summary_dropout_prob=0.0), torch.randn(2, 3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert values.dtype == torch.float32
    assert torch.equal(values, head(hidden))


def test_other_keywords_go_to_the_language_model(tmp_path):
    small_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, device_map="cpu", attn_implementation="eager",
                                                              summary_dropout_prob=0.3)
    assert model.config._attn_implementation == "eager"
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.v_head.dropout.p == 0.3
    assert AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_the_subfolder_keyword_finds_model_and_head(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "step_2")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, subfolder="step_2").eval()
    assert_same_outputs(model, again)


def test_cache_dir_and_revision_find_model_and_head(tmp_path):
    heads = {}
    for i, revision in enumerate(("main", "step_2")):
        model = small_model(seed=i)
        fill_hub_cache(tmp_path, "someone/model", revision, str(i) * 40, model)
        heads[revision] = model
    for revision, model in heads.items():
        loaded = AutoModelForCausalLMWithValueHead.from_pretrained("someone/model", cache_dir=tmp_path, revision=revision)
        assert_same_outputs(model, loaded.eval())


def test_dropout_of_the_head_is_the_argument_and_acts_in_train_mode_only():
    lm = small_lm()
    assert AutoModelForCausalLMWithValueHead.from_pretrained(lm).v_head.dropout.p == 0.1
    head = AutoModelForCausalLMWithValueHead.from_pretrained(lm, summary_dropout_prob=0.5).v_head
    assert head.dropout.p == 0.5
    hidden = torch.randn(1, 64, 16)
    assert not torch.equal(head.train()(hidden), head.eval()(hidden))
    off = AutoModelForCausalLMWithValueHead.from_pretrained(lm, summary_dropout_prob=None).v_head.train()
    assert torch.equal(off(hidden), off.eval()(hidden))


def test_initialisation_strategies_of_the_head():
    lm = small_lm()

    def head(**arguments):
        torch.manual_seed(3)
        return AutoModelForCausalLMWithValueHead.from_pretrained(lm, **arguments).v_head.summary

    zero = head(v_head_init_strategy="zero")
    assert not zero.weight.any() and not zero.bias.any()
    one, three = (head(v_head_init_strategy="normal", v_head_initializer_range=r) for r in (0.1, 0.3))
    assert one.weight.any() and torch.allclose(3 * one.weight, three.weight)
    assert not one.bias.any()
    wide = ValueHead(4096, v_head_init_strategy="normal", v_head_initializer_range=0.05).summary.weight
    assert abs(wide.std().item() - 0.05) < 0.005
    with pytest.raises(ValueError, match="'uniform'.*'normal' or 'zero'"):
        head(v_head_init_strategy="uniform")


def test_the_same_seed_gives_the_same_new_head(tmp_path):
    small_lm().save_pretrained(tmp_path)

    def head(seed):
        torch.manual_seed(seed)
        return AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path).v_head.summary.weight

    assert torch.equal(head(5), head(5))
    assert not torch.equal(head(5), head(6))


# ------------------------------------------------------------------------------------------------------- errors


def test_a_model_without_language_model_head_is_refused():
    with pytest.raises(ValueError, match="GPT2Model has no causal language-model head.*AutoModelForCausalLM"):
        AutoModelForCausalLMWithValueHead.from_pretrained(GPT2Model(CONFIGS["gpt2"]()))


def test_an_encoder_decoder_is_refused_loaded_or_from_a_folder(tmp_path):
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                                             decoder_start_token_id=0))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no causal"):
        AutoModelForCausalLMWithValueHead.from_pretrained(t5)
    t5.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="T5Config"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["no/such-model", "nosuchmodel", "/no/such/folder", "not a name"])
def test_an_unknown_name_is_an_error_with_a_remedy(name):
    with pytest.raises(ValueError, match="save_pretrained") as error:
        AutoModelForCausalLMWithValueHead.from_pretrained(name)
    assert repr(name) in str(error.value)


def test_a_folder_without_weights_is_an_error_with_a_remedy(tmp_path):
    CONFIGS["gpt2"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights.*save_pretrained"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("architectures", ["as saved", None, 7])
def test_a_classifier_is_refused_as_a_model(architectures, tmp_path):
    """Its lm_head is tied to the embedding, so no tensor is missing, but it was not trained to write text."""
    shutil.copytree(ROOT / "assets" / "review-sentiment", tmp_path / "review-sentiment")
    path = tmp_path / "review-sentiment" / "config.json"
    if architectures != "as saved":         # the weights tell it, whatever config.json says
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
    with pytest.raises(ValueError, match="review-sentiment' is a classifier: its weights hold score.weight and 0 trained") as error:
        AutoModelForCausalLMWithValueHead.from_pretrained(path.parent)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ the hub


def fill_hub_cache(cache, name, revision, commit, model):
    """Lay out `model` as a download of the hub would: a file with the revision's commit, and that commit's files."""
    repo = cache / ("models--" + name.replace("/", "--"))
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(commit)
    if isinstance(model, Path):
        shutil.copytree(model, repo / "snapshots" / commit)
    else:
        model.save_pretrained(repo / "snapshots" / commit)


def test_a_hub_id_loads_from_the_cache_with_its_value_head(tmp_path):
    """In a new process, because huggingface_hub reads HF_HOME when it is imported."""
    fill_hub_cache(tmp_path / "hub", "gpt2", "main", "0123456789" * 4, GOLDEN / "gpt2")
    code = ("import sys; from value_head import AutoModelForCausalLMWithValueHead as A; from safetensors.torch import save_file; "
            "m = A.from_pretrained('gpt2'); save_file({k: v.clone() for k, v in m.state_dict().items()}, sys.argv[1])")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):     # these would win over HF_HOME
        environment.pop(name, None)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "state.safetensors")], env=environment, cwd=tmp_path,
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "no value head" not in run.stderr
    loaded = load_file(tmp_path / "state.safetensors")
    for name, tensor in load_file(GOLDEN / "gpt2" / "model.safetensors").items():
        assert torch.equal(loaded[name], tensor), name


# ------------------------------------------------------------------------------------------- in 8 and in 4 bits


REVIEW_LM = ROOT / "assets" / "review-lm"       # 256 wide: 4-bit weights come in blocks of 64


@pytest.mark.parametrize("bits, worst, share", [(8, 0.5, 0.6), (4, 3.0, 0.45)])
def test_the_pages_keywords_load_a_quantized_model_with_its_head(bits, worst, share, tmp_path):
    plain = AutoModelForCausalLMWithValueHead.from_pretrained(REVIEW_LM, v_head_init_strategy="normal").eval()
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, device_map="auto", **{f"load_in_{bits}bit": True}).eval()
    assert (model.is_loaded_in_8bit, model.is_loaded_in_4bit) == (bits == 8, bits == 4)
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear8bitLt" in kinds) == (bits == 8) and ("Linear4bit" in kinds) == (bits == 4)
    assert torch.equal(model.v_head.summary.weight, plain.v_head.summary.weight) and model.v_head.summary.weight.dtype == torch.float32
    (logits, values), (expected, expected_values) = outputs(model), outputs(plain)
    difference = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs().max()
    assert 1e-4 < difference < worst        # rounded, but the same model
    assert values.dtype == torch.float32 and not torch.equal(values, expected_values)
    bytes_of = [each.pretrained_model.get_memory_footprint() for each in (model, plain)]
    assert bytes_of[0] < share * bytes_of[1]


def test_a_flag_for_bits_that_is_off_changes_nothing():
    model = AutoModelForCausalLMWithValueHead.from_pretrained(GOLDEN / "gpt2", load_in_8bit=False, load_in_4bit=False)
    assert not model.is_loaded_in_8bit and {p.dtype for p in model.parameters()} == {torch.float32}


def test_bits_asked_for_in_both_ways_or_without_their_package_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="load_in_8bit and a quantization_config"):
        AutoModelForCausalLMWithValueHead.from_pretrained(REVIEW_LM, load_in_8bit=True,
                                                          quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find_spec(name, *a))
    with pytest.raises(ValueError, match="load_in_4bit needs.*pip install bitsandbytes"):
        AutoModelForCausalLMWithValueHead.from_pretrained(REVIEW_LM, load_in_4bit=True)


@pytest.mark.parametrize("processes, expected", [("1", "auto"), ("2", {"": "cpu"})])
def test_each_of_several_processes_loads_on_its_own_device(processes, expected, monkeypatch, caplog):
    seen, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (seen.append(k["device_map"]), load(*a, **k))[1])
    monkeypatch.setenv("WORLD_SIZE", processes)
    AutoModelForCausalLMWithValueHead.from_pretrained(REVIEW_LM, device_map="auto", load_in_8bit=True)
    assert seen == [expected]
    assert any("device_map='auto' was replaced" in text for text in our_messages(caplog)) == (expected != "auto")


# -------------------------------------------------------------------------------------- gradient checkpointing


def blocks_of(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def gradients_and_calls(model):
    """One backward pass in train mode. -> gradients by name, how often the first block's MLP was computed."""
    calls = []
    hook = blocks_of(model)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids, mask = some_ids()
    logits, _, values = model.train()(ids, attention_mask=mask, use_cache=False)
    model.zero_grad()
    some_loss(logits, values).backward()
    hook.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, len(calls)


@pytest.mark.parametrize("reentrant", [False, True])
@some_families
def test_gradient_checkpointing_recomputes_and_gives_equal_gradients(family, reentrant):
    # Dropout 0, or the recomputation is compared with another network.
    model = small_model(family, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.v_head.dropout.p = 0.0
    expected, calls = gradients_and_calls(model)
    assert calls == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    gradients, calls = gradients_and_calls(model)
    assert calls == 2
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-5, atol=1e-6), name
    model.gradient_checkpointing_disable()
    assert gradients_and_calls(model)[1] == 1


def test_a_saved_head_is_not_reported_as_an_unexpected_weight(tmp_path):
    code = ("from value_head import AutoModelForCausalLMWithValueHead as M; "
            f"M.from_pretrained({str(GOLDEN / 'gpt2')!r}); "
            "from transformers import AutoModelForCausalLM as P; "
            f"print('control', flush=True); P.from_pretrained({str(GOLDEN / 'gpt2')!r})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("LOAD REPORT") == 1, "only plain transformers, which does not know the head, reports it"
