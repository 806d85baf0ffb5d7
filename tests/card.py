"""A device that is not the CPU, for machines without a GPU: tensors "on the card", whose numbers a CPU computes.

    python card.py OUT      # the jobs below, see test_gpu_paths.py; in a process of its own, because torch keeps such a device for good
A tensor on the card is a wrapper around one on the CPU. As on a GPU, an operation on tensors of both places is an error, the card
has its own random generator, and `.numpy()` needs `.cpu()` first. What such a device cannot show is what a kernel of a GPU does.
"""
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "scripts")]
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}                     # they may join both places
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}   # by numbers on the CPU, too


class OnCard(torch.Tensor):
    """A tensor whose device is the card."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
                                                   dtype=inner.dtype, device=CARD, requires_grad=requires_grad)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return execute(operation, args, kwargs or {})

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        return self.inner.tolist()

    def numpy(self):
        raise TypeError("can't convert card:0 device type tensor to numpy")

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)

    def __repr__(self):
        return f"OnCard({self.inner})"


class CardModule:
    """What torch.cuda is for a GPU."""
    emptied = 0

    def __init__(self):
        self.state = torch.Generator().manual_seed(0).get_state()

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def set_device(self, device):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed):
        self.state = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device=None):
        return self.state.clone()

    def set_rng_state(self, state, device=None):
        assert type(state) is torch.Tensor and state.dtype == torch.uint8
        self.state = state.clone()

    def empty_cache(self):
        self.emptied += 1

    def max_memory_allocated(self, device=None):
        return 12345


def execute(operation, args, kwargs):
    tensors = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    here = [tensor for tensor in tensors if not isinstance(tensor, OnCard) and tensor.dim() > 0]
    place = kwargs.get("device")
    on_card = bool(there) if place is None else torch.device(place).type == "card"
    if operation is aten.copy_.default:
        on_card = isinstance(args[0], OnCard)
    indexed = operation in INDEXED and isinstance(args[0], OnCard)
    if there and here and operation not in MOVES and not indexed:
        raise RuntimeError(f"{operation}: Expected all tensors to be on the same device, but found at least two devices, card:0 and cpu "
                           f"({[tuple(tensor.shape) for tensor in here]})")
    if operation is aten.cumsum.default and on_card and args[0].is_floating_point() and torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")           # as for CUDA
    if place is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda item: item.inner if isinstance(item, OnCard) else item, (args, kwargs))
    draws = on_card and torch.Tag.nondeterministic_seeded in operation.tags
    if draws:
        before = torch.get_rng_state()
        torch.set_rng_state(torch.card.state)
    result = operation(*inner_args, **inner_kwargs)
    if draws:
        torch.card.state = torch.get_rng_state()
        torch.set_rng_state(before)
    if operation is aten._to_copy.default and any(result is arg for arg in inner_args):
        result = result.clone()
    if not on_card:
        return result
    wrapped = tree_map(lambda item: OnCard(item) if isinstance(item, torch.Tensor) else item, result)
    return return_and_correct_aliasing(operation, args, kwargs, wrapped) if there else wrapped


class Card(TorchDispatchMode):
    """Inside the `with` block "card" is a device. A module that is moved keeps its Parameter objects, as with a GPU."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)       # torch.tensor(1.0, device="card") is made on the CPU and then moved
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return execute(operation, args, kwargs or {})


_setup_privateuseone_for_python_backend("card", CardModule())
CARD = torch.device("card", 0)


# ------------------------------------------------------------------------------------------------------- the jobs


