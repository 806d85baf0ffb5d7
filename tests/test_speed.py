"""speed.py: every override against the method that it replaces, and whole runs of both trainers.

The models are tiny but real, in float32 on the CPU, so the two may differ by a few units of the last digit and no more.
"""
import functools

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import speed
import test_ppo_core
from optim import make_optimizer
from ppo_core import PPOTrainer, collate, entropy_from_logits, logprobs_from_logits
from reference import find_layers
from speed import FastPPOTrainer, LogprobsAndEntropy, draw, even_size, fuse_activations
from test_ppo_core import config, distance, ragged, sampled_and_recomputed, seeded, sgd, tiny, tokenizer, weights    # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
make = functools.partial(test_ppo_core.make, trainer_class=FastPPOTrainer)


def test_take_trims_to_the_longest_of_its_rows_and_keeps_their_tokens():
    queries, responses, _ = ragged()
    batch = collate(queries, responses, None, 1)
    (_, rows), = make().mini_batches(batch, torch.tensor([0, 2]))
    # the last token scores nothing; 5 are left, and 8 is the next even size
    assert rows["input_ids"].shape == rows["attention_mask"].shape == (2, 8) and rows["mask"].shape == (2, 3)
    assert rows["input_ids"][1, :5].tolist() == torch.cat([queries[2], responses[2]])[:-1].tolist()
    assert rows["attention_mask"].tolist() == [[1, 1, 1] + [0] * 5, [1] * 6 + [0] * 2]


def test_logprobs_and_entropy_from_one_pass_are_those_of_the_plain_functions_with_their_gradient():
    logits, labels = torch.randn(7, 11, dtype=torch.float64) * 4, torch.randint(0, 11, (7,))
    logits[0, 3] += 200.0       # a token that is as good as certain
    weight = torch.randn(7, dtype=torch.float64)
    results = []
    for both in (lambda x: LogprobsAndEntropy.apply(x, labels), lambda x: (logprobs_from_logits(x, labels), entropy_from_logits(x))):
        x = logits.clone().requires_grad_()
        logprobs, entropy = both(x)
        (logprobs * weight).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), x.grad))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_logits_in_chunks_give_the_weights_of_all_at_once(family):
    """A chunk of 8 tokens against all: the same update; and no tensor is made that holds the logits of more tokens than a chunk's."""
    weights = []
    for chunk in (None, 8):
        trainer = make(family, temperature=0.7)
        trainer.chunk, largest = chunk, []
        head = trainer.model.pretrained_model.get_output_embeddings()
        head.register_forward_hook(lambda _, inputs, output: largest.append(output.shape[-2]))
        trainer.step(*ragged((9, 17, 12, 5)))
        assert max(largest) <= 8 if chunk else max(largest) > 8
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) < 1e-6


def test_rows_of_like_length_are_put_together_and_none_is_lost():
    short, long = list(range(7, 15)), list(range(40, 48))
    lengths, index = torch.tensor(short + long), torch.randperm(16)
    queries = [torch.ones(n - 5, dtype=torch.long) for n in short + long]
    batch = collate(queries, [torch.ones(5, dtype=torch.long)] * 16, None, 1)

    def pieces(trainer, index, size):
        trainer.config.mini_batch_size = size
        return [lengths[part].tolist() for part, _ in trainer.mini_batches(batch, index)]
    fast, plain = make(batch_size=16), make(batch_size=16, trainer_class=PPOTrainer)
    assert pieces(fast, index, 8) == [short, long]
    assert pieces(fast, index, 16) == [short, long], "16 rows are halved: that leaves out 8 x 33 of 16 x 47"
    assert len(speed.halved(torch.full((16,), 5), torch.arange(16))) == 1, "nothing would be left out"
    assert len(speed.halved(lengths, torch.tensor([0, 1, 14, 15]))) == 1, "few rows are not worth two passes"
    assert len(speed.halved(lengths.repeat(2).sort().values, torch.arange(32))) == 2, "halves of like length stay whole"
    assert [len(piece) for piece in pieces(fast, index[:5], 2)] == [2, 2, 1]
    assert pieces(plain, index, 8) == [lengths[index[:8]].tolist(), lengths[index[8:]].tolist()]


