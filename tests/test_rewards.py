"""rewards.py: scores are checked and scaled by the book, and land on the right token."""
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from rewards import (AdaptiveKLController, FixedKLController, RunningMoments, check_scores, full_kl, kl_penalty, load_reward_fn,
                     load_reward_model, process_scores, score_texts, token_rewards)

TOKENIZER = Path(__file__).resolve().parent / "golden" / "tokenizer"

# ---------------------------------------------------------------------------------------------- check_scores


@pytest.mark.parametrize("scores", [
    [1, -2, 3], [1.0, -2.0, 3.0], (1.0, -2, 3.0), [True, -2, 3],
    torch.tensor([1, -2, 3]), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), torch.tensor([[1.0], [-2.0], [3.0]]),
    [torch.tensor(1), torch.tensor(-2.0), torch.tensor(3.0, dtype=torch.bfloat16)],
    [torch.tensor([1]), torch.tensor([-2.0]), torch.tensor([3.0])], [torch.tensor([1.0], requires_grad=True), -2, 3],
    np.array([1, -2, 3]), np.array([1.0, -2.0, 3.0]), np.array([[1.0], [-2.0], [3.0]]),
    [np.float32(1), np.int64(-2), np.float64(3)], [np.array(1.0), np.array([-2.0]), 3],
], ids=lambda scores: type(scores).__name__)
def test_numbers_of_any_kind_are_accepted_as_scores(scores):
    checked = check_scores(scores)
    assert checked.dtype == torch.float32 and not checked.requires_grad
    assert checked.tolist() == [1.0, -2.0, 3.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -math.inf, torch.tensor([float("nan")]), np.float64("inf"), 1e39,
                                 10 ** 400], ids=["nan", "inf", "-inf", "nan tensor", "numpy inf", "1e39", "huge int"])
def test_a_score_that_is_no_finite_float32_names_its_sample(bad):
    with pytest.raises(ValueError, match="score 1 of 3"):
        check_scores([0.5, bad, 0.5])


@pytest.mark.parametrize("bad", ["good", None, [1.0], torch.tensor([1.0, 2.0]), np.array([1.0, 2.0]), torch.tensor([]), {"a": 1}],
                         ids=lambda bad: type(bad).__name__)
def test_a_score_that_is_no_number_names_its_sample(bad):
    with pytest.raises(ValueError, match="score 2 of 3.*not one number"):
        check_scores([0.5, 0.5, bad])


# ---------------------------------------------------------------------------------------------- running moments


def assert_moments_equal_numpy(moments, data):
    data = np.concatenate([np.asarray(batch, dtype=np.float64) for batch in data])
    assert moments.count == len(data)
    assert moments.mean == pytest.approx(data.mean(), rel=1e-12)
    assert moments.std == pytest.approx(data.std(ddof=1), rel=1e-9)


RAGGED = (5, 1, 1, 17, 2, 64, 3)


@pytest.mark.parametrize("offset, spread", [(0.0, 1.0), (-3.0, 0.01), (1e6, 3.0), (1e-3, 1e3)])
def test_moments_equal_numpy_over_a_ragged_stream(offset, spread):
    random = np.random.default_rng(0)
    moments, seen = RunningMoments(), []
    for size in RAGGED:
        seen.append(offset + spread * random.normal(size=size))
        moments.update(torch.from_numpy(seen[-1]))
        assert_moments_equal_numpy(moments, seen)


def test_moments_equal_numpy_for_integer_and_float32_scores():
    moments = RunningMoments()
    batches = [torch.tensor([3, 1, -4]), torch.tensor([1]), torch.tensor([5, 9], dtype=torch.int32), torch.tensor([2.5, 6.25])]
    for batch in batches:
        moments.update(batch)
    assert_moments_equal_numpy(moments, [batch.numpy() for batch in batches])


