"""Adapters: what is trained, what is the reference, what is saved. Real peft on tiny real models."""
import copy
import importlib.metadata
import json
import logging

import numpy as np
import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import checkpoint
import distributed
from adapters import AutoModelForCausalLMWithValueHead
from ppo_core import PPOTrainer
from reference import AdapterReference, create_reference_model
from speed import FastPPOTrainer
from test_ppo_core import GOLDEN, config, distance, ragged, seeded, tokenizer, weights      # noqa: F401 (seeded: a fixture)

FAMILIES = ["gpt2", "llama", "bloom"]
both = pytest.mark.parametrize("trainer_class", [PPOTrainer, FastPPOTrainer])


def lora(family="gpt2", **settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "fan_in_fan_out": family == "gpt2", "task_type": "CAUSAL_LM",
                         **settings})


def folder(family="gpt2"):
    return GOLDEN / "models" / family


def with_lora(family="gpt2", **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLMWithValueHead.from_pretrained(folder(family), peft_config=lora(family, **settings))


def make(model, trainer_class=PPOTrainer, lr=0.5, **settings):
    np.random.seed(0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    return trainer_class(config(**settings), model, None, tokenizer(), optimizer=optimizer)


def frozen(model):
    return {n: p.detach().clone() for n, p in model.pretrained_model.named_parameters() if not p.requires_grad}


def ref_logprobs(trainer):
    """-> of three steps, the reference's log-probs of the same responses."""
    return [trainer.step(*ragged())["objective/ref_logprobs"] for _ in range(3)]


def trained_adapters(tmp_path, family="gpt2"):
    """A folder of adapters that a PPO run has trained, with its value head."""
    trainer = make(with_lora(family))
    for _ in range(2):
        trainer.step(*ragged())
    trainer.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", trainer


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_base_model_and_only_adapters_and_head_move(trainer_class, family):
    model = with_lora(family)
    before, start = frozen(model), model.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    trainer = make(model, trainer_class)
    plain = make(AutoModelForCausalLMWithValueHead.from_pretrained(folder(family)), trainer_class, lr=0.0)
    expected = plain.step(*ragged())["objective/logprobs"]
    for found in ref_logprobs(trainer):
        assert (found - expected).abs().max() < 1e-6
    now = frozen(model)
    assert all(torch.equal(now[name], before[name]) for name in before) and len(now) == len(before)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved == set(start) and all("lora_" in name or "v_head" in name for name in moved)
    assert trainer.step(*ragged())["objective/kl"] != 0


def test_the_reference_costs_not_one_byte():
    model = with_lora()
    reference = create_reference_model(model)
    assert isinstance(reference, AdapterReference) and reference.start is None
    assert list(reference.parameters()) == [] and list(reference.buffers()) == []
    assert list(model.parameters()) and all(p is q for p, q in zip(model.parameters(), reference.policy[0].parameters()))


@both
def test_adapters_that_were_trained_before_are_their_own_reference(trainer_class, tmp_path, caplog):
    saved, first = trained_adapters(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(saved)
    frozen_twin = AutoModelForCausalLMWithValueHead.from_pretrained(saved)
    expected = make(frozen_twin, trainer_class, lr=0.0).step(*ragged())["objective/logprobs"]
    base = first.step(*ragged())["objective/ref_logprobs"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer = make(model, trainer_class)
    assert caplog.text.count("this would be another model: a frozen copy of them (") == 1
    found = ref_logprobs(trainer)
    assert all((row - expected).abs().max() < 1e-6 for row in found)
    assert (expected - base).abs().max() > 1e-3         # the base would be another reference
    assert trainer.ref_model.start is not None and not any(p.requires_grad for p in trainer.ref_model.start)


@pytest.mark.parametrize("change, adds_nothing", [
    (lambda model: None, True),
    (lambda model: model.get_parameter("base_model.model.transformer.h.1.mlp.c_fc.lora_B.default.weight").data[3, 1].fill_(0.1), False),
])
def test_switching_off_is_right_only_while_adapters_add_nothing(change, adds_nothing):
    model = with_lora()
    change(model.pretrained_model)
    assert (create_reference_model(model).start is None) == adds_nothing


@pytest.mark.parametrize("family, settings", [("llama", {"init_lora_weights": False}), ("llama", {"use_dora": True}), ("gpt2", {"bias": "all"}),
                                              ("llama", {"modules_to_save": ["lm_head"]}), ("llama", {"init_lora_weights": "pissa"})])
def test_where_switching_off_may_differ_from_the_start_a_copy_is_kept(family, settings):
    """DoRA, trained biases, saved modules, and adapters that begin with a difference, or that change the base."""
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder(family), peft_config=lora(family, **settings))
    expected = make(copy.deepcopy(model), lr=0.0).step(*ragged())["objective/logprobs"]
    trainer = make(model)
    assert all((found - expected).abs().max() < 1e-6 for found in ref_logprobs(trainer)) and trainer.ref_model.start is not None


def test_adapters_that_multiply_have_a_copy_too():
    torch.manual_seed(0)
    peft_config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder("llama"), peft_config=peft_config)
    expected = make(copy.deepcopy(model), lr=0.0).step(*ragged())["objective/logprobs"]
    assert all((found - expected).abs().max() < 1e-6 for found in ref_logprobs(make(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_and_fast_trainer_agree(family):
    results = []
    for trainer_class in (PPOTrainer, FastPPOTrainer):
        trainer = make(with_lora(family), trainer_class, lr=0.05, mini_batch_size=2)
        for _ in range(3):
            trainer.step(*ragged())
        results.append(weights(trainer))
    assert distance(*results) < 1e-5


@both
def test_the_reference_writes_with_the_base_model(trainer_class):
    trainer = make(with_lora(), trainer_class, lr=5.0)
    for _ in range(2):
        trainer.step(*ragged())
    torch.manual_seed(3)
    ours, reference = trainer.generate(ragged()[0], return_prompt=False, max_new_tokens=12, generate_ref_response=True)
    plain = make(AutoModelForCausalLMWithValueHead.from_pretrained(folder()), trainer_class)
    torch.manual_seed(3)
    trainer.generate(ragged()[0], return_prompt=False, max_new_tokens=12)       # the same draws for the policy first
    expected = plain.generate(ragged()[0], return_prompt=False, max_new_tokens=12)
    assert [r.tolist() for r in reference] == [r.tolist() for r in expected] != [r.tolist() for r in ours]


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapters_and_head_are_loaded_again(family, tmp_path):
    saved, trainer = trained_adapters(tmp_path, family)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(saved)
    assert distance(weights(trainer), again.state_dict()) == 0 and set(again.state_dict()) == set(weights(trainer))
    names = {path.name for path in saved.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json"} & names          # the base is not written again
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder(family)), saved)       # peft alone reads it
    assert all(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)
    assert not any(p.requires_grad for n, p in AutoModelForCausalLMWithValueHead.from_pretrained(saved, is_trainable=False).named_parameters()
                   if "lora_" in n)


def test_a_merged_model_needs_no_peft_and_computes_the_same(tmp_path):
    _, trainer = trained_adapters(tmp_path)
    trainer.model.save_merged(tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
        assert (merged - trainer.model(ids)[0]).abs().max() < 1e-5
        assert (merged - AutoModelForCausalLM.from_pretrained(folder())(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_checkpoint_goes_on_bit_for_bit(trained_before, tmp_path):
    def trainer():
        model = AutoModelForCausalLMWithValueHead.from_pretrained(trained_adapters(tmp_path)[0]) if trained_before else with_lora()
        return make(model, FastPPOTrainer)

    def run(trainer):
        shown = []
        for _ in range(2):
            queries, _, scores = ragged()
            responses = trainer.generate(queries, return_prompt=False, max_new_tokens=5)
            stats = trainer.step(queries, responses, scores)
            shown.append(([r.tolist() for r in responses], stats["objective/kl"], stats["ppo/loss/policy"]))
        return shown

    one = trainer()
    run(one)
    checkpoint.save(one, tmp_path / "state")
    expected = run(one)
    twin = trainer()
    checkpoint.load(twin, tmp_path / "state")
    assert run(twin) == expected and distance(weights(one), weights(twin)) == 0
    assert sum(path.stat().st_size for path in (tmp_path / "state").rglob("*")) < 1e6
    other = make(with_lora(r=2), FastPPOTrainer)
    with pytest.raises(ValueError, match="it is of another model"):
        checkpoint.load(other, tmp_path / "state")


@both
def test_a_peft_model_that_the_user_made_is_taken(trainer_class):
    torch.manual_seed(0)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32), lora())
    trainer = make(AutoModelForCausalLMWithValueHead.from_pretrained(wrapped), trainer_class)
    assert trainer.model.pretrained_model is wrapped
    trainer.step(*ragged())
    assert trainer.step(*ragged())["objective/kl"] != 0


@both
def test_gradient_checkpointing_changes_nothing(trainer_class):
    results = []
    for on in (False, True):
        trainer = make(with_lora(lora_dropout=0.3), trainer_class, gradient_checkpointing=on)
        for _ in range(2):
            trainer.step(*ragged())
        results.append(weights(trainer))
    assert distance(*results) < 1e-6


@both
@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True},
                                  {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}])
def test_a_quantized_base_trains_under_adapters(trainer_class, bits, tmp_path):
    torch.manual_seed(0)        # 4 bits come in blocks of 64 numbers
    LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=2, max_position_embeddings=64)).save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, peft_config=lora("llama"), **bits)
    trainer = make(model, trainer_class)
    first = trainer.step(*ragged())
    before = frozen(model)          # bitsandbytes packs weights of 4 bits in another order at their first use on a CPU
    assert abs(first["objective/kl"]) < 1e-4        # policy and reference are the same quantized model
    second = trainer.step(*ragged())
    assert second["objective/kl"] != 0 and all(torch.equal(frozen(model)[name], before[name]) for name in before)
    assert (second["objective/ref_logprobs"] - first["objective/ref_logprobs"]).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------- bad input


