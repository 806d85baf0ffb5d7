"""optim.py: Lion is the paper's algorithm, and schedules give the learning rates one works out by hand."""
import copy
import importlib.util
import io
import warnings

import bitsandbytes
import numpy as np
import pytest
import torch

from optim import OPTIMIZERS, SCHEDULES, Lion, lion_update, make_optimizer, make_schedule, state_bytes, trainable_parameters


def gradients(steps, shape, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, *shape))


def algorithm_2(theta, all_gradients, eta, beta1, beta2, weight_decay):
    """Lion as printed in arXiv 2302.06675, algorithm 2, line by line, in float64."""
    m = np.zeros_like(theta)
    for g in all_gradients:
        c = beta1 * m + (1 - beta1) * g
        theta = theta - eta * (np.sign(c) + weight_decay * theta)
        m = beta2 * m + (1 - beta2) * g
    return theta, m


# ---------------------------------------------------------------------------------------------- Lion


@pytest.mark.parametrize("lr, betas, weight_decay", [(1e-2, (0.9, 0.99), 0.0), (3e-2, (0.9, 0.99), 0.7), (1e-2, (0.95, 0.98), 0.1),
                                                     (1e-2, (0.5, 0.6), 2.0), (1e-2, (0.0, 0.9), 0.0)])
def test_lion_is_algorithm_2_of_the_paper_over_20_steps(lr, betas, weight_decay):
    start = np.random.default_rng(1).normal(size=(3, 5))
    steps = gradients(20, (3, 5))
    steps[:, 0, 0] = 0.0                # an entry without gradient: sign(0) is 0, so only the decay moves it
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = Lion([parameter], lr=lr, betas=betas, weight_decay=weight_decay)
    for gradient in steps:
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    theta, m = algorithm_2(start, steps, lr, *betas, weight_decay)
    assert np.allclose(parameter.detach().numpy(), theta, rtol=0, atol=1e-13)
    assert np.allclose(optimizer.state[parameter]["momentum"].numpy(), m, rtol=0, atol=1e-13)


def test_lion_update_works_in_place_and_leaves_the_gradient_alone():
    parameter, gradient, momentum = torch.tensor([1.0, -1.0]), torch.tensor([0.5, -0.25]), torch.zeros(2)
    lion_update(parameter, gradient, momentum, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0)
    assert torch.allclose(parameter, torch.tensor([0.9, -0.9]))
    assert torch.allclose(momentum, torch.tensor([0.005, -0.0025]))
    assert gradient.tolist() == [0.5, -0.25]


def test_lion_uses_each_groups_settings_and_passes_over_parameters_without_gradient():
    a, b, idle = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = Lion([{"params": [a]}, {"params": [b, idle], "lr": 0.5}], lr=0.125)
    a.grad, b.grad = torch.ones(2), -torch.ones(2)
    optimizer.step()
    assert a.tolist() == [-0.125] * 2 and b.tolist() == [0.5] * 2 and idle.tolist() == [0.0] * 2
    assert idle not in optimizer.state


def test_lion_calls_a_closure_with_gradients_on_and_returns_its_loss():
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = Lion([parameter], lr=0.25)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert parameter.item() == 1.75
    assert optimizer.step() is None


def test_lion_trains_bf16_parameters_with_bf16_state():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16))
    optimizer = Lion([parameter], lr=2 ** -5)       # a step that bf16 holds exactly at this size
    for _ in range(4):
        parameter.grad = torch.tensor([1.0, -3.0, 0.0], dtype=torch.bfloat16)
        optimizer.step()
    assert parameter.dtype == torch.bfloat16
    assert parameter.tolist() == [0.875, -1.875, 0.5]
    assert optimizer.state[parameter]["momentum"].dtype == torch.bfloat16


@pytest.mark.parametrize("arguments", [{"lr": 0.0}, {"lr": -1e-4}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.99)},
                                       {"weight_decay": -0.1}], ids=str)
def test_lion_refuses_settings_that_cannot_work(arguments):
    with pytest.raises(ValueError, match="Lion needs"):
        Lion([torch.nn.Parameter(torch.zeros(2))], **arguments)


# ---------------------------------------------------------------------------------------------- make_optimizer