def test_halved_mini_batches_give_the_weights_of_whole_ones(monkeypatch):
    trained, halved = [], speed.halved
    for whole in (False, True):
        sizes = []
        monkeypatch.setattr(speed, "halved", lambda lengths, part: [part] if whole else halved(lengths, part))
        trainer = make(batch_size=16)
        forward = trainer.forward
        monkeypatch.setattr(trainer, "forward", lambda model, rows, **kw: sizes.append(len(rows["mask"])) or forward(model, rows, **kw))
        trainer.step(*ragged((1, 30, 2, 28) * 4, query_lengths=(3,) * 16))
        assert set(sizes) == {16 if whole else 8}
        trained.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    assert max(float((trained[0][name] - trained[1][name]).abs().max()) for name in trained[0]) < 1e-6


def test_the_fused_activation_is_gpt2s_own():
    from transformers.activations import NewGELUActivation
    module, x = torch.nn.Sequential(NewGELUActivation()), torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    expected, = torch.autograd.grad(module(x).sum(), x)
    value = module(x)
    fuse_activations(module)
    assert type(module[0]) is torch.nn.GELU
    torch.testing.assert_close(module(x), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(module(x).sum(), x)[0], expected, rtol=1e-12, atol=1e-12)


def test_draw_follows_the_distribution_to_its_rarest_token():
    """Pearson's chi-square over 200,000 draws: 31 degrees of freedom, 61 is passed once in 1,000 times by an exact sampler."""
    p = torch.softmax(torch.randn(32) * 2, -1)
    p[5] = 0.0
    drawn = torch.cat([draw(p.expand(1000, -1)) for _ in range(200)])
    count, expected = torch.bincount(drawn, minlength=32).double(), p.double() / p.double().sum() * len(drawn)
    assert count[5] == 0
    rest = expected > 0
    assert float(((count - expected).square() / expected)[rest].sum()) < 61
    rare = torch.full((1, 100_000), 1e-9)
    rare[0, 7] = 1.0            # in float32 the sum would stand still from the first of them on
    assert abs(float(torch.cat([draw(rare.expand(200, -1)) for _ in range(50)]).ne(7).double().mean()) - 1e-4) < 4e-4


