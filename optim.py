"""Optimizers and learning-rate schedules for PPO by name, and the parameters that they train.

Why: Adam keeps 8 bytes of state for each float32 parameter of 4 bytes. Lion keeps half of that, 8-bit Adam a
quarter, SGD nothing. The schedule matters more than in supervised training: the policy writes its own data,
so after a step that was too large, the later batches are bad too.
Source: Lion is algorithm 2 of Chen et al. 2023 (arXiv 2302.06675). 8-bit Adam comes from bitsandbytes
(Dettmers et al. 2022, arXiv 2110.02861): one byte per moment, one float32 scale per 256 entries.
Differs from the paper in: nothing; from TRL 0.11.4 in: a schedule is stepped once per PPO step on any number
of processes (in TRL, N processes step it N times).
Shapes: parameters may have any shape.
Copy me: needs torch, and bitsandbytes for adam8bit. Tested by tests/test_optim.py.
"""
import importlib.util
import logging
import math

import torch

logger = logging.getLogger(__name__)

OPTIMIZERS = ("adam", "sgd", "lion", "adam8bit")
SCHEDULES = ("constant", "linear", "cosine", "exponential")


def trainable_parameters(model, value_learning_rate=None):
    """-> list of the parameters that receive a gradient; no optimizer needs the others.

    value_learning_rate: of the value head: -> a list of two groups, the second with this learning rate.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the model has 0 trainable parameters; unfreeze some, or lower num_shared_layers")
    if value_learning_rate is None:
        return parameters
    head = list(model.v_head.parameters())
    numbers = {id(p) for p in head}
    return [{"params": [p for p in parameters if id(p) not in numbers]},
            {"params": head, "lr": value_learning_rate}]


def default_learning_rate(name, adam=1.41e-5):
    """-> the learning rate for the optimizer `name`. adam: Adam's rate (default: PPOConfig's).

    Lion moves every entry by the whole learning rate, so it gets a third of Adam's.
    """
    return adam / 3 if name == "lion" else adam


def make_optimizer(name, parameters, learning_rate=None, adam_learning_rate=1.41e-5):
    """-> a torch optimizer. name: one of OPTIMIZERS. learning_rate: if None, see default_learning_rate.

    adam8bit keeps 8-bit state for tensors of at least 4,096 entries, float32 state for smaller ones.
    ValueError: the name is unknown, or bitsandbytes is not installed.
    """
    lr = default_learning_rate(name, adam_learning_rate) if learning_rate is None else learning_rate
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, fused=True)     # one pass over each tensor
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    if name == "lion":
        if lr >= adam_learning_rate:
            logger.warning(
                "Lion's learning rate %.3g is not below Adam's %.3g: every entry moves by all of it, so a "
                "third to a tenth of Adam's (%.3g to %.3g) is usual; going on with %.3g",
                lr, adam_learning_rate, adam_learning_rate / 3, adam_learning_rate / 10, lr)
        return Lion(parameters, lr=lr)
    if name == "adam8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("adam8bit needs the package bitsandbytes, which is not installed; "
                             "run: pip install bitsandbytes")
        import bitsandbytes
        return bitsandbytes.optim.Adam8bit(parameters, lr=lr)
    raise ValueError(f"optimizer is {name!r}; use one of {', '.join(OPTIMIZERS)}")


def state_bytes(optimizer):
    """-> bytes of the optimizer's state; 0 before the first step, which creates it."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    # By address, because the states of all parameters in 8-bit Adam share two tables of 256 values.
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def make_schedule(name, optimizer, steps, warmup_steps=0):
    """-> a torch scheduler, to be stepped once per PPO step. name: one of SCHEDULES.

    steps: PPO steps of the whole run. The learning rate rises linearly in the first `warmup_steps` of them.
    Then it stays (constant), or falls until `steps`: to 0 (linear, cosine), to 1 % of its peak (exponential).
    """
    if name not in SCHEDULES:
        raise ValueError(f"lr_scheduler is {name!r}; use one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps ({warmup_steps}) must be between 0 and steps ({steps}); "
                         f"try {steps // 10}")

    def factor(step):
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        # progress: 0 at the end of the warm-up, 1 at `steps`
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        factors = {"constant": 1.0, "linear": 1.0 - progress,
                   "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "exponential": 0.01 ** progress}
        return factors[name]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def lion_update(parameter, gradient, momentum, lr, beta1, beta2, weight_decay):
    """One step of Lion for one parameter (algorithm 2 of the paper). All three tensors have the same shape.

    Changes `parameter` and `momentum` in place.
    """
    direction = (momentum * beta1 + gradient * (1 - beta1)).sign_()     # every entry moves by lr
    parameter.mul_(1 - lr * weight_decay)                               # decoupled weight decay, as in AdamW
    parameter.add_(direction, alpha=-lr)
    momentum.mul_(beta2).add_(gradient, alpha=1 - beta2)                # with beta2 > beta1, a longer average


class Lion(torch.optim.Optimizer):
    """Lion (EvoLved Sign Momentum) keeps one momentum tensor per parameter, half of Adam's state.

    lr: divide Adam's by 3 to 10. weight_decay: multiply Adam's by the same number.
    Do not use it with batches below 64 (section 5): the sign turns a small noisy gradient into a full step.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        # With `not`, NaN is refused too, because a comparison with NaN is false.
        if not (lr > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"Lion needs lr > 0, weight_decay >= 0 and betas in [0, 1), got lr={lr}, "
                             f"weight_decay={weight_decay} and betas={tuple(betas)}; try lr=1e-4")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """closure: computes loss and gradients, as in every torch optimizer. -> the loss, or None."""
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
                lion_update(parameter, parameter.grad, state["momentum"], group["lr"], *group["betas"],
                            group["weight_decay"])
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
        last_rate = optimizer.param_groups[0]["lr"]
        print(f"{name:8s} loss {loss:.4f}, {state_bytes(optimizer)} bytes of state, rate {last_rate:.1e}")