def test_a_constant_first_batch_gives_a_bounded_scale_and_the_right_one_later():
    moments = RunningMoments()
    first = torch.full((7,), 0.1)
    moments.update(first)
    assert moments.std == 1.0
    assert torch.equal(process_scores(first, moments), first)
    moments.update(torch.tensor([0.5, -0.3]))
    assert_moments_equal_numpy(moments, [first.numpy(), np.array([0.5, -0.3], dtype=np.float32)])


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5678, 1e6 + 0.1])
def test_a_constant_stream_of_any_size_is_never_scaled(value):
    moments = RunningMoments()
    for size in RAGGED:
        moments.update(torch.full((size,), value, dtype=torch.float64))
        assert moments.std == 1.0


def test_one_float32_rounding_is_noise_and_not_spread():
    """A reward model gives the same text a last bit more or less in another batch. Dividing by that would give 1e7."""
    moments = RunningMoments()
    moments.update(torch.tensor([0.1, 0.1 + 1e-8]))
    assert moments.sum_of_squares > 0 and moments.std == 1.0


def test_batches_of_one_sample_give_numpys_moments_and_a_scale_of_one_at_first():
    moments, seen = RunningMoments(), []
    assert moments.std == 1.0
    for value in (2.0, 5.0, -1.0):
        moments.update(torch.tensor([value]))
        seen.append([value])
        if len(seen) == 1:
            assert moments.std == 1.0 and moments.mean == 2.0
        else:
            assert_moments_equal_numpy(moments, seen)


def test_a_batch_without_scores_changes_nothing():
    moments = RunningMoments()
    moments.update(torch.tensor([]))
    assert moments.state_dict() == RunningMoments().state_dict()
    moments.update(torch.tensor([1.0, 2.0]))
    before = moments.state_dict()
    moments.update(torch.tensor([]))
    assert moments.state_dict() == before


def two_ranks(work):
    """Run work(rank, reduce) on two threads. reduce sums a tensor over both, as all_reduce does. -> the two results."""
    barrier, slots, results, errors = threading.Barrier(2, timeout=20), [None, None], [None, None], []

    def run(rank):
        def reduce(tensor):
            slots[rank] = tensor
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()                  # nobody writes the next tensor before both have read this one
            return total
        try:
            results[rank] = work(rank, reduce)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def test_moments_on_two_ranks_are_those_of_the_concatenated_batches():
    random = np.random.default_rng(1)
    # Uneven, empty on one rank, and far apart: a mean of the ranks' moments would be off.
    sizes = [(5, 3), (1, 0), (0, 0), (2, 40)]
    data = [[random.normal(loc=10 * rank, size=size) for rank, size in enumerate(pair)] for pair in sizes]

    def work(rank, reduce):
        moments = RunningMoments()
        for pair in data:
            moments.update(torch.from_numpy(pair[rank]), reduce)
        return moments

    ours, theirs = two_ranks(work)
    assert ours.state_dict() == theirs.state_dict()
    assert_moments_equal_numpy(ours, [batch for pair in data for batch in pair])


def test_restored_moments_continue_exactly():
    random = np.random.default_rng(2)
    batches = [torch.from_numpy(random.normal(size=size)) for size in RAGGED]
    moments = RunningMoments()
    for batch in batches[:3]:
        moments.update(batch)
    restored = RunningMoments()
    restored.load_state_dict(moments.state_dict())
    for batch in batches[3:]:
        moments.update(batch)
        restored.update(batch)
    assert restored.state_dict() == moments.state_dict()
    assert (restored.mean, restored.std) == (moments.mean, moments.std)


