"""checks.py: wrong arguments and batches are refused in one sentence, before anything changes. NaN: see test_bad_input.py."""
import pytest
import torch

from checks import out_of_memory, phase
from ppo_core import PPOTrainer
from test_ppo_core import config, distance, make, ragged, review_lm, seeded, sgd, tiny, tokenizer, weights    # noqa: F401


def test_a_ratio_that_is_not_1_stops_the_run_and_names_the_causes():
    trainer = make()
    before = weights(trainer)
    # a layer that differs between train and eval mode under a name that disable_dropout cannot know
    trainer.model.pretrained_model.transformer.ln_f.register_forward_hook(
        lambda module, _, output: output * 1.1 if module.training else output)
    with pytest.raises(RuntimeError, match="ratio is not 1.*dropout.*weights changed"):
        trainer.step(*ragged())
    assert distance(weights(trainer), before) == 0


def long(n):
    return torch.ones(n, dtype=torch.long)


@pytest.mark.parametrize("change, words", [
    (lambda q, r, s: (q[:3], r, s), "queries has 3 samples but batch_size is 4"),
    (lambda q, r, s: (q, r[:2], s), "responses has 2 samples but batch_size is 4"),
    (lambda q, r, s: (q, r, s[:1]), "scores must be 4 numbers.* list of 1"),
    (lambda q, r, s: (torch.ones(4, 2), r, s), r"queries must be a list.*Tensor of shape \(4, 2\)"),
    (lambda q, r, s: (q, [x.tolist() for x in r], s), "responses must be a list.*list of 4: list"),
    (lambda q, r, s: (q, [x.float() for x in r], s), "sample 0 has floating-point tokens"),
    (lambda q, r, s: ([long(0), *q[1:]], r, s), "query 0 has 0 tokens"),
    (lambda q, r, s: (q, r, [*s[:2], float("nan"), s[3]]), r"the scores of sample 2 of 4 \(mini-batch 1\) are nan"),
    (lambda q, r, s: (q, r, [float("inf"), *s[1:]]), r"the scores of sample 0 of 4 \(mini-batch 1\) are inf"),
    (lambda q, r, s: (q, r, ["good", *s[1:]]), "score 0 of 4 is 'good'"),
    (lambda q, r, s: (q, [*r[:3], long(500)], s), r"query of 4 tokens .*needs 504 positions but the model has \d+"),
    (lambda q, r, s: (q, r, s, [long(3)] * 4), r"response_masks\[0\] has 3 entries but response 0 has 1"),
])
def test_bad_input_to_step_is_refused_with_both_numbers_and_nothing_changes(change, words):
    trainer = make()
    before = weights(trainer)
    with pytest.raises(ValueError, match=words):
        trainer.step(*change(*ragged()))
    assert distance(weights(trainer), before) == 0


def test_generation_past_the_models_positions_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"query of 6 tokens with its response needs 506 positions but the model has \d+; use at most"):
        make().generate(ragged()[0], max_new_tokens=500)


def test_wrong_constructor_arguments_are_refused():
    model, ref, tok = tiny(), tiny(), tokenizer()
    other = tiny()
    with pytest.raises(ValueError, match="PPOConfig"):
        PPOTrainer({}, model, ref, tok)
    with pytest.raises(ValueError, match="AutoModelForCausalLMWithValueHead"):
        PPOTrainer(config(), model.pretrained_model, ref, tok)
    with pytest.raises(ValueError, match="tokenizer is a str"):
        PPOTrainer(config(), model, ref, "gpt2")
    with pytest.raises(ValueError, match="num_shared_layers is 2 but a ref_model is given"):
        PPOTrainer(config(), model, ref, tok, num_shared_layers=2)
    with pytest.raises(ValueError, match="of the optimizer's parameters are not the model's"):
        PPOTrainer(config(), model, ref, tok, optimizer=sgd(other))
    with pytest.raises(ValueError, match="another optimizer"):
        PPOTrainer(config(), model, ref, tok, optimizer=sgd(model),
                   lr_scheduler=torch.optim.lr_scheduler.ConstantLR(sgd(model)))


def test_a_schedule_that_needs_a_metric_is_refused():
    model = tiny()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="ReduceLROnPlateau; give one .* that steps without a metric"):
        PPOTrainer(config(), model, None, tokenizer(), optimizer=optimizer,
                   lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


def test_a_schedule_without_its_optimizer_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="an lr_scheduler is given but 0 optimizers"):
        PPOTrainer(config(), model, None, tokenizer(), lr_scheduler=torch.optim.lr_scheduler.ConstantLR(sgd(model)))


def test_a_quantized_policy_is_refused():
    with pytest.raises(ValueError, match="0 of its quantized weights can be trained"):
        PPOTrainer(config(), review_lm(8), None, tokenizer())


def test_a_gpu_without_memory_is_named_also_where_torch_gives_no_numbers_and_by_whatever_hides_it():
    error = torch.OutOfMemoryError("HIP error:\nout of memory")
    with pytest.raises(ValueError, match=r"^set-up of the models: HIP error: out of memory; a new run needs less with a smaller model, "
                                         r"--reference_bits 8, more --num_shared_layers, or a stage of ZeRO on several GPUs$") as caught:
        with phase("set-up of the models"):
            raise ValueError("'./model' cannot be loaded") from error       # as checks.loading says of any error
    assert caught.value.__cause__.__cause__ is error
    assert out_of_memory("evaluation", ValueError("something else")) is None