def refused(match, make_it):
    with pytest.raises(ValueError, match=match) as caught:
        make_it()
    assert "\n" not in str(caught.value)


def test_wrong_adapter_settings_are_one_sentence(tmp_path, monkeypatch):
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    refused("peft_config is a dict; give the settings of adapters that are inside the layers, such as", lambda: load(folder(), peft_config={"r": 8}))
    refused("peft_config is a PromptTuningConfig; give", lambda: load(folder(), peft_config=PromptTuningConfig(num_virtual_tokens=2)))
    refused("the adapters of peft_config do not fit the model .*gpt2.*; take those of this model",
            lambda: load(folder(), peft_config=lora(target_modules=["nowhere"])))
    refused("a peft_config is given, but the model has adapters already; leave it out", lambda: load(with_lora().pretrained_model, peft_config=lora()))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.13.2" if name == "peft" else version(name))
    refused("peft is 0.13.2 .*, and adapters need 0.18 or newer; run: pip install -U peft", lambda: load(folder(), peft_config=lora()))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_adapters_of_another_kind_are_one_sentence(tmp_path):
    load, base = AutoModelForCausalLMWithValueHead.from_pretrained, AutoModelForCausalLM.from_pretrained
    two = get_peft_model(base(folder()), lora())
    two.add_adapter("second", lora())
    refused(r"the model has 2 adapters \(default, second\), but it can have one, named default; merge the others", lambda: load(two))
    refused(r"the model has 1 adapters \(mine\)", lambda: load(get_peft_model(base(folder()), lora(), adapter_name="mine")))
    prompts = get_peft_model(base(folder()), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    refused("the adapters are of type PROMPT_TUNING, which adds tokens to the prompt; use", lambda: load(prompts))
    of_transformers = base(trained_adapters(tmp_path)[0])
    refused("the model's adapters were loaded by transformers; give from_pretrained the name of their folder", lambda: load(of_transformers))


def test_what_has_no_effect_on_a_given_model_is_refused():
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    language_model = AutoModelForCausalLM.from_pretrained(folder())
    for keywords, name in (({"load_in_8bit": True}, "load_in_8bit"), ({"v_head_init": "normal"}, "v_head_init"), ({"is_trainable": False}, "is_trainable")):
        refused(f"{name} is about a model that is loaded, but a model was given; leave it out", lambda keywords=keywords: load(language_model, **keywords))
    refused("is_trainable=False is about saved adapters, and .*gpt2.* has none", lambda: load(folder(), is_trainable=False))
    assert load(language_model, peft_config=lora(), v_head_init_strategy="zero").v_head.summary.weight.abs().max() == 0


def test_an_unknown_tensor_is_refused_and_adapters_are_not_pushed(tmp_path):
    model = with_lora()
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="1 tensors are unknown, nonsense first"):
        model.load_state_dict({**state, "nonsense": torch.zeros(1)})
    model.load_state_dict({**state, **super(AutoModelForCausalLMWithValueHead, model).state_dict()})       # the frozen model's are known
    refused("adapters are not pushed; upload what is saved", lambda: model.save_pretrained(tmp_path, push_to_hub=True))