def test_process_scores_scales_then_normalises_then_clips():
    scores = torch.tensor([1.0, 3.0, 8.0])
    moments = RunningMoments()
    moments.update(scores)              # mean 4, deviations -3, -1, 4: variance 26 / 2
    std = math.sqrt(13)
    assert process_scores(scores) is scores
    assert torch.allclose(process_scores(scores, moments), scores / std)
    assert torch.allclose(process_scores(scores, moments, subtract_mean=True), (scores - 4) / std)
    assert process_scores(scores, clip=2.0).tolist() == [1.0, 2.0, 2.0]
    assert process_scores(-scores, clip=2.0).tolist() == [-1.0, -2.0, -2.0]
    # 8 / std = 2.2 and 3 / std = 0.83: clipping first would give 0.14, 0.28, 0.28
    assert torch.allclose(process_scores(scores, moments, clip=0.5), torch.tensor([1 / std, 0.5, 0.5]))
    assert torch.allclose(process_scores(scores, moments, True, 0.5), torch.tensor([-0.5, -1 / std, 0.5]))


# ---------------------------------------------------------------------------------------------- KL


def test_kl_penalty_gives_each_estimators_hand_written_values():
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -3.0]])
    for kind, expected in (("kl", [0.5, -1.0, 0.0]), ("abs", [0.5, 1.0, 0.0]), ("mse", [0.125, 0.5, 0.0])):
        assert kl_penalty(logprobs, ref_logprobs, kind).tolist() == [expected]
    assert kl_penalty(logprobs, ref_logprobs).tolist() == [[0.5, -1.0, 0.0]]


def test_an_unknown_kl_penalty_is_an_error_that_names_the_choices():
    with pytest.raises(ValueError, match="'k9'.*'kl', 'abs', 'mse'"):
        kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "k9")


def two_logits(shape=(3, 4, 11)):
    torch.manual_seed(0)
    return 2 * torch.randn(shape), 2 * torch.randn(shape)