def test_sampling_drops_rows_that_have_ended_and_changes_no_token_of_the_others():
    """Greedily, where both can be compared: transformers' `generate`, and `sample` with the most likely token in place of a drawn one."""
    trainer = make()
    queries = [torch.randint(5, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in (2, 6, 3, 9, 4, 5, 7, 8, 2, 3, 6, 11)]
    stop = [token for token in range(90) if token % 4 == 0]
    arguments = dict(batch_size=12, return_prompt=False, max_new_tokens=12, eos_token_id=stop)
    expected = trainer.generate(queries, do_sample=False, allow_other_distribution=True, **arguments)
    widths, forward = [], trainer.model.forward
    trainer.model.forward = lambda **kwargs: widths.append(len(kwargs["input_ids"])) or forward(**kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "draw", lambda p: p.argmax(-1))
        responses = trainer.generate(queries, **arguments)
    assert [r.tolist() for r in responses] == [r.tolist() for r in expected]
    assert len({len(r) for r in responses}) > 2 and widths[0] == 12 and widths[-1] == 8


def test_even_sizes_are_few_and_waste_little():
    sizes = [even_size(n) for n in range(1, 5000)]
    assert all(n <= size <= max(n + 7, n * 1.126) and size % 8 == 0 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 70 and even_size(128) == 128 and even_size(129) == 144
    assert [even_size(size) for size in sizes] == sizes


def sampled_step(family, shared, forget, **settings):
    """Two rollouts and steps. -> trainer, statistics, and what the policy ran for outside of updates."""
    torch.manual_seed(0)
    np.random.seed(0)
    model = tiny(family)
    trainer = FastPPOTrainer(config(batch_size=12, mini_batch_size=4, **settings), model, None, tokenizer(), num_shared_layers=shared)
    trainer.optimizer = trainer.accelerator.prepare(sgd(model))
    queries = [torch.randint(5, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in (2, 6, 3, 9, 4, 5, 7, 8, 2, 3, 6, 11)]
    stop, found, passes = [token for token in range(90) if token % 4 == 0], [], []
    for at_once in (12, 4):     # in one batch, from which rows that have ended are dropped, and as by those who generate query by query
        responses = [r for i in range(0, 12, at_once)
                     for r in trainer.generate(queries[i:i + at_once], batch_size=12, return_prompt=False, max_new_tokens=12, eos_token_id=stop)]
        if forget:
            trainer.sampled = {}
        hook = model.register_forward_pre_hook(lambda module, _: passes.append(module.training))
        found.append(trainer.step(queries, responses, [len(r) / 10 for r in responses]))
        hook.remove()
    return trainer, found, passes.count(False)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("shared", [None, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_the_sampler_knew_is_what_a_pass_over_the_batch_would_give(family, shared, temperature):
    (ours, stats, saved), (plain, plain_stats, computed) = [sampled_step(family, shared, forget, temperature=temperature) for forget in (False, True)]
    assert (saved, computed) == (0, 2 * 3)
    assert stats[0]["tokens/responses_len_std"] > 0
    for new, old in zip(stats, plain_stats):
        assert torch.allclose(new["objective/logprobs"], old["objective/logprobs"], rtol=1e-5, atol=1e-5)
        assert float(new["ppo/policy/ratio"].log().abs().max()) > 1e-3      # the updates did move something
        for key in ("objective/kl", "ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy", "ppo/policy/approxkl", "ppo/val/mean"):
            assert new[key] == pytest.approx(old[key], abs=1e-5), key
    assert distance(weights(ours), weights(plain)) < 1e-5 < 1e-4 < distance(weights(ours), weights(make(family)))


def test_the_sampler_is_believed_for_these_tokens_from_these_weights_and_only_once():
    queries, other, scores = ragged()
    for change in ("nothing", "a token", "a query", "a weight", "the head", "another temperature", "an optimizer step", "the full KL", "a step",
                   "more prompts"):
        # This Adam writes weights where torch does not count it, and one step of 1e-7 is as little as anybody would take.
        trainer = make(optimizer=lambda model: make_optimizer("adam", list(model.parameters()), 1e-7), ppo_epochs=1)
        responses = trainer.generate(queries, return_prompt=False, max_new_tokens=6)
        asked = list(queries)
        if change == "a token":
            responses[1][2] = 5 + (responses[1][2] - 4) % 80
        elif change == "a query":
            asked[0] = asked[0].flip(0)
        elif change in ("a weight", "the head"):
            with torch.no_grad():
                (trainer.model.v_head.summary if change == "the head" else trainer.model.pretrained_model.transformer.ln_f).weight[0] += 0.5
        elif change == "another temperature":
            trainer.config.temperature = 0.5
        elif change == "an optimizer step":
            trainer.model.v_head.summary.weight.grad = torch.ones_like(trainer.model.v_head.summary.weight)
            trainer.optimizer.step()
        elif change == "the full KL":
            trainer.config.kl_penalty = "full"
        elif change == "a step":
            trainer.step(queries, responses, scores)
        elif change == "more prompts":
            trainer.generate([torch.tensor([5, 6, 7 + i]) for i in range(3)], return_prompt=False, max_new_tokens=3)
            assert len(trainer.sampled) == 4, "no more than a batch is kept"
        found = trainer.recall(collate(asked, responses, None, 1))
        assert bool(found) == (change == "nothing"), change
        assert not trainer.sampled, "kept beyond the step it was made for"
        expected = trainer.record(collate(asked, responses, None, 1))[:2]       # computed, as nothing is remembered any more
        for name, values in zip(found, expected):
            assert (found[name] - values).abs().max() < 1e-5


def test_the_sampler_is_not_believed_where_float32_may_be_tf32():
    trainer, matmul = make(ppo_epochs=1), torch.backends.cuda.matmul
    queries, *_ = ragged()
    responses, usual = trainer.generate(queries, return_prompt=False, max_new_tokens=6), matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert trainer.sampled and trainer.recall(collate(queries, responses, None, 1)) == {}
    finally:
        matmul.fp32_precision = usual


def test_the_last_batch_of_responses_is_what_is_remembered_and_no_more_of_it_than_it_needs():
    trainer = make(ppo_epochs=1)

    def remember(*names):
        tokens = [torch.tensor([ord(name), 6]) for name in names]
        rollout = speed.Rollout(tokens, 100, 1, torch.device("cpu"))            # room for 100 tokens, of which 2 are needed
        rollout.trunk = torch.zeros(len(names), rollout.width + 100, 8)
        trainer.remember(rollout, tokens)
        return tokens

    remember(*"abcd")
    last = remember(*"aefg")                                        # batch_size is 4, and `a` came first of all
    tensors = [tensor for row in trainer.sampled.values() for tensor in row.values()]
    assert len(tensors) == 12 and all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert set(trainer.recall(collate(last, last, None, 1))) == {"logprobs", "values"}


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("settings", [dict(mini_batch_size=2), dict(kl_penalty="full"),
                                      dict(gradient_checkpointing=True, mini_batch_size=2, gradient_accumulation_steps=2)])
def test_the_shared_trunk_runs_once_per_batch_and_changes_no_number(family, settings):
    results = []
    for reuse in (True, False):
        torch.manual_seed(0)
        np.random.seed(0)
        model = tiny(family)
        trainer = FastPPOTrainer(config(**settings), model, None, tokenizer(), optimizer=None, num_shared_layers=1)
        first, calls = find_layers(model)[1][0], []
        if not reuse:
            trainer.trunk.blocks = []
        trainer.optimizer = trainer.accelerator.prepare(sgd(model))
        own = first.forward
        first.forward = lambda *args, **kwargs: (calls.append(1), own(*args, **kwargs))[1]
        stats = [trainer.step(*ragged(seed=i)) for i in range(3)]
        results.append((weights(trainer), stats, len(calls)))
    (ours, stats, once), (plain, plain_stats, often) = results
    batches = 3 * 4 // trainer.config.mini_batch_size
    assert once == batches and often >= 3 * batches         # the policy's first block: rollout only, or rollout and 2 epochs
    assert distance(ours, plain) < 1e-5 and distance(ours, weights(make(family))) > 1e-4
    for new, old in zip(stats, plain_stats):
        for key in ("objective/kl", "ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy", "ppo/policy/approxkl"):
            assert new[key] == pytest.approx(old[key], abs=1e-5), key


def test_a_batch_with_a_trunk_is_trimmed_like_its_tokens():
    queries, responses, _ = ragged()
    batch = collate(queries, responses, None, 0)
    batch["trunk"] = torch.randn(*batch["input_ids"].shape, 3)
    (_, rows), = make().mini_batches(batch, torch.tensor([0, 2]))
    assert rows["trunk"].shape == (2, rows["input_ids"].shape[1], 3)
    assert torch.equal(rows["trunk"], batch["trunk"][[0, 2], :rows["input_ids"].shape[1]])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_recomputed_logprobs_are_the_lean_samplers_own(family, temperature, monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "draw", lambda p: (seen.append(p.log()), draw(p))[1])
    sampled_and_recomputed(make(family, temperature=temperature), seen)


def test_a_rollout_of_no_tokens_is_a_step_too():
    trainer = make(ppo_epochs=1)
    queries, *_ = ragged()
    responses = trainer.generate(queries, return_prompt=False, max_new_tokens=0)
    assert {len(r) for r in responses} == {0} and trainer.step(queries, responses, [0.0] * 4)["objective/kl"] == 0


def test_a_token_that_the_model_rules_out_adds_nothing_to_the_one_pass_entropy():
    logits = torch.randn(7, 11, dtype=torch.float64).index_fill(-1, torch.tensor([2, 7]), -torch.inf).requires_grad_()
    labels = torch.randint(3, 6, (7,))
    logprobs, entropy = LogprobsAndEntropy.apply(logits, labels)
    torch.testing.assert_close(entropy, entropy_from_logits(logits), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logprobs, logprobs_from_logits(logits, labels), rtol=1e-10, atol=1e-10)
    assert torch.autograd.grad(logprobs.sum(), logits)[0].isfinite().all()


def test_the_one_pass_entropy_has_no_gradient_and_says_so():
    logits = torch.randn(7, 11, requires_grad=True)
    _, entropy = LogprobsAndEntropy.apply(logits, torch.zeros(7, dtype=torch.long))
    with pytest.raises(RuntimeError, match="does not require grad"):
        entropy.sum().backward()


# ---------------------------------------------------------------------------- each override against what it replaces


def both(family="gpt2", **settings):
    """-> the plain and the fast trainer, of equal models."""
    return [test_ppo_core.make(family, trainer_class=kind, **settings) for kind in (PPOTrainer, FastPPOTrainer)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("settings", [{}, dict(temperature=0.7), dict(kl_penalty="full"), dict(mini_batch_size=2)], ids=str)
def test_record_of_both_trainers_is_equal(family, settings):
    queries, responses, _ = ragged()
    plain, fast = [trainer.record(collate(queries, responses, None, 1)) for trainer in both(family, **settings)]
    for ours, expected in zip(fast, plain):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_forward_of_both_trainers_is_equal_with_its_gradient(family, keep_logits):
    queries, responses, _ = ragged()
    results = []
    for trainer in both(family, temperature=0.7):
        (index, rows), = trainer.mini_batches(collate(queries, responses, None, 1), torch.arange(4))
        logprobs, values, rest = trainer.forward(trainer.model, rows, keep_logits=keep_logits)
        (logprobs.sum() + values.square().sum()).backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        rest = rest * rows["mask"][..., None] if keep_logits else rest          # the fast one computes no logits of padding
        order = index.argsort()         # the fast trainer sorts the rows by length
        results.append((logprobs[order], values[order], rest[order], gradients))
    (*plain, expected), (*fast, gradients) = results
    for ours, theirs in zip(fast, plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name, theirs in expected.items():       # against the largest entry: some are in the hundreds, and float32 has 7 digits
        assert float((gradients[name] - theirs).abs().max()) < 1e-5 * max(1.0, float(theirs.abs().max())), name


def test_rows_that_are_taken_are_the_plain_ones_without_padding():
    queries, responses, _ = ragged()
    batch, index = collate(queries, responses, None, 1), torch.tensor([0, 2])
    (_, plain), (_, fast) = [next(trainer.mini_batches(batch, index)) for trainer in both()]
    for name, tensor in fast.items():
        if name in ("input_ids", "attention_mask"):         # the last token of each row scores nothing
            for row, (ours, theirs) in enumerate(zip(tensor, plain[name])):
                length = int(plain["lengths"][row]) - 1
                assert torch.equal(ours[:length], theirs[:length])
        elif name != "positions":
            real = plain["mask"][:, :3] if tensor.ndim > 1 else 1
            assert torch.equal(tensor * real, (plain[name][:, :3] if tensor.ndim > 1 else plain[name]) * real), name


def test_mini_batches_of_both_trainers_hold_the_same_rows():
    queries, responses, _ = ragged()
    batch, index = collate(queries, responses, None, 1), torch.tensor([3, 0, 2, 1])
    plain, fast = [torch.cat([part for part, _ in trainer.mini_batches(batch, index)]).sort().values
                   for trainer in both(mini_batch_size=2)]
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_the_lean_sampler_and_generate_write_the_same_greedy_text(family, monkeypatch):
    """With the most likely token in place of a drawn one, as the two use their random numbers differently."""
    plain, fast = both(family)
    queries, _, _ = ragged()
    greedy = dict(max_new_tokens=8, return_prompt=False, batch_size=4)
    expected = plain.generate(queries, do_sample=False, allow_other_distribution=True, **greedy)
    monkeypatch.setattr(speed, "draw", lambda p: p.argmax(-1))
    assert [r.tolist() for r in fast.generate(queries, **greedy)] == [r.tolist() for r in expected]


def test_a_setting_of_generate_that_is_not_pure_sampling_goes_to_generate(monkeypatch):
    trainer = make()
    monkeypatch.setattr(trainer, "sample", None)            # would be called by pure sampling
    trainer.generate(ragged()[0], max_new_tokens=3, top_k=5, allow_other_distribution=True)
    with pytest.raises(TypeError):
        trainer.generate(ragged()[0], max_new_tokens=3)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lion", "adam8bit"])
@pytest.mark.parametrize("settings", [dict(mini_batch_size=2), dict(kl_penalty="full", shared=1),
                                      dict(gradient_checkpointing=True, mini_batch_size=2, gradient_accumulation_steps=2)], ids=str)
def test_three_steps_of_both_trainers_give_the_same_weights_and_statistics(family, optimizer, settings):
    rate = {"sgd": 0.05, "adam": 1e-4, "lion": 1e-5, "adam8bit": 1e-4}[optimizer]
    settings = dict(settings)
    shared, results = settings.pop("shared", None), []
    for kind in (PPOTrainer, FastPPOTrainer):
        np.random.seed(0)
        torch.manual_seed(0)
        trainer = kind(config(**settings), tiny(family), None, tokenizer(), num_shared_layers=shared)
        made = make_optimizer(optimizer, [p for p in trainer.model.parameters() if p.requires_grad], rate, adam_learning_rate=1.0)
        for group in made.param_groups:
            group["eps"] = 1e-4     # Adam divides by the gradient's size: a gradient of 0 but for rounding would move a weight by all of its rate
        trainer.optimizer = trainer.accelerator.prepare(made)
        results.append(([trainer.step(*ragged(seed=seed)) for seed in range(3)], weights(trainer)))
    (plain_stats, plain), (fast_stats, fast) = results
    assert distance(plain, tiny(family).state_dict()) > 1e-5
    # Lion moves every entry by its rate, whatever the gradient: where that is 0 but for rounding, by as much in either direction
    if optimizer == "lion":
        assert distance(plain, fast) < 2 * 3 * 2 * 2 * rate
        far = sum(int(((plain[name] - fast[name]).abs() > 1e-6).sum()) for name in plain)
        assert far < 0.02 * sum(tensor.numel() for tensor in plain.values())
    else:
        assert distance(plain, fast) < (3e-5 if optimizer == "adam8bit" else 1e-5)      # its state is rounded to 8 bits
    for new, old in zip(fast_stats, plain_stats):
        assert new.keys() == old.keys()
        for key in ("objective/kl", "ppo/loss/policy", "ppo/loss/value", "ppo/policy/entropy", "ppo/policy/approxkl", "ppo/grad_norm"):
            assert new[key] == pytest.approx(old[key], abs=1e-4), key

def test_float32_products_by_the_other_library_are_as_exact_and_leave_everything_else_alone():
    """In a process of its own, as it holds for good. Every layout of a forward and a backward pass, against float64."""
    code = """
import torch, speed
torch.manual_seed(0)
plain = torch.nn.Linear(24, 40)
assert speed.use_onednn_for_float32(force=True) and speed.use_onednn_for_float32(force=True)      # twice is once
calls, linear = [], torch.ops.mkldnn._linear_pointwise
for M, dtype, ours in ((16, torch.float32, True), (3, torch.float32, True), (13, torch.float32, False), (0, torch.float32, False),
                       (16, torch.float64, False), (16, torch.bfloat16, False)):
    x = torch.randn(M, 24).to(dtype).requires_grad_()
    layer = torch.nn.Linear(24, 40).to(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for y in (layer(x), torch.addmm(layer.bias, x, layer.weight.t()), x.expand(M, 24) @ layer.weight.t() + layer.bias):
            y.sum().backward()              # the gradient of a sum is one number, expanded
    used = any('_linear_pointwise' in event.key for event in profile.key_averages())
    assert used == ours, (M, dtype)
    a, w, b = x.detach().double(), layer.weight.detach().double(), layer.bias.detach().double()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.3}[dtype]
    assert torch.allclose(y.double(), a @ w.t() + b, atol=tolerance)
    assert torch.allclose(x.grad.double(), 3 * w.sum(0).expand(M, 24), atol=5 * tolerance)
    assert torch.allclose(layer.weight.grad.double(), 3 * a.sum(0).expand(40, 24), atol=5 * tolerance)
    c = torch.randn(40, dtype=dtype)
    assert torch.allclose(torch.addmm(c, x, layer.weight.t(), beta=0.5, alpha=2.0).double(), 0.5 * c.double() + 2 * (a @ w.t()), atol=3 * tolerance)
try:
    torch.ones(8, 16) @ torch.ones(24, 8)
except RuntimeError as error:
    print('shapes are still checked')
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout == "shapes are still checked\n" and "Warning" not in done.stderr, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives freed memory back so eagerly")
def test_freed_memory_is_used_again_without_asking_the_system_and_holds_the_same_numbers():
    """Each page that the system hands out is a minor fault. The same work, before and after, in a process of its own."""
    code = """
import resource, torch, speed
torch.set_num_threads(1)
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert {float(torch.ones(16_000_000).mul(2.0).mean()) for _ in range(times)} == {2.0}
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times
faults(10)
usual = faults(5)
speed.keep_freed_memory()
faults(10)
kept = faults(5)
assert usual >= 32 and kept < usual / 20, (usual, kept)        # two of 64 MB, above what glibc itself would ever keep
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


