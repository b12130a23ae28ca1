"""Methods in the command: what a run takes from an earlier one, narrower networks, longer runs, whose choices."""

import dataclasses
import shutil

import pytest
import torch
from torchvision.io import write_png

import fxsparse.models as models
from fxsparse import ConfigError
from fxsparse.core.errors import CheckpointError
from fxsparse.flops import TrainingCost
from fxsparse.training import TrainConfig, checkpoint, train
from fxsparse.training.experiment import build
from fxsparse.training.metrics import read_metrics
from fxsparse.training.run_folder import RunFolder
from fxsparse.training.small_dense import matching_width
from fxsparse.training.summary import Ledger

TINY = TrainConfig(
    model="small_resnet",
    model_options={"width": 4},
    steps=24,
    sparsity=0.8,
    update_interval=5,
    log_interval=12,
    threads=1,
    tensorboard=False,
    plots=False,
)


def run(config, folder):
    return train(config, folder, progress=False, say=lambda line: None)


def changed(**options):
    return dataclasses.replace(TINY, **options)


def saved_model(folder, step=24):
    return checkpoint.load(RunFolder(folder).saved(step))["model"]


def masks_of(state):
    return {name: value for name, value in state.items() if value.dtype == torch.bool}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "pruned"
    return folder, run(changed(method="pruning", keep_steps=(0, 7), seed=3), folder)


def test_a_lottery_ticket_has_the_pruning_runs_masks_over_its_first_weights(pruned, tmp_path):
    folder, result = pruned
    config = changed(method="lottery", masks_from=str(folder), seed=9)  # another seed: nothing is drawn by it
    begun = build(config).sparse.state_dict()
    first, last = saved_model(folder, 0), saved_model(folder)
    assert masks_of(begun).keys() == masks_of(last).keys()
    for name, mask in masks_of(last).items():
        assert torch.equal(begun[name], mask)
        weight = name.removesuffix("_mask")
        assert torch.equal(begun[weight], first[weight] * mask)
    assert all(mask.all() for mask in masks_of(first).values())
    ticket = run(config, tmp_path / "ticket")
    assert all(torch.equal(masks_of(saved_model(tmp_path / "ticket"))[n], m) for n, m in masks_of(last).items())
    static = build(changed(method="static")).sparse
    assert ticket.inference_flops == pytest.approx(static.flops().ratio, rel=1e-3)
    assert ticket.training_flops == pytest.approx(result.training_flops + ticket.inference_flops)
    assert ticket.earlier == {str(folder): result.training_flops_total}


def test_the_cost_of_a_run_includes_those_it_starts_from(pruned):
    folder, result = pruned
    config = changed(method="rigl", masks_from=str(folder), weights_from=str(folder))
    cost = TrainingCost(24, 3, 0, 1)  # of no steps: what is left are the earlier runs, each once
    again = dataclasses.replace(config, weights_from=f"{folder}/")
    for same in (config, again):
        assert Ledger.of(build(same)).total(cost) == result.training_flops_total
        assert Ledger.of(build(same)).training(cost) == pytest.approx(result.training_flops)
    assert Ledger.of(build(changed())).training(cost) == 0
    # FLOPs are added, not ratios: over a run of twice the length they weigh half as much, of twice the batch too.
    longer, wider = (dataclasses.replace(config, **more) for more in ({"steps": 48}, {"batch_size": 128}))
    for other in (longer, wider):
        assert Ledger.of(build(other)).training(cost) == pytest.approx(result.training_flops / 2)


def test_a_run_behind_two_others_is_counted_once(pruned, tmp_path):
    folder, result = pruned
    ticket = run(changed(method="lottery", masks_from=str(folder)), tmp_path / "ticket")
    config = changed(method="rigl", masks_from=str(folder), weights_from=str(tmp_path / "ticket"))
    cost = TrainingCost(24, 3, 0, 1)
    assert Ledger.of(build(config)).total(cost) == pytest.approx(ticket.training_flops_total)
    assert ticket.training_flops_total > result.training_flops_total