def test_full_kl_equals_torch_distributions():
    logits, ref_logits = two_logits()
    policy, reference = (torch.distributions.Categorical(logits=x) for x in (logits, ref_logits))
    expected = torch.distributions.kl_divergence(policy, reference)
    assert full_kl(logits, ref_logits).shape == (3, 4)
    assert torch.allclose(full_kl(logits, ref_logits), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(full_kl(ref_logits, logits), expected, rtol=1e-2, atol=1e-2)      # the direction matters


def test_full_kl_is_never_negative_and_zero_for_equal_policies():
    logits, ref_logits = two_logits((200, 5, 7))
    assert full_kl(logits, ref_logits).min() > 0
    assert torch.equal(full_kl(logits, logits), torch.zeros(200, 5))
    # The same distribution, written with another constant: zero but for float32's rounding.
    assert full_kl(logits, logits + 3.0).abs().max() < 1e-5


def test_full_kl_takes_logits_of_minus_infinity_as_tokens_of_probability_zero():
    logits, ref_logits = two_logits()
    excluded = torch.zeros(11, dtype=torch.bool)
    excluded[[2, 7]] = True
    policy, reference = logits.masked_fill(excluded, -math.inf), ref_logits.masked_fill(excluded, -math.inf)
    # Excluded in both: the KL over the other nine tokens.
    assert torch.allclose(full_kl(policy, reference), full_kl(logits[..., ~excluded], ref_logits[..., ~excluded]), atol=1e-6)
    # Excluded by the policy alone: the same sum, but the reference still gives mass to all eleven.
    logp, ref_logp = policy.log_softmax(-1)[..., ~excluded], ref_logits.log_softmax(-1)[..., ~excluded]
    assert torch.allclose(full_kl(policy, ref_logits), (logp.exp() * (logp - ref_logp)).sum(-1), atol=1e-6)
    # Excluded by the reference alone: the policy does what the reference never would.
    assert full_kl(logits, reference).eq(math.inf).all()


def test_full_kl_hides_no_nan():
    logits, ref_logits = two_logits((1, 2, 5))
    for broken in (logits, ref_logits):
        pair = [x.clone() for x in (logits, ref_logits)]
        pair[broken is ref_logits][0, 1, 3] = float("nan")
        assert full_kl(*pair).isnan().tolist() == [[False, True]]


def test_the_expectation_of_the_sampled_kl_under_the_policy_is_the_full_kl():
    logits, ref_logits = (x.double() for x in two_logits((2, 3, 11)))
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    # Every token of the vocabulary in turn is "the sampled one", weighted by its probability.
    expectation = sum(logp[..., v].exp() * kl_penalty(logp[..., v], ref_logp[..., v]) for v in range(11))
    assert torch.allclose(expectation, full_kl(logits, ref_logits), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_reference", [True, False])
def test_full_kl_counts_an_entry_that_the_policy_never_chooses_as_zero(in_reference):
    logits, ref_logits = two_logits()
    logits[..., [2, 7]] = -math.inf
    if in_reference:
        ref_logits[..., [2, 7]] = -math.inf
    possible = [v for v in range(11) if v not in (2, 7)]
    logp, ref_logp = logits.double().log_softmax(-1)[..., possible], ref_logits.double().log_softmax(-1)[..., possible]
    expected = (logp.exp() * (logp - ref_logp)).sum(-1)
    assert expected.isfinite().all()
    assert torch.allclose(full_kl(logits, ref_logits).double(), expected, rtol=1e-5, atol=1e-6)


def test_full_kl_is_infinite_where_the_reference_alone_excludes_an_entry_and_hides_no_nan():
    logits, ref_logits = two_logits()
    ref_logits[0, 0, 3] = -math.inf
    logits[1, 2, 5] = math.nan
    kl = full_kl(logits, ref_logits)
    assert kl[0, 0] == math.inf and kl[1, 2].isnan()
    assert kl.isfinite().sum() == kl.numel() - 2


# ---------------------------------------------------------------------------------------------- token rewards


def test_the_score_lands_on_the_last_token_that_the_policy_chose():
    mask = torch.tensor([[1, 1, 1, 1],       # whole
                         [1, 1, 0, 0],       # short
                         [1, 0, 1, 0],       # a hole, then one more token
                         [0, 0, 1, 1],       # begins with tokens that are not the policy's
                         [1, 0, 0, 0]])      # one token
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    rewards, non_score_reward = token_rewards(scores, torch.zeros(5, 4), mask, kl_coef=0.2)
    assert rewards.tolist() == [[0, 0, 0, 1], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 4], [5, 0, 0, 0]]
    assert not non_score_reward.any()


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_the_kl_is_paid_on_every_token_and_an_empty_response_gets_nothing(dtype):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).to(dtype)
    kl = torch.tensor([[0.5, -1.0, 0.0], [0.0, 0.0, 0.0]])
    rewards, non_score_reward = token_rewards(torch.tensor([3.0, 7.0]), kl, mask, kl_coef=0.2)
    assert torch.allclose(non_score_reward, torch.tensor([[-0.1, 0.2, 0.0], [0.0, 0.0, 0.0]]))
    assert torch.allclose(rewards, torch.tensor([[-0.1, 3.2, 0.0], [0.0, 0.0, 0.0]]))


def test_token_rewards_changes_none_of_its_inputs():
    scores, kl, mask = torch.tensor([3.0]), torch.tensor([[0.5, 0.5]]), torch.tensor([[1, 1]])
    copies = [x.clone() for x in (scores, kl, mask)]
    token_rewards(scores, kl, mask, kl_coef=0.2)
    assert all(torch.equal(a, b) for a, b in zip((scores, kl, mask), copies))


# ---------------------------------------------------------------------------------------------- controllers


def test_the_adaptive_controller_follows_the_formula_of_ziegler_et_al():
    # error = clip(KL / 6 - 1, -0.2, 0.2); coefficient *= 1 + error * 64 / 1000
    controller = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    assert controller.value == 0.2
    coefficient = 0.2
    for kl, error in ((6.0, 0.0), (6.6, 0.1), (5.1, -0.15), (600.0, 0.2), (0.0, -0.2), (-5.0, -0.2)):
        controller.update(kl, n_steps=64)
        coefficient *= 1 + error * 64 / 1000
        assert controller.value == pytest.approx(coefficient, rel=1e-12)


