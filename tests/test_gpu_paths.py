"""What can be shown of the code for GPUs without one.

tests/card.py is a device that is not the CPU, with a random generator of its own, on which no tensor of the CPU may join in; its numbers
a CPU computes. Steps, rollouts, checkpoints and a whole run of scripts/train.py go there and have to end where a run on the CPU ends.
What only kernels of a GPU can show is in tests/test_gpu.py.
"""
import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.commands import launch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from transformers import LlamaConfig, LlamaForCausalLM

import distributed
import ppo_core
import speed
from test_gpu import check_fp16
from test_ppo_core import make, ragged, seeded, tiny, tokenizer     # noqa: F401
from value_head import AutoModelForCausalLMWithValueHead

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "scripts" / "accelerate_configs"


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """-> what each job of tests/card.py found."""
    out = tmp_path_factory.mktemp("card") / "found.json"
    outside = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run([sys.executable, ROOT / "tests" / "card.py", out], env=outside, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


# ---------------------------------------------------------------------------------------------- on another device


def test_steps_on_a_device_are_those_on_the_cpu_and_hand_out_what_the_cpu_can_read(card):
    assert len(card["two_steps"]) == 4
    for name, found in card["two_steps"].items():
        assert found["devices"] == ["card"] and found["handed out"] == ["cpu"], name
        assert found["distance"] < 1e-6 and found["statistics"] < 1e-3 and found["gradient"] > 1e-3, (name, found)


def test_a_device_draws_with_its_own_generator_which_a_checkpoint_keeps(card):
    assert card["resumed"] == {"the CPU's generator is left alone": True, "saved as it was": True, "resumed": True,
                               "without the card's generator": False}


def test_the_lean_sampler_runs_where_torch_refuses_sums_in_any_order(card):
    """torch.use_deterministic_algorithms(True) refuses running sums of floats on a GPU."""
    assert "does not have a deterministic implementation" in card["deterministic"]["refused"]
    assert len({tuple(response) for response in card["deterministic"]["first"]}) > 1


def test_a_weight_that_is_not_finite_is_found_on_the_gpu_and_beside_it(card):
    """ZeRO-3 with offload keeps large shares on the CPU and small ones on the GPU."""
    assert card["both_places"] == [None, "small.weight", "large.weight", None]


def test_a_number_that_is_not_finite_is_named_on_a_device_too(card):
    score, reference, weights, rollout = card["refused"]
    assert "the scores of sample 2 of 4 (mini-batch 1) are nan" in score and "the reference log-probs of sample 0 of 4" in reference
    assert "transformer.ln_f.weight first" in weights and "rollout: the logits of sample 0 of 4 are not finite" in rollout


def test_a_whole_run_on_a_device_measures_it_empties_its_cache_and_evaluates_without_drawing_from_it(card):
    assert card["whole_run"] == {"code": None, "peak": 12345, "emptied": 4, "drawn by evaluations": [False, False]}


# ------------------------------------------------------------------------------------------ how a process finds its GPU


@pytest.fixture
def two_gpus(monkeypatch):
    """torch says that there are two, and groups of processes are only asked for. -> what was asked for"""
    asked = []
    for name, answer in {"is_available": True, "device_count": 2, "current_device": 0, "set_device": None, "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: asked.append(_) or answer if answer is None else answer)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **keywords: asked.append(keywords))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: int(os.environ["RANK"]))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield asked
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_each_process_takes_the_gpu_of_its_local_rank_and_waits_as_long_as_it_is_told(two_gpus, monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("RANK", rank)
    accelerator = distributed.start(timeout=77)
    assert accelerator.device == torch.device("cuda", int(rank)) and accelerator.num_processes == 2
    assert two_gpus == [{"backend": "nccl", "timeout": timedelta(seconds=77)}, (torch.device("cuda", int(rank)),)]


def test_one_process_takes_the_gpu_that_torch_would_take_and_with_cpu_none(two_gpus):
    assert distributed.start().device == torch.device("cuda")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert distributed.start(cpu=True).device == torch.device("cpu") and two_gpus == []


def test_two_processes_that_share_a_gpu_talk_through_gloo(two_gpus, monkeypatch):
    """What the tests of two processes do on a machine with one GPU: NCCL refuses two processes on one."""
    from forge import share_gpu
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("RANK", rank)
        AcceleratorState._reset_state(reset_partial_state=True)
        two_gpus.clear()
        share_gpu(timeout=9)
        accelerator = distributed.start()
        assert accelerator.device == torch.device("cuda", 0) and accelerator.local_process_index == 0
        assert accelerator.process_index == int(rank) and PartialState().backend == "gloo"
        assert two_gpus[0] == {"backend": "gloo", "timeout": timedelta(seconds=9)}


def test_a_reference_in_8_bits_stays_on_the_cpu_when_the_run_does(two_gpus):
    """transformers would load it onto the GPU, where the run's tokens are not."""
    import train
    accelerator = distributed.start(cpu=True)
    config = Namespace(model_name="assets/review-lm", lora_r=None, reference_bits=8)
    _, _, reference = train.load_models(config, accelerator)
    assert {p.device.type for p in reference.parameters()} == {"cpu"} and distributed.quantized(reference)


# ------------------------------------------------------------------------------------------------------- launch lines


def environment(monkeypatch, way, *flags):
    """-> what `accelerate launch --config_file <way>.yaml --num_processes 2 script.py` sets for its processes, none of which is started."""
    found = []
    for name, prepare in {"deepspeed_launcher": lambda args: prepare_deepspeed_cmd_env(args)[1], "multi_gpu_launcher": prepare_multi_gpu_env,
                          "simple_launcher": lambda args: prepare_simple_launcher_cmd_env(args)[1]}.items():
        monkeypatch.setattr(launch, name, lambda args, prepare=prepare: found.append(prepare(args)))
    line = ["--config_file", str(CONFIGS / f"{way}.yaml"), "--num_processes", "2", *flags, "script.py"]
    launch.launch_command(launch.launch_command_parser().parse_args(line))
    return found[0]


def test_no_launch_line_keeps_a_process_from_its_gpu_and_each_brings_its_stage(monkeypatch):
    """Nor does multi_cpu: where there is a GPU the script needs --cpu, as the file says."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    found = {path.stem: environment(monkeypatch, path.stem) for path in CONFIGS.glob("*.yaml")}
    assert {way for way, variables in found.items() if variables.get("ACCELERATE_USE_CPU", "false").lower() == "true"} == set()
    stages = {way: variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] for way, variables in found.items()
              if variables.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"}
    assert stages == {"deepspeed_zero1": "1", "deepspeed_zero2": "2", "deepspeed_zero3": "3", "deepspeed_zero3_offload": "3"}
    assert found["deepspeed_zero3_offload"]["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == "cpu"
    assert environment(monkeypatch, "multi_gpu", "--mixed_precision", "fp16")["ACCELERATE_MIXED_PRECISION"] == "fp16"


# ------------------------------------------------------------------------------------------------------- half precision


def test_in_fp16_a_step_that_overflows_is_counted_and_lowers_the_scale_and_training_goes_on(tmp_path):
    """The loss scaler of a GPU, on the CPU."""
    check_fp16("cpu", tmp_path)


def test_where_float32_may_be_tf32_log_probs_may_differ_as_in_half_precision():
    matmul = torch.backends.cuda.matmul
    usual = matmul.fp32_precision
    trainer = make(ppo_epochs=1)
    forward = trainer.forward

    def rounded(model, rows, **kwargs):         # as other sizes of a mini-batch round in TF32
        logprobs, *rest = forward(model, rows, **kwargs)
        return logprobs + 0.01 * rows["mask"] * torch.is_grad_enabled(), *rest
    trainer.forward = rounded
    with pytest.raises(RuntimeError, match="the ratio is not 1"):
        trainer.step(*ragged())
    try:
        matmul.fp32_precision = "tf32"
        trainer.step(*ragged())
    finally:
        matmul.fp32_precision = usual


# --------------------------------------------------------------------------------------------------- shapes, on meta


def test_the_maths_makes_no_tensor_on_the_cpu_and_has_the_shapes_that_it_says():
    B, R, V = 3, 5, 7
    logits, labels = torch.empty(B, R, V, device="meta"), torch.empty(B, R, dtype=torch.long, device="meta")
    x, mask = torch.empty(B, R, device="meta"), torch.empty(B, R, dtype=torch.long, device="meta")
    advantages, returns = ppo_core.gae(x, x, mask, 1.0, 0.95, 1.0)
    results = [ppo_core.logprobs_from_logits(logits, labels), ppo_core.entropy_from_logits(logits), advantages, returns,
               *ppo_core.policy_loss(x, x, x, 0.2), *ppo_core.value_loss(x, x, x, 0.2), ppo_core.masked_whiten(x, mask)]
    assert all(result.device.type == "meta" and result.shape == (B, R) for result in results)
    probabilities = torch.empty(B, V, device="meta")
    assert speed.draw(probabilities).shape == (B,) and speed.draw(probabilities).device.type == "meta"


def test_a_policy_of_7_billion_parameters_gives_logits_of_response_tokens_alone(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **keywords: nullcontext())         # meta has none
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000,
                             attn_implementation="eager")        # the other one looks at the mask's numbers, and meta has none
        model = AutoModelForCausalLMWithValueHead.from_pretrained(LlamaForCausalLM(config))
        ids, positions = torch.empty(4, 512, dtype=torch.long), torch.empty(4, 256, dtype=torch.long)
        logits, _, values = model(ids, torch.ones_like(ids), logit_positions=positions, use_cache=False)
    assert 6.7e9 < sum(p.numel() for p in model.parameters()) < 7e9
    assert logits.shape == (4, 256, 32000) and values.shape == (4, 256) and logits.device.type == values.device.type == "meta"