def test_an_adapter_folder_that_cannot_be_used_is_one_sentence(tmp_path):
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    saved, _ = trained_adapters(tmp_path)
    refused("a peft_config is given, but the model has adapters already", lambda: load(saved, peft_config=lora()))
    settings = saved / "adapter_config.json"
    edit(settings, base_model_name_or_path=str(folder("llama")))
    refused("the adapters of .*adapters do not fit the model .*llama.*; take those of this model", lambda: load(saved))
    larger = AutoModelForCausalLM.from_pretrained(folder())
    larger.config.n_embd *= 2
    type(larger)(larger.config).save_pretrained(tmp_path / "larger")
    edit(settings, base_model_name_or_path=str(tmp_path / "larger"))
    refused("the adapters of .* do not fit the model .*larger", lambda: load(saved))
    edit(settings, base_model_name_or_path="/no/such/base")
    refused("no model found at '/no/such/base'", lambda: load(saved))
    edit(settings, base_model_name_or_path=None)
    refused("do not name their base model; write base_model_name_or_path into", lambda: load(saved))


def test_what_does_not_go_with_adapters_is_one_sentence():
    model = with_lora()
    plain = AutoModelForCausalLMWithValueHead.from_pretrained(folder())
    refused("a ref_model is given beside a model with adapters", lambda: PPOTrainer(config(), model, plain, tokenizer()))
    refused("num_shared_layers is 1, but with adapters all layers are shared already",
            lambda: PPOTrainer(config(), model, None, tokenizer(), num_shared_layers=1))
    eight = AutoModelForCausalLMWithValueHead.from_pretrained(folder("llama"), load_in_8bit=True)
    refused("0 of its quantized weights can be trained; .* or give it adapters with peft_config=", lambda: PPOTrainer(config(), eight, None, tokenizer()))