def test_the_fixed_controller_keeps_its_coefficient():
    controller = FixedKLController(0.3)
    controller.update(100.0, n_steps=64)
    assert controller.value == 0.3


# ---------------------------------------------------------------------------------------------- reward functions


def test_load_reward_fn_gives_the_function_of_the_file(tmp_path):
    file = tmp_path / "my_reward.py"
    file.write_text("SCALE = 2\n\n\ndef length(prompts, responses):\n    return [SCALE * len(r) for r in responses]\n")
    assert load_reward_fn(f"{file}:length")(["a", "b"], ["xx", "yyy"]) == [4, 6]


@pytest.mark.parametrize("spec", ["length", "my_reward.py", "my_reward.py:", ":length", "my_reward:length", ""])
def test_load_reward_fn_refuses_a_malformed_spec(spec):
    with pytest.raises(ValueError, match=r"path/to/file\.py:function"):
        load_reward_fn(spec)


def test_load_reward_fn_names_a_missing_file_and_a_missing_function(tmp_path):
    with pytest.raises(ValueError, match="no_such_file.py.*does not exist"):
        load_reward_fn(f"{tmp_path}/no_such_file.py:length")
    file = tmp_path / "my_reward.py"
    file.write_text("length = 3\n")
    with pytest.raises(ValueError, match="no function called 'score'"):
        load_reward_fn(f"{file}:score")
    with pytest.raises(ValueError, match="no function called 'length'"):
        load_reward_fn(f"{file}:length")


def test_score_texts_calls_the_reward_once_with_all_texts():
    calls = []

    def reward(prompts, responses):
        calls.append((prompts, responses))
        return [len(p) + len(r) for p, r in zip(prompts, responses)]

    assert score_texts(reward, ["a", "bb"], ["c", "dd"]) == [2.0, 4.0]
    assert calls == [(["a", "bb"], ["c", "dd"])]


@pytest.mark.parametrize("scores", [[1, 2.5], (1, 2.5), torch.tensor([1, 2.5]), torch.tensor([[1], [2.5]]), np.array([1, 2.5])],
                         ids=lambda scores: type(scores).__name__)
def test_score_texts_accepts_every_sequence_of_numbers(scores):
    result = score_texts(lambda prompts, responses: scores, ["a", "b"], ["c", "d"])
    assert result == [1.0, 2.5] and all(type(score) is float for score in result)


def test_score_texts_names_the_exception_of_the_reward_function():
    def reward(prompts, responses):
        return {}["missing"]

    with pytest.raises(ValueError, match="the reward function raised KeyError: 'missing'") as error:
        score_texts(reward, ["a"], ["b"])
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0, 3.0], []])
def test_score_texts_refuses_a_wrong_count_with_both_numbers(scores):
    with pytest.raises(ValueError, match=f"returned {len(scores)} for 2 responses"):
        score_texts(lambda prompts, responses: scores, ["a", "b"], ["c", "d"])


# The dictionary's keys and the string's letters would pass for numbers, and a set has no order.
@pytest.mark.parametrize("make", [lambda: 1.0, lambda: None, lambda: (s for s in [1.0, 2.0]), lambda: torch.tensor(1.0),
                                  lambda: np.array(1.0), lambda: {0: 0.5, 1: 0.7}, lambda: "12", lambda: {0.5, 0.7}],
                         ids=["float", "None", "generator", "0-d tensor", "0-d array", "dict", "str", "set"])
def test_score_texts_refuses_what_is_no_list_of_scores(make):
    with pytest.raises(ValueError, match="the reward function returned a .* for 2 responses"):
        score_texts(lambda prompts, responses: make(), ["a", "b"], ["c", "d"])