@pytest.mark.parametrize("method", ["lottery", "rigl-sm"])
def test_a_run_that_has_begun_needs_the_earlier_ones_no_more(pruned, tmp_path, method):
    folder, _ = pruned
    copied = tmp_path / "earlier"
    shutil.copytree(folder, copied)
    config = changed(method=method, masks_from=str(copied), checkpoint_interval=12, keep_checkpoints=0)
    whole = run(config, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000024.pt").unlink()
    shutil.rmtree(copied)
    again = train(None, tmp_path / "run", resume=True, progress=False, say=lambda line: None)
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(whole, seconds=0)


def test_rewinding_to_an_early_step(pruned):
    folder, _ = pruned
    begun = build(changed(method="lottery", masks_from=str(folder), rewind=7)).sparse.state_dict()
    early = saved_model(folder, 7)
    assert torch.equal(begun["bn1.weight"], early["bn1.weight"])
    assert torch.equal(begun["bn1.running_mean"], early["bn1.running_mean"])
    assert not torch.equal(begun["bn1.running_mean"], saved_model(folder, 0)["bn1.running_mean"])
    with pytest.raises(CheckpointError, match=r"did not keep step 8 \(kept: 0, 7, 2\d*.*--keep-steps 8"):
        build(changed(method="lottery", masks_from=str(folder), rewind=8))


def test_starting_from_another_runs_solution_and_from_its_densities(pruned):
    folder, _ = pruned
    last = saved_model(folder)
    warm = build(changed(method="rigl", masks_from=str(folder), weights_from=str(folder))).sparse
    for name, value in last.items():
        assert torch.equal(warm.state_dict()[name], value), name
    again = build(changed(method="rigl", densities_from=str(folder))).sparse
    counts = {name.removesuffix("_mask"): int(mask.sum()) for name, mask in masks_of(last).items()}
    assert again.active_counts == counts
    assert any(not torch.equal(again.state_dict()[name], mask) for name, mask in masks_of(last).items())


def test_what_an_earlier_run_must_be(pruned, tmp_path):
    folder, _ = pruned
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        build(changed(masks_from=str(tmp_path)))
    with pytest.raises(ConfigError, match="method lottery needs masks_from"):
        changed(method="lottery")
    with pytest.raises(ConfigError, match="masks_from and densities_from"):
        changed(masks_from="a", densities_from="b")
    with pytest.raises(ConfigError, match="rewind is 3, and there is no run"):
        changed(rewind=3)
    with pytest.raises(ConfigError, match="masks_from is given, and method small-dense is dense"):
        changed(method="small-dense", masks_from="a")
    with pytest.raises(ConfigError, match="densities_from brings its densities along; leave dense out"):
        changed(densities_from="a", dense=("fc",))
    with pytest.raises(ConfigError, match="keep_steps: 25 is beyond the 24 steps of the run"):
        build(changed(keep_steps=(25,)))
    with pytest.raises(ConfigError, match=r"do not fit this network: conv1.weight is \(4, 1, 3, 3\) there and \(6, "):
        build(changed(model_options={"width": 6}, weights_from=str(folder)))
    (tmp_path / "half").mkdir()
    RunFolder(tmp_path / "half")._checkpoints.mkdir()
    (tmp_path / "half" / "checkpoints" / "step-00000004.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has not finished; go on with"):
        build(changed(masks_from=str(tmp_path / "half")))


def test_a_small_dense_network_has_as_many_parameters_as_the_sparse_one(tmp_path):
    config = changed(method="small-dense", model_options={"width": 16}, sparsity=0.9)
    small = build(config)
    full, sparse = models.build("small_resnet"), build(dataclasses.replace(config, method="static")).sparse
    wanted = sum(p.numel() for p in sparse.parameters()) - sum(int((~mask).sum()) for mask in sparse.masks.values())
    parameters = sum(parameter.numel() for parameter in small.sparse.parameters())
    of_width = {  # widths come in whole channels
        width / 64: sum(p.numel() for p in models.build("small_resnet", width=width / 64).parameters())
        for width in range(64, 1024, 8)
    }
    assert parameters == max(
        number for number in of_width.values() if number <= wanted
    )  # widths come in whole channels
    assert small.full.weights == 77_072 == sum(p.numel() for p in full.parameters() if p.dim() > 1)
    assert all(mask.all() for mask in small.sparse.masks.values())

    result = run(config, tmp_path / "small")
    assert result.width == small.full.width < 16
    assert result.dense_macs == 763_520
    assert result.inference_flops == result.training_flops == pytest.approx(result.macs / 763_520)
    assert result.active_weights / 77_072 == pytest.approx(result.density)


def test_a_network_without_widths_loses_channels(tmp_path):
    for split in ("train", "val"):
        for kind in ("cats", "dogs"):
            (tmp_path / split / kind).mkdir(parents=True)
            pixels = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
            write_png(pixels, str(tmp_path / split / kind / "one.png"))
    config = changed(
        method="small-dense",
        model="resnet18",
        model_options={},
        data=f"imagefolder:{tmp_path}",
        image_size=32,
        batch_size=2,
        workers=0,
    )
    small = build(config)
    sparse = build(dataclasses.replace(config, method="static")).sparse
    wanted = sum(p.numel() for p in sparse.parameters()) - sum(int((~mask).sum()) for mask in sparse.masks.values())
    parameters = sum(parameter.numel() for parameter in small.sparse.parameters())
    assert 0.98 * wanted < parameters <= wanted
    ledger = Ledger.of(small)
    assert ledger.dense_macs == sparse.flops().dense_macs
    assert ledger.weights == sum(mask.numel() for mask in sparse.masks.values())


def test_the_narrowest_network_may_be_too_large():
    with pytest.raises(ConfigError, match=r"even the narrowest network has 1,000 parameters, more than the 999"):
        matching_width(lambda width: torch.nn.Linear(1000, 1, bias=False), 1.0, 999)


def test_an_extended_run_stretches_everything_but_the_interval(tmp_path):
    config = changed(extend=2.0, milestones=(0.5, 18), warmup_steps=3, method="static")
    parts, plain = build(config), build(dataclasses.replace(config, extend=1.0))
    assert parts.total_steps == 48
    assert parts.rewirer.schedule.t_end == 36 and parts.rewirer.schedule.interval == 5
    for step in range(24):
        assert parts.rate_at(2 * step + 1) == pytest.approx(plain.rate_at(step)) or step < 3
    assert parts.rate_at(23) == 0.1 > parts.rate_at(24) > parts.rate_at(36)
    longer, shorter = run(config, tmp_path / "long"), run(dataclasses.replace(config, extend=1.0), tmp_path / "short")
    assert longer.training_flops == pytest.approx(2 * shorter.training_flops)
    pruning = build(changed(extend=2.0, method="pruning", method_options={"begin": 4, "end": 0.5}))
    assert (pruning.rewirer.schedule.begin, pruning.rewirer.schedule.end) == (8, 24)


def test_method_options_and_semantics_reach_the_runtime():
    parts = build(changed(method="snfs", method_options={"beta": 0.5}, semantics="report"))
    assert parts.rewirer.method.momentum == "optimizer" and parts.rewirer.method.beta == 0.5
    assert parts.rewirer.semantics.rounding == "ceil"
    parts = build(changed(semantics="report", semantics_options={"rounding": "floor"}, redistribution="momentum"))
    assert parts.rewirer.semantics.rounding == "floor" and parts.rewirer.semantics.regrown == "zeroed"
    assert parts.rewirer.method.redistribution == "momentum"
    assert build(changed(decay="inverse_power", decay_power=2.0)).rewirer.schedule.decay_power == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method_options": {"scope": "global"}}, "method rigl takes no option 'scope'; it takes redistribution"),
        ({"method": "pruning", "method_options": {"scop": "global"}}, "did you mean scope"),
        ({"semantics_options": {"rounding": "up"}}, "rounding is 'up'; it is one of floor, ceil"),
        ({"semantics": "papers"}, "unknown semantics 'papers'; did you mean paper"),
        ({"method": "static", "redistribution": "momentum"}, "static grows nothing"),
        ({"redistribution": "none", "method_options": {"redistribution": "gradient"}}, "redistribution is given twice"),
    ],
)
def test_wrong_options_of_methods_are_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        changed(**options)


def test_the_record_of_a_run_has_its_densities_and_what_it_explored(tmp_path):
    result = run(changed(method="rigl-sm"), tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rewirings = [record for record in records if record["kind"] == "rewire"]
    assert [record["step"] for record in rewirings] == [5, 10, 15]
    totals = {sum(record["active"].values()) for record in rewirings}
    assert totals == {result.active_weights}  # moved between layers, conserved as a whole
    assert len({str(record["active"]) for record in rewirings}) > 1
    assert all(norm >= 0 for record in rewirings for norm in record["grown_gradient_norm"].values())
    last = [record for record in records if record["kind"] == "telemetry"][-1]
    assert last["density"] == pytest.approx(result.densities)
    assert all(last["ever_active"][name] >= density for name, density in result.densities.items())
    assert result.ever_active > result.density
