"""A search for the drop fraction (alpha), the update interval (delta_t) and the learning rate, on validation data.

As in the report's section 5.3: Optuna's TPE sampler, alpha in [0.1, 0.6], delta_t in {50, 100, ..., 1000}, the
score a mean over seeds on a part of the training set. Trials lie in Optuna's storage, so that several processes
can work on one study; each trial's runs are ordinary run folders. A trial whose process was stopped or killed is
taken over by the next one.

What a trial tries depends on the sampler's seed, its number and the trials finished before it: a search that was
stopped and continued by one process is the search that was not.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from fxsparse.core.errors import CheckpointError, ConfigError
from fxsparse.studies.run_state import FAILED, FINISHED, RunState, differences, read_state, train_there
from fxsparse.training import Result, TrainConfig
from fxsparse.training.locks import held
from fxsparse.training.metrics import read_metrics
from fxsparse.training.objective import ACCURACY, BITS_PER_CHARACTER, Metric
from fxsparse.training.run_folder import RunFolder

CONFIG, SPACE, SEEDS, SAMPLER_SEED = "config", "space", "seeds", "sampler_seed"  # user attributes of the study
SQLITE_SECONDS = 60  # to wait for another process


@dataclass(frozen=True)
class Space:
    """What is searched: options of `TrainConfig` with their range; None leaves one as it is.

    Attributes:
        drop_fraction: low and high.
        update_interval: low, high and step, in optimizer steps.
        lr: low and high, searched on a logarithmic scale.
    """

    drop_fraction: tuple[float, float] | None = (0.1, 0.6)
    update_interval: tuple[int, int, int] | None = (50, 1000, 50)
    lr: tuple[float, float] | None = None

    def distributions(self) -> dict[str, BaseDistribution]:
        """As Optuna has them, by option."""
        found: dict[str, BaseDistribution] = {}
        if self.drop_fraction is not None:
            found["drop_fraction"] = FloatDistribution(*self.drop_fraction)
        if self.update_interval is not None:
            low, high, step = self.update_interval
            found["update_interval"] = IntDistribution(low, high, step=step)
        if self.lr is not None:
            found["lr"] = FloatDistribution(*self.lr, log=True)
        return found


@dataclass(frozen=True)
class Search:
    """One study and all that its trials share.

    Attributes:
        config: resolved, with a validation part; the searched options and the seed are replaced in every trial.
        metric: what is searched for, higher or lower.
        out: folder of the runs and of the lock that the processes of one machine share.
    """

    study: optuna.Study
    config: TrainConfig
    space: Space
    seeds: tuple[int, ...]
    metric: Metric
    out: Path

    def run_folder(self, number: int, seed: int) -> Path:
        return self.out / "trials" / f"trial-{number:04d}-seed{seed}"

    def trial_config(self, trial: FrozenTrial, seed: int) -> TrainConfig:
        """The configuration of one run of a trial."""
        return replace(self.config, **trial.params, seed=seed)

    def states(self, trial: FrozenTrial) -> list[RunState]:
        """How far each run of a trial has come."""
        return [read_state(self.run_folder(trial.number, seed), self.trial_config(trial, seed)) for seed in self.seeds]


class _SeededByTrial(BaseSampler):
    """TPE, seeded anew for every trial."""

    def __init__(self, seed: int):
        self._seed = seed
        self._sampler: BaseSampler = TPESampler(seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = TPESampler(seed=(self._seed * 1_000_003 + trial.number) % 2**32)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


def open_search(
    config: TrainConfig,
    space: Space,
    seeds: Sequence[int],
    metric: Metric,
    out: Path,
    storage: str,
    name: str,
    sampler_seed: int = 0,
) -> Search:
    """The study `name` in `storage` (an SQLAlchemy URL), made where it is not there yet.

    Raises:
        ConfigError: the storage cannot be opened, or its study was made with other options.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with held(out / ".lock", wait=True), _storage_errors(storage):
        study = optuna.create_study(
            storage=_open_storage(storage),
            study_name=name,
            sampler=_SeededByTrial(sampler_seed),
            direction="maximize" if metric.higher_is_better else "minimize",
            load_if_exists=True,
        )
        now = {SPACE: asdict(space), SEEDS: list(seeds), SAMPLER_SEED: sampler_seed}
        before = study.user_attrs
        if CONFIG not in before:
            for key, value in {**now, CONFIG: config.to_json()}.items():
                study.set_user_attr(key, value)
        else:
            changed = differences(TrainConfig.from_json(before[CONFIG]), config)
            changed += [
                f"{key} {json.dumps(before[key])} instead of {json.dumps(value)}"
                for key, value in now.items()
                if json.dumps(before[key]) != json.dumps(value)
            ]
            if changed:
                raise ConfigError(
                    f"the study {name} in {storage} has {'; '.join(changed)}; change it back, or choose another "
                    "--out or --study"
                )
    return Search(study, config, space, tuple(seeds), metric, out)