def test_score_texts_refuses_nan_and_names_the_sample():
    with pytest.raises(ValueError, match="score 1 of 2 is nan"):
        score_texts(lambda prompts, responses: [0.5, float("nan")], ["a", "b"], ["c", "d"])


# ---------------------------------------------------------------------------------------------- reward models

PROMPTS, RESPONSES = ["t5", "t6 t7", "t8 t9 t10"], [" t11 t12 t13", " t14", " t15 t16"]


def save_reward_model(folder, labels):
    """A tiny random classifier with the golden tokenizer, which here splits at spaces. -> the model, the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1,
                        pad_token_id=0, initializer_range=0.5, id2label=dict(enumerate(labels)),
                        label2id={label: i for i, label in enumerate(labels)})
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def logits_one_by_one(model, tokenizer):
    """The model's logits (3, labels), text by text and so without padding."""
    rows = [tokenizer(p + r, return_tensors="pt")["input_ids"] for p, r in zip(PROMPTS, RESPONSES)]
    assert [row.shape[1] for row in rows] == [4, 3, 5]
    with torch.no_grad():
        return torch.cat([model(row).logits for row in rows])


@pytest.mark.parametrize("labels, good", [(["NEGATIVE", "POSITIVE"], 1), (["POSITIVE", "NEGATIVE"], 0), (["positive", "other"], 0),
                                          (["bad", "fair", "good"], 2), (["LABEL_0", "LABEL_1"], 1)], ids=str)
def test_a_reward_model_gives_the_probability_of_the_good_label(labels, good, tmp_path):
    expected = logits_one_by_one(*save_reward_model(tmp_path, labels)).softmax(-1)[:, good]
    reward = load_reward_model(str(tmp_path))
    assert reward(PROMPTS, RESPONSES) == pytest.approx(expected.tolist(), abs=1e-5)
    assert reward(PROMPTS[:1], RESPONSES[:1]) == pytest.approx(expected[:1].tolist(), abs=1e-5)
    assert score_texts(reward, PROMPTS, RESPONSES) == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.max() - expected.min() > 0.05       # or the order of the samples would go unseen


def test_a_reward_model_with_one_output_gives_its_raw_logit(tmp_path):
    expected = logits_one_by_one(*save_reward_model(tmp_path, ["score"]))[:, 0]
    assert expected.min() < 0 or expected.max() > 1     # a sigmoid or a softmax could not give this
    reward = load_reward_model(str(tmp_path))
    assert reward(PROMPTS, RESPONSES) == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_reward_model_in_a_path_loads_like_one_in_a_string(tmp_path):
    save_reward_model(tmp_path, ["NEGATIVE", "POSITIVE"])
    assert load_reward_model(tmp_path)(PROMPTS, RESPONSES) == load_reward_model(str(tmp_path))(PROMPTS, RESPONSES)


def test_a_half_precision_reward_model_computes_in_float32(tmp_path):
    model, tokenizer = save_reward_model(tmp_path, ["NEGATIVE", "POSITIVE"])
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    expected = logits_one_by_one(model.float(), tokenizer).softmax(-1)[:, 1]        # bf16 weights, float32 arithmetic
    assert load_reward_model(str(tmp_path))(PROMPTS, RESPONSES) == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_text_longer_than_the_reward_model_is_cut_instead_of_crashing(tmp_path):
    """The golden tokenizer, like many, names no largest length, so truncation has to learn it from the model."""
    save_reward_model(tmp_path, ["NEGATIVE", "POSITIVE"])
    score, = load_reward_model(str(tmp_path))(["t5"], [" t6" * 40])
    assert 0 < score < 1


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder"])
def test_an_unknown_reward_model_is_an_error_with_a_remedy(name):
    with pytest.raises(ValueError, match="no reward model found at.*save_pretrained") as error:
        load_reward_model(name)
    assert repr(name) in str(error.value)