@pytest.mark.parametrize("name, kind, default", [("adam", torch.optim.Adam, 1.41e-5), ("sgd", torch.optim.SGD, 1.41e-5),
                                                 ("lion", Lion, 1.41e-5 / 3),
                                                 ("adam8bit", bitsandbytes.optim.Adam8bit, 1.41e-5)])
def test_make_optimizer_gives_the_class_and_its_default_learning_rate(name, kind, default):
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = make_optimizer(name, parameters)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == default
    assert make_optimizer(name, parameters, learning_rate=0.5).param_groups[0]["lr"] == 0.5


def test_every_listed_optimizer_can_be_made_and_an_unknown_one_names_them():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    for name in OPTIMIZERS:
        make_optimizer(name, parameters)
    with pytest.raises(ValueError, match="'adagrad'.*adam, sgd, lion"):
        make_optimizer("adagrad", parameters)


def one_step(name, layer):
    optimizer = make_optimizer(name, layer.parameters(), learning_rate=0.01)
    layer(torch.ones(1, layer.in_features)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name, expected", [("adam", 8), ("lion", 4), ("sgd", 0)])
def test_bytes_of_state_per_float32_parameter(name, expected):
    layer = torch.nn.Linear(30, 20)
    counters = 2 * 4 if name == "adam" else 0       # Adam counts its steps for each of the two tensors, in 4 bytes
    assert state_bytes(make_optimizer(name, layer.parameters())) == 0
    assert state_bytes(one_step(name, layer)) == expected * sum(p.numel() for p in layer.parameters()) + counters


def test_8_bit_adam_keeps_one_byte_moments_for_large_tensors_and_float32_for_small_ones():
    layer = torch.nn.Linear(256, 64)
    optimizer = one_step("adam8bit", layer)
    large, small = optimizer.state[layer.weight], optimizer.state[layer.bias]
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8
    assert small["state1"].dtype == small["state2"].dtype == torch.float32
    # two moments; one scale in float32 per block of 256 for each of them; two tables of 256 values; and the bias
    assert state_bytes(optimizer) == 2 * layer.weight.numel() * (1 + 4 / 256) + 2 * 256 * 4 + 2 * 4 * layer.bias.numel()


def test_8_bit_adam_follows_adam():
    moved = {}
    for name in ("adam", "adam8bit"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 64, bias=False)
        start, data = layer.weight.detach().clone(), torch.randn(10, 32, 256)
        optimizer = make_optimizer(name, layer.parameters(), learning_rate=1e-3)
        for batch in data:
            optimizer.zero_grad()
            (layer(batch) - 1).square().mean().backward()
            optimizer.step()
        moved[name] = (layer.weight.detach() - start).flatten()
    assert torch.nn.functional.cosine_similarity(moved["adam"], moved["adam8bit"], dim=0) > 0.99
    assert 0.97 < moved["adam8bit"].norm() / moved["adam"].norm() < 1.03


def test_8_bit_adam_without_its_package_says_what_to_install(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find_spec(name, *a))
    with pytest.raises(ValueError, match="adam8bit.*pip install bitsandbytes"):
        make_optimizer("adam8bit", [torch.nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("lr, said", [(1e-3, True), (3e-4, True), (1e-4, False), (None, False)])
def test_lion_at_adams_learning_rate_warns_and_keeps_the_value(lr, said, caplog):
    optimizer = make_optimizer("lion", [torch.nn.Parameter(torch.zeros(2))], lr, adam_learning_rate=3e-4)
    assert optimizer.param_groups[0]["lr"] == (3e-4 / 3 if lr is None else lr)
    assert ("every entry moves by all of it" in caplog.text) == said


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_equals_the_public_package(weight_decay):
    from lion_pytorch import Lion as PublicLion
    layers = []
    for kind in (Lion, PublicLion):
        torch.manual_seed(0)
        layer, data = torch.nn.Linear(16, 8), torch.randn(20, 4, 16)
        optimizer = kind(layer.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=weight_decay)
        for batch in data:
            optimizer.zero_grad()
            (layer(batch) - 1).square().mean().backward()
            optimizer.step()
        layers.append(layer)
    assert torch.equal(layers[0].weight, layers[1].weight) and torch.equal(layers[0].bias, layers[1].bias)


def test_trainable_parameters_leaves_frozen_ones_out():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert [id(p) for p in trainable_parameters(model)] == [id(p) for p in model.parameters()]
    model[0].weight.requires_grad_(False)
    assert [id(p) for p in trainable_parameters(model)] == [id(p) for p in (model[0].bias, *model[1].parameters())]


def test_trainable_parameters_refuses_a_wholly_frozen_model():
    with pytest.raises(ValueError, match="0 trainable parameters.*num_shared_layers"):
        trainable_parameters(torch.nn.Linear(2, 2).requires_grad_(False))


# ---------------------------------------------------------------------------------------------- schedules


def rates(name, steps, warmup_steps=0, count=None, lr=1.0):
    """The learning rates that `count` updates use, each followed by a step of the schedule."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    schedule = make_schedule(name, optimizer, steps, warmup_steps)
    used = []
    for _ in range(count or steps + 3):
        parameter.grad = torch.ones(1)
        before = parameter.item()
        optimizer.step()
        used.append(before - parameter.item())      # what SGD really moved by
        schedule.step()
    return used


@pytest.mark.parametrize("name, by_step", [
    ("constant", {4: 1.0, 7: 1.0, 10: 1.0, 12: 1.0}),
    ("linear", {4: 1.0, 6: 2 / 3, 7: 0.5, 9: 1 / 6, 10: 0.0, 12: 0.0}),
    ("cosine", {4: 1.0, 6: 0.75, 7: 0.5, 8: 0.25, 10: 0.0, 12: 0.0}),           # cos(60 degrees) is 1/2
    ("exponential", {4: 1.0, 7: 0.1, 10: 0.01, 12: 0.01}),
])
def test_a_schedule_warms_up_linearly_and_then_has_the_values_of_its_formula(name, by_step):
    used = rates(name, steps=10, warmup_steps=4)
    assert used[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-6)
    for step, expected in by_step.items():
        assert used[step] == pytest.approx(expected, abs=1e-6), step


@pytest.mark.parametrize("name, middle, end", [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0),
                                               ("exponential", 0.1, 0.01)])
def test_a_schedule_without_warm_up_begins_at_the_full_learning_rate(name, middle, end):
    used = rates(name, steps=8, lr=0.5)
    assert [used[0], used[4], used[8]] == pytest.approx([0.5, 0.5 * middle, 0.5 * end], abs=1e-6)


def test_a_schedule_is_stepped_after_the_optimizer_without_a_warning_from_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in SCHEDULES:
            rates(name, steps=4, warmup_steps=2)


def test_a_warm_up_as_long_as_the_run_ends_at_the_full_learning_rate():
    assert rates("linear", steps=4, warmup_steps=4, count=4) == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-6)


def test_an_unknown_schedule_names_the_choices_and_a_bad_warm_up_both_numbers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="'polynomial'.*constant, linear, cosine, exponential"):
        make_schedule("polynomial", optimizer, 10)
    for warmup_steps in (-1, 11):
        with pytest.raises(ValueError, match=rf"warmup_steps \({warmup_steps}\).*steps \(10\)"):
            make_schedule("linear", optimizer, 10, warmup_steps)


# ----------------------------------------------------------------------------------------------- restored state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_continues_exactly(name):
    torch.manual_seed(0)
    layer = torch.nn.Linear(80, 64)         # 5,120 weights: enough for 8-bit state, and the bias keeps float32
    data = torch.randn(12, 8, 80)

    def train(layer, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            (layer(batch) - 1).square().mean().backward()
            optimizer.step()

    optimizer = make_optimizer(name, layer.parameters(), learning_rate=0.01)
    train(layer, optimizer, data[:5])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(layer)
    restored = make_optimizer(name, twin.parameters(), learning_rate=0.5)       # the state brings the learning rate too
    restored.load_state_dict(torch.load(file))
    train(layer, optimizer, data[5:])
    train(twin, restored, data[5:])
    assert torch.equal(layer.weight, twin.weight) and torch.equal(layer.bias, twin.bias)


def test_a_restored_schedule_continues_exactly():
    def start():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        return optimizer, make_schedule("cosine", optimizer, 10, 2)

    def trace(optimizer, schedule, steps):
        used = []
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            used.append(optimizer.param_groups[0]["lr"])
        return used

    optimizer, schedule = start()
    trace(optimizer, schedule, 4)
    again, restored = start()
    again.load_state_dict(optimizer.state_dict())
    restored.load_state_dict(schedule.state_dict())
    assert trace(again, restored, 6) == trace(optimizer, schedule, 6)
