"""Optimizers and learning-rate schedules for PPO, and which parameters they train.

Why: Adam keeps 8 bytes of state for each parameter, which for a 7B policy is more than the policy. Lion keeps half of that,
8-bit Adam a quarter, SGD none. A schedule matters more than in supervised training: the policy makes its own data, so a step
that is too large late in a run is not repaired by the next batch.
Source: Lion is algorithm 2 of Chen et al. 2023 (arXiv 2302.06675), update rule in `lion_update`; 8-bit Adam is bitsandbytes'
(Dettmers et al. 2022, arXiv 2110.02861): moments in blocks of 256 one-byte numbers, which one scale per block spreads out.
Differs from the paper in: nothing; from TRL 0.11.4 in: schedules are stepped once per PPO step, whatever the number of
processes or the accumulation (there, N processes stepped them N times).
Shapes: every function here works on whole parameters of any shape.
Copy me: needs torch, and bitsandbytes for adam8bit. Tested by tests/test_optim.py.
"""
import importlib.util
import json
import logging
import math

import torch

logger = logging.getLogger(__name__)

OPTIMIZERS = ("adam", "sgd", "lion", "adam8bit")
SCHEDULES = ("constant", "linear", "cosine", "exponential")


def trainable_parameters(model):
    """-> list of the parameters that take a gradient. A frozen one in an optimizer would cost state and do nothing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has 0 trainable parameters; unfreeze some, or lower num_shared_layers")
    return parameters


def default_learning_rate(name, adam=1.41e-5):
    """adam: what suits Adam; 1.41e-5 is PPOConfig's. Lion moves every entry by all of it, so it gets a third."""
    return adam / 3 if name == "lion" else adam


def make_optimizer(name, parameters, learning_rate=None, adam_learning_rate=1.41e-5):
    """name: one of OPTIMIZERS. learning_rate: None = default_learning_rate(name, adam_learning_rate).

    ValueError: an unknown name, or adam8bit without bitsandbytes. 8-bit state is kept for tensors of 4,096 entries and more;
    smaller ones (norms, biases) keep float32, as bitsandbytes has it.
    """
    lr = default_learning_rate(name, adam_learning_rate) if learning_rate is None else learning_rate
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)     # one pass over each tensor instead of eight; the same update
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    if name == "lion":
        if lr >= adam_learning_rate:
            logger.warning("Lion's learning rate %.3g is not below %.3g, which suits Adam: every entry moves by all of it, so a third "
                           "to a tenth (%.3g to %.3g) is usual; going on with %.3g", lr, adam_learning_rate,
                           adam_learning_rate / 3, adam_learning_rate / 10, lr)
        return Lion(parameters, lr=lr)
    if name == "adam8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("adam8bit needs the package bitsandbytes, which is not installed; run: pip install bitsandbytes")
        import bitsandbytes
        return bitsandbytes.optim.Adam8bit(parameters, lr=lr)
    raise ValueError(f"optimizer is {name!r}; use one of {', '.join(OPTIMIZERS)}")