def trained(kind, where, steps=1, **settings):
    """Some steps on `where`, with what users may give on the CPU given there. -> weights, statistics, the trainer"""
    import numpy as np
    from test_ppo_core import config, ragged, sgd, tiny, tokenizer
    torch.manual_seed(0)
    np.random.seed(0)
    model, shared = tiny(settings.pop("family", "gpt2")), settings.pop("shared", None)
    trainer = kind(config(**settings), model, None, tokenizer(), optimizer=sgd(model), num_shared_layers=shared,
                   accelerator=start(where))
    stats = []
    for seed in range(steps):
        queries, responses, scores = ragged(seed=seed)
        masks = [torch.ones_like(response).index_fill(0, torch.tensor([len(response) // 2]), 0) for response in responses]
        if seed == 1:
            scores, masks = [torch.full(response.shape, 0.1) for response in responses], None           # a score per token
        stats.append(trainer.step(queries, responses, scores, masks))
    weights = {name: tensor.detach().cpu() for name, tensor in trainer.language_model.state_dict().items()}
    return weights, stats, trainer


def start(where):
    from accelerate.state import AcceleratorState

    import distributed
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = where
    accelerator = distributed.start()
    assert accelerator.device.type == torch.device(where).type
    return accelerator


def two_steps():
    """-> how far a run on the card is from the same run on the CPU, for both trainers and some settings."""
    from ppo_core import PPOTrainer
    from speed import FastPPOTrainer
    found = {}
    for kind, name, settings in ((PPOTrainer, "llama", {"family": "llama", "gradient_checkpointing": True, "ppo_epochs": 1}),
                                 (PPOTrainer, "full KL", {"kl_penalty": "full", "whiten_rewards": True}),
                                 (FastPPOTrainer, "clipped", {"mini_batch_size": 2, "max_grad_norm": 0.5}),
                                 (FastPPOTrainer, "shared, full KL", {"shared": 1, "kl_penalty": "full"})):
        with Card():
            ours, stats, trainer = trained(kind, "card:0", 2, **settings)
            devices = {p.device.type for model in (trainer.model, trainer.ref_model) for p in model.parameters()}
            handed_out = {value.device.type for step in stats for value in step.values() if isinstance(value, torch.Tensor)}
        expected, plain_stats, _ = trained(kind, "cpu", 2, **settings)
        found[f"{kind.__name__}, {name}"] = {
            "devices": sorted(devices), "handed out": sorted(handed_out), "gradient": plain_stats[-1]["ppo/grad_norm"],
            "distance": max(float((ours[key] - expected[key]).abs().max()) for key in expected),
            "statistics": max(abs(one[key] - two[key]) for one, two in zip(stats, plain_stats) for key in one
                              if isinstance(one[key], float) and not key.startswith("time/"))}
    return found


def sample(trainer):
    queries = [torch.tensor([5, 6, 7 + i]) for i in range(4)]
    responses = trainer.generate(queries, return_prompt=False, max_new_tokens=6)
    trainer.step(queries, responses, [float(i) for i in range(4)])
    return [response.tolist() for response in responses]


def resumed():
    """A run that is saved and loaded goes on as if it had not been, also in what the card draws; without the card's generator not."""
    import tempfile

    import checkpoint
    import distributed
    from speed import FastPPOTrainer
    with Card(), tempfile.TemporaryDirectory() as place:
        _, _, trainer = trained(FastPPOTrainer, "card:0")
        distributed.seed_everything(1)
        before = torch.get_rng_state()
        sample(trainer)
        found = {"the CPU's generator is left alone": torch.equal(before, torch.get_rng_state())}
        checkpoint.save(trainer, Path(place) / "step-000001")
        state, expected = distributed.random_state(trainer.accelerator.device), sample(trainer)
        for name, spoil in (("resumed", lambda: None), ("without the card's generator", lambda: torch.card.manual_seed_all(7))):
            checkpoint.load(trainer, Path(place) / "step-000001", check=False)
            spoil()
            found[name] = sample(trainer) == expected
        saved = torch.load(Path(place) / "step-000001" / "random-0.pt", weights_only=True)
        found["saved as it was"] = torch.equal(saved["card"], state["card"])
    return found


def deterministic():
    """-> the tokens of a rollout where torch refuses what a GPU adds up in any order."""
    from speed import FastPPOTrainer
    torch.use_deterministic_algorithms(True)
    with Card():
        _, _, trainer = trained(FastPPOTrainer, "card:0")
        found = {"first": sample(trainer), "refused": None}
        try:
            torch.ones(2, 3, device="card").cumsum(-1)
        except RuntimeError as error:
            found["refused"] = str(error)
    torch.use_deterministic_algorithms(False)
    return found


def both_places():
    """ZeRO-3 with offload: some shares stay on the GPU. -> first_not_finite of whole weights, and of NaN in either place"""
    import distributed
    with Card():
        model = torch.nn.ModuleDict({"small": torch.nn.Linear(2, 2).to("card"), "large": torch.nn.Linear(3, 3)})
        found = [distributed.first_not_finite(model)]
        for name in ("small", "large"):
            kept = model[name].weight.detach().clone()
            model[name].weight.data[1] = float("nan")
            found.append(distributed.first_not_finite(model))
            model[name].weight.data.copy_(kept)
        return [*found, distributed.first_not_finite(model)]


def refused():
    """-> what is said of NaN in a score, in a reference and in the weights, during a step and a rollout."""
    from ppo_core import BadNumbers, PPOTrainer
    from test_ppo_core import ragged
    found = []
    with Card():
        _, _, trainer = trained(PPOTrainer, "card:0")
        for spoil in ("score", "reference", "weights", "rollout"):
            queries, responses, scores = ragged()
            weight = (trainer.ref_model if spoil == "reference" else trainer.model).pretrained_model.transformer.ln_f.weight.data
            kept = weight.clone()
            if spoil == "score":
                scores[2] = float("nan")
            else:
                weight[3] = float("nan")
            try:
                trainer.generate(queries, max_new_tokens=3) if spoil == "rollout" else trainer.step(queries, responses, scores)
            except BadNumbers as error:
                found.append(str(error))
            weight.copy_(kept)
    return found


def whole_run():
    """scripts/train.py on the card. -> the plan's device, peak memory, and what of the card the evaluation used up."""
    import tempfile

    import forge
    import train
    with tempfile.TemporaryDirectory() as place:
        flags = [str(flag) for flag in forge.make_inputs(Path(place)) if flag != "--cpu"]
        original, states = train.evaluate, []

        def evaluate(*arguments):
            states.append(torch.card.get_rng_state())
            found = original(*arguments)
            states.append(torch.card.get_rng_state())
            return found
        train.evaluate = evaluate
        start("card:0")
        with Card():
            code = train.main([*flags, "--steps", "2", "--save_every", "1", "--optimize_cuda_cache", "True", "--output_dir", f"{place}/run"])
        summary = json.loads((Path(place) / "run" / "summary.json").read_text())
        return {"code": code, "peak": summary["peak memory bytes"], "emptied": torch.card.emptied,
                "drawn by evaluations": [not torch.equal(*states[i:i + 2]) for i in (0, 2)]}


JOBS = (two_steps, resumed, deterministic, both_places, refused, whole_run)


def main(out):
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.pop("ACCELERATE_USE_CPU", None)
    found = {}
    for job in JOBS:
        found[job.__name__] = job()
        print(f"{job.__name__}: done after {time.process_time():.1f} s of the processor", flush=True)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