def run_trials(search: Search, count: int, progress: bool = True, say: Callable[[str], None] = print) -> None:
    """Try until the study has `count` trials, those of other processes among them.

    A trial that diverges, or fails, counts as failed. Raises `KeyboardInterrupt` after Ctrl-C or SIGTERM, when
    the run in progress is saved; the trial goes on with the next call.
    """
    with _storage_errors("the storage"):
        while True:
            with ExitStack() as claim:
                trial = _next_trial(search, count, claim)
                if trial is None:
                    return
                _do_trial(search, trial, progress, say)


def _next_trial(search: Search, count: int, claim: ExitStack) -> FrozenTrial | None:
    """A trial that nobody works on, or a new one, locked until `claim` closes; None when there are enough."""
    study, out = search.study, search.out
    here = {"host": platform.node(), "folder": str(out.resolve())}
    with held(out / ".lock", wait=True):
        trials = study.get_trials(deepcopy=False)
        for trial in trials:
            left = trial.state == TrialState.RUNNING and here.items() <= trial.user_attrs.items()
            if left and claim.enter_context(held(_lock_file(out, trial.number))):
                return trial
        if len(trials) >= count:
            return None
        asked = study.ask(search.space.distributions())
        for key, value in here.items():
            asked.set_user_attr(key, value)
        claim.enter_context(held(_lock_file(out, asked.number)))
        return next(trial for trial in study.get_trials(deepcopy=False) if trial.number == asked.number)


def _lock_file(out: Path, number: int) -> Path:
    return out / "trials" / f".trial-{number:04d}.lock"


def _do_trial(search: Search, trial: FrozenTrial, progress: bool, say: Callable[[str], None]) -> None:
    """Train the trial's runs and tell the study its score."""
    began = time.monotonic()
    what = ", ".join(f"{name} {value:.4g}" for name, value in trial.params.items())
    for seed in search.seeds:
        folder, config = search.run_folder(trial.number, seed), search.trial_config(trial, seed)
        state = read_state(folder, config)
        if state.word != FINISHED:
            state = train_there(folder, config, progress)
        if state.word != FINISHED:
            search.study.tell(trial.number, state=TrialState.FAIL)
            say(f"[trial {trial.number}] {what}: {state.word}: {state.error}")
            return
    scores = validation_scores(search, trial)
    search.study.tell(trial.number, statistics.fmean(scores))
    best = search.study.best_trial
    say(
        f"[trial {trial.number}] {what}: validation {search.metric.name} {statistics.fmean(scores):.4f}, "
        f"{time.monotonic() - began:.0f} s; best so far: trial {best.number} with {best.value:.4f}"
    )


def validation_scores(search: Search, trial: FrozenTrial) -> list[float]:
    """The score on the validation part at the end of each finished run of a trial; the test part is not looked at.

    Raises:
        CheckpointError: a run has no such record.
    """
    scores = []
    for seed in search.seeds:
        folder = RunFolder(search.run_folder(trial.number, seed))
        if folder.result.exists():
            records = [r for r in read_metrics(folder.metrics) if r["kind"] == "eval" and r["split"] == "validation"]
            if not records:
                raise CheckpointError(f"{folder.metrics} has no evaluation on the validation part")
            scores.append(records[-1][search.metric.key])
    return scores


def results(search: Search, trial: FrozenTrial) -> list[Result]:
    """Of the finished runs of a trial that are in this folder."""
    return [state.result for state in search.states(trial) if state.result is not None]


def failed_runs(search: Search) -> list[str]:
    """The runs that ended in an error (not by divergence, which is an outcome), one line each."""
    lines = []
    for trial in search.study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        for seed, state in zip(search.seeds, search.states(trial), strict=True):
            if state.word == FAILED:
                lines.append(f"trial {trial.number}, seed {seed}: {state.error}")
    return lines


@contextlib.contextmanager
def _storage_errors(storage: str) -> Iterator[None]:
    """A storage that cannot be used is the user's to mend, in one line."""
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise ConfigError(f"{storage}: {str(error).splitlines()[0]}") from error


def _open_storage(url: str) -> optuna.storages.RDBStorage:
    """The storage at an SQLAlchemy URL; processes that share an SQLite file wait for each other."""
    waiting = {"connect_args": {"timeout": SQLITE_SECONDS}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=waiting)


def metric_of(data_name: str) -> Metric:
    """What runs on a data set are compared by."""
    from fxsparse.training import data

    return BITS_PER_CHARACTER if data.is_text(data_name) else ACCURACY