def state_bytes(optimizer):
    """Bytes of the optimizer's state; 0 before its first step, when there is none yet."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    # By address: 8-bit Adam's table of 256 values is one tensor that every parameter's state names.
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def pack_state(optimizer):
    """-> (tensors, rest): the state dict as named tensors, fit for safetensors, and as what JSON can hold."""
    state = optimizer.state_dict()
    tensors, numbers = {}, {}

    def pack(path, value):
        if isinstance(value, dict):     # of parameters, of one parameter's state, and bitsandbytes nests once more
            for name, inner in value.items():
                pack([*path, str(name)], inner)
        elif torch.is_tensor(value):
            tensors["/".join(path)] = value.detach().clone().contiguous()       # a copy: 8-bit Adam's table is one for all
        else:
            numbers["/".join(path)] = value

    pack([], state["state"])
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def unpack_state(optimizer, tensors, rest):
    """The inverse of `pack_state`, into an optimizer over the same parameters. ValueError when there are others."""
    own, saved = ([len(group["params"]) for group in groups] for groups in (optimizer.state_dict()["param_groups"], rest["param_groups"]))
    if own != saved:
        raise ValueError(f"the saved optimizer has groups of {saved} parameters but this one has {own}; make it over the same "
                         "parameters, in the same order, with the same layers shared")
    state = {}
    for key, value in [*tensors.items(), *rest["numbers"].items()]:
        index, *path, name = key.split("/")
        entries = state.setdefault(int(index), {})
        for step in path:
            entries = entries.setdefault(step, {})
        entries[name] = value
    groups = [{name: tuple(v) if name == "betas" else v for name, v in group.items()} for group in rest["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def make_schedule(name, optimizer, steps, warmup_steps=0):
    """A torch scheduler, to be stepped once per PPO step. steps, warmup_steps: PPO steps, of the whole run.

    Warm-up rises linearly to the learning rate. Then: constant; linear or cosine down to 0 at `steps`; exponential down to
    1 % of the learning rate at `steps`.
    """
    if name not in SCHEDULES:
        raise ValueError(f"lr_scheduler is {name!r}; use one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps ({warmup_steps}) must be between 0 and steps ({steps}); try {steps // 10}")

    def factor(step):
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))     # share of the decay that is behind us
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)),
                "exponential": 0.01 ** done}[name]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def pack_schedule(scheduler):
    """-> what changes in a schedule as it is stepped, as JSON can hold it. ValueError when it cannot.

    Left out is what the constructor was given (MultiStepLR's milestones, functions): a resumed run gives it again.
    """
    state = {}
    for name, value in scheduler.state_dict().items():
        if name in ("milestones", "lr_lambdas") or callable(value):
            continue
        try:
            state[name] = json.loads(json.dumps(value))
        except TypeError:
            state[name] = None
        if state[name] != value:
            raise ValueError(f"the state of {type(scheduler).__name__} has a {name} that JSON cannot hold, so a checkpoint could not "
                             "restore it; use a schedule of numbers, such as LambdaLR or make_schedule(...)")
    return state


def unpack_schedule(scheduler, state):
    """The inverse of `pack_schedule`, into a scheduler that was made with the same arguments."""
    scheduler.load_state_dict({**scheduler.state_dict(), **state})


@torch.no_grad()
def lion_update(parameter, gradient, momentum, lr, beta1, beta2, weight_decay):
    """One step of Lion for one parameter, in place (algorithm 2 of the paper; all three tensors have the same shape)."""
    direction = (momentum * beta1 + gradient * (1 - beta1)).sign_()     # only the sign: every entry moves by exactly lr
    parameter.mul_(1 - lr * weight_decay)                               # decoupled weight decay, as AdamW's
    parameter.add_(direction, alpha=-lr)
    momentum.mul_(beta2).add_(gradient, alpha=1 - beta2)                # after the step, with its own, slower beta


class Lion(torch.optim.Optimizer):
    """EvoLved Sign Momentum. One momentum tensor per parameter: half of Adam's state.

    lr: every entry moves by lr whatever its gradient, so take Adam's divided by 3 to 10. weight_decay: take Adam's times the
    same number. Not for small batches: the sign of a noisy gradient is noise at full size (section 5 of the paper: 64+).
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        if not (lr > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):      # `not`, so that NaN is refused
            raise ValueError(f"Lion needs lr > 0, weight_decay >= 0 and betas in [0, 1), got lr={lr}, "
                             f"weight_decay={weight_decay} and betas={tuple(betas)}; try lr=1e-4")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                lion_update(parameter, parameter.grad, state["momentum"], group["lr"], *group["betas"], group["weight_decay"])
        return loss


if __name__ == "__main__":
    torch.manual_seed(0)
    data, target = torch.randn(64, 8), torch.randn(64, 1)
    for name in OPTIMIZERS if importlib.util.find_spec("bitsandbytes") else OPTIMIZERS[:3]:
        layer = torch.nn.Linear(8, 1)
        optimizer = make_optimizer(name, trainable_parameters(layer), learning_rate=0.01)
        schedule = make_schedule("cosine", optimizer, steps=100, warmup_steps=10)
        for _ in range(100):
            loss = (layer(data) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name:8s} loss {loss:.4f}, {state_bytes(optimizer)} bytes of state, last learning rate {optimizer.param_groups[0]['lr']:.1e}")
