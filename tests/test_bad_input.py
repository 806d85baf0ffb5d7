"""What a run is fed: numbers that are none, files that are not what they should be, text and rewards from anywhere.

Each fault has to end in one sentence that names it, with nothing half done: weights and optimizer as they were, no model half loaded,
no code of a file executed.
"""
import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from test_distributed import HERE, execute, launcher

import worker

long = pytest.mark.long
UPDATES = ("loss", "gradients", "new log-probs", "new values")      # found in the update; all else before it


# ---------------------------------------------------------------------------------------------------- bad numbers


def numbers(processes):
    size = 8 // processes
    return {"ppo_epochs": 2, "batch_size": size, "mini_batch_size": 2, "gradient_accumulation_steps": 2 // processes,
            "use_score_scaling": True}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """-> refused(way): what each rank found when NaN and infinity were put into every stage (worker.bad_numbers)."""
    known, folder = {}, tmp_path_factory.mktemp("bad")

    def ranks(way):
        if way not in known and way == "one":
            known[way] = [worker.bad_numbers(numbers(1))[0]]
        elif way not in known:
            job = {"name": "bad", "do": "bad_numbers", "settings": numbers(2)}
            code, output = execute([*launcher(way, "--main_process_port", "0"), HERE / "worker.py", folder / way, json.dumps([job])], seconds=240)
            assert code == 0, output[-3000:]
            known[way] = [json.loads((folder / f"{way}-bad-{rank}.json").read_text()) for rank in (0, 1)]
        return known[way]
    yield ranks
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("place", worker.PLACES)
@pytest.mark.parametrize("way", ["one", "multi_cpu", *(pytest.param(f"deepspeed_zero{stage}", marks=long) for stage in (2, 3))])
def test_a_number_that_is_not_finite_is_refused_by_name_before_it_moves_anything(way, place, number, refused):
    found = [rank[f"{place} {number}"] for rank in refused(way)]
    first = found[0]
    assert all({**one, "same": 0} == {**first, "same": 0} for one in found), found      # all ranks agree, to the letter
    assert all(one["same"] for one in found), "weights or optimizer state are not what they were"
    assert first["stage"] == place.removeprefix("new ")
    assert first["moments"] and first["steps_done"] == 0
    message = first["message"]
    rank = "" if way == "one" else ".*rank 1: "
    epoch = ", epoch 2, optimizer step [34]" if place in UPDATES else ""
    sample = {"weights": "the model's weights are not finite, .*mlp.c_fc.bias first", "gradients": r"gradient of .* is not finite, over samples \d, \d"}.get(
        place, rf"sample 1 of {8 // len(found)} \(mini-batch [12]\) (are|is) {'inf|-inf' if number == 'inf' else 'nan'}")
    assert re.match(f"{rank}step {first['step']}{epoch}: .*{sample}", message) and "\n" not in message, message
    assert (first["optimizer steps"] > 0) == (place in UPDATES)
    assert first["then"] is None                                # and the next step is taken
