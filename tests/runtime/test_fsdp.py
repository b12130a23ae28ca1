"""Two gloo processes under `fully_shard`: the masks, weights and states of one process on the joined batch."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("fsdp_worker.py")

_spec = importlib.util.spec_from_file_location("fsdp_worker", WORKER)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks end with: case -> results."""
    folder = tmp_path_factory.mktemp("fsdp")
    logs = [open(folder / f"{rank}.log", "w+") for rank in range(2)]  # noqa: SIM115
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(folder), str(rank), "2"], stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for log in logs:
        log.seek(0)
    assert codes == [0, 0], [log.read()[-3000:] for log in logs]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


HELD = [
    {"a.weight": 3 * 16, "b.weight": 2 * 18, "c.weight": 18},
    {"a.weight": 2 * 16, "b.weight": 1 * 18, "c.weight": 0},
]
"""Elements of each mask on each rank."""


def alone(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", worker.fxsparse.FxSparseWarning)
        return worker.Run(case).train().result()


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{path}/{i}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-6), path  # norms, in float32, are summed in another order
    else:
        assert a == b, path


def without(result, *keys):
    return {key: value for key, value in result.items() if key not in keys}


@pytest.mark.parametrize("case", worker.EXACT)
def test_sharded_equals_one_process_on_the_joined_batch(ranks, case):
    """Weights, optimizer state, the masks at every update step, history and telemetry: the same bits."""
    expected = alone(case)
    for rank in ranks:
        result = rank[case]
        if case == "an optimizer that moves inactive weights":  # one process has noticed, ranks do not have to
            result["rewirer"]["remask_every_step"] = True
        assert_same(without(result, "held", "stray"), without(expected, "held", "stray"))


@pytest.mark.parametrize("case", worker.CASES)
def test_masks_moved_and_are_held_in_parts(ranks, case):
    first, second = (rank[case] for rank in ranks)
    if case == "replicas that are not cut":
        assert first["held"] == second["held"] == {"a.weight": 5 * 16, "b.weight": 3 * 18, "c.weight": 18}
    else:
        assert [first["held"], second["held"]] == HELD
    if case != "rigl as its authors wrote it":  # whose dropped connections keep their momentum
        assert first["stray"] == second["stray"] == 0
    assert len(first["masks"]) == worker.STEPS // worker.INTERVAL
    changed = sum(sum(record["changed"].values()) for record in first["rewirer"]["history"])
    assert (changed > 0) == (case not in ("static", "pruning"))
    moved = sum(int((first["masks"][0][name] ^ mask).sum()) for name, mask in first["masks"][-1].items())
    assert (moved > 0) == (case != "static")


def test_clipping_sees_no_gradient_of_inactive_weights(ranks):
    expected = alone("clipped")
    for rank in ranks:
        assert rank["clipped"]["norms"] == pytest.approx(expected["norms"], rel=1e-12)
        assert_same(rank["clipped"]["masks"], expected["masks"])


def test_an_infinite_gradient_on_one_rank_skips_the_rewiring_on_all(ranks):
    for rank in ranks:
        state = rank["an infinite gradient on one rank"]["rewirer"]
        skipped = [record["step"] for record in state["history"] if record["skipped"]]
        assert (state["skipped_updates"], skipped) == (1, [worker.SPOILED])


def test_a_run_goes_on_from_a_distributed_checkpoint(ranks):
    for rank in ranks:
        assert_same(rank["resumed"], rank["rigl"])


def test_a_sharded_run_goes_on_in_one_process(ranks):
    states = ranks[1]["midway"]
    run = worker.Run("rigl", seed=8)
    run.sparse.load_state_dict(states["module"])
    worker.set_optimizer_state_dict(run.sparse, run.optimizer, states["optimizer"], options=worker.FULL)
    run.rewirer.load_state_dict(states["rewirer"])
    result, expected = run.train().result(), alone("rigl")
    assert_same(without(result, "masks"), without(expected, "masks"))
    assert_same(result["masks"], expected["masks"][-len(result["masks"]) :])


def test_whole_states_load_either_way(ranks):
    for rank in ranks:
        state = rank["rigl"]["module"]
        assert_same(dict(rank["loaded whole"]), dict(state))
        assert_same(dict(rank["from meta"]), dict(state))
    single = worker.sparse_module(seed=8)
    assert list(state) == list(single.state_dict())
    single.load_state_dict(state)
    assert_same(dict(single.masks), rank["rigl"]["masks"][-1])
    for name, weight in single.fold().state_dict().items():
        assert torch.equal(weight, state[name]), name


def test_a_stray_weight_on_one_rank_is_known_to_all(ranks):
    assert [rank["stray"] for rank in ranks] == [[None, "b.weight"]] * 2


def test_in_bfloat16_masks_keep_their_counts_and_ranks_agree(ranks):
    first, second = (rank["bfloat16"] for rank in ranks)
    assert_same(without(first, "held"), without(second, "held"))
    assert first["module"]["a.weight"].dtype == torch.float64
    for masks in first["masks"]:
        assert {name: int(mask.sum()) for name, mask in masks.items()} == worker.sparse_module().active_counts


REFUSED = {
    "snfs": "snfs does not rewire weights that fully_shard has cut",
    "deepr": "deepr does not rewire",
    "dsr": "dsr does not rewire",
    "snip": "snip does not rewire",
    "pruning globally": "pruning does not rewire",
    "blocks": "granularity 2x1: fully_shard cuts through its units",
    "an inner module": "a was given to fully_shard by itself and holds a.weight",
    "cut along columns": "a.weight lies over the ranks as (Shard(dim=1),)",
    "ignored": "b.weight is not sharded while others are",
    "tensor parallel": "fully_shard was not called on it as a whole",
    "an optimizer from before": "does not hold a.weight: fully_shard replaces the parameters, so call it first",
    "sharded after attach": "fully_shard was called after attach; call it first",
    "fold": "fold: this module's weights are sharded over ranks; load get_model_state_dict",
    "lower": "lower: this module's weights are sharded",
    "compact": "compact: this module's weights are sharded",
    "copy_to": "copy_to: this module's weights are sharded",
    "save_sparse": "save_sparse: this module's weights are sharded",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_work_over_shards_says_so(ranks, what):
    for rank in ranks:
        message = rank["refusals"][what]
        assert message.startswith("RuntimeStateError: "), message
        assert REFUSED[what] in message, message


def test_every_refusal_was_tried(ranks):
    assert set(ranks[0]["refusals"]) == set(REFUSED)