def frozen_flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@both
def test_frozen_adapters_are_a_part_of_the_reference_and_stay_frozen(trainer_class, tmp_path):
    """Only the head is trained, so policy and reference are the same model, with its adapters."""
    saved, _ = trained_adapters(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(saved, is_trainable=False)
    flags, trainer = frozen_flags(model), make(model, trainer_class)
    assert flags == {name: "v_head" in name for name in flags}
    for _ in range(2):
        stats = trainer.step(*ragged())
        assert (stats["objective/logprobs"] - stats["objective/ref_logprobs"]).abs().max() < 1e-5
    assert frozen_flags(model) == flags
    base = make(AutoModelForCausalLMWithValueHead.from_pretrained(folder()), trainer_class).step(*ragged())
    assert (base["objective/logprobs"] - stats["objective/ref_logprobs"]).abs().max() > 1e-3


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_factor_that_the_user_froze_stays_frozen(trained_before, tmp_path):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(trained_adapters(tmp_path)[0]) if trained_before else with_lora()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    flags = frozen_flags(model)
    expected = make(copy.deepcopy(model), lr=0.0).step(*ragged())["objective/logprobs"]
    found = ref_logprobs(make(model))
    assert frozen_flags(model) == flags and all((row - expected).abs().max() < 1e-6 for row in found)


def test_trained_adapters_that_are_frozen_beside_new_ones_stay_in_the_reference(tmp_path):
    """One layer's adapters were trained and are frozen now, the others are new: switching all off would be wrong."""
    model = AutoModelForCausalLMWithValueHead.from_pretrained(trained_adapters(tmp_path)[0])
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".h.0." in name:
            parameter.requires_grad_(False)
        elif "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    expected = make(copy.deepcopy(model), lr=0.0).step(*ragged())["objective/logprobs"]
    assert all((row - expected).abs().max() < 1e-6 for row in ref_logprobs(make(model)))


def test_adapters_in_a_subfolder_are_found_and_their_base_is_not_looked_for_there(tmp_path):
    saved, trainer = trained_adapters(tmp_path)
    saved.rename(tmp_path / "checkpoint-100")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, subfolder="checkpoint-100")
    assert distance(weights(trainer), again.state_dict()) == 0


def test_new_adapters_leave_the_model_in_the_mode_in_which_it_was():
    assert not with_lora().training and not any(module.training for module in with_lora().modules())


def test_a_head_that_is_missing_or_of_another_size_is_refused(tmp_path):
    model = with_lora()
    state = {name: tensor for name, tensor in model.state_dict().items() if "v_head" not in name}
    with pytest.raises(RuntimeError, match="2 trained tensors are missing, v_head.summary.bias first"):
        model.load_state_dict(state)
    saved, _ = trained_adapters(tmp_path)
    save_file({"v_head.summary.weight": torch.zeros(1, 3), "v_head.summary.bias": torch.zeros(1)}, saved / "value_head.safetensors")
    refused("the value head of .*adapters' is .*, not ", lambda: AutoModelForCausalLMWithValueHead.from_pretrained(saved))


def test_out_of_memory_is_not_called_a_wrong_adapter(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peft, "get_peft_model", full)
    with pytest.raises(torch.OutOfMemoryError):
        with_lora()


def test_zero_3_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "zero_stage", lambda accelerator: 3)
    refused("with adapters 0 weights may be divided, as ZeRO-3 does; take ZeRO-2", lambda: make(with_lora()))


def test_the_reference_that_the_user_made_is_the_default_one():
    results = []
    for explicit in (True, False):
        model = with_lora()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        np.random.seed(0)
        trainer = FastPPOTrainer(config(), model, create_reference_model(model) if explicit else None, tokenizer(), optimizer=optimizer)
        for _ in range(2):
            trainer.step(*ragged())
        results.append(weights(trainer))
    assert distance(*results) == 0
