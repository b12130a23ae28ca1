"""The training loop: the user's own five lines, and around them records, checkpoints and stopping.

`train` is the entry point. A run is a function of its configuration: batches, learning rate and masks
depend on the seed and the step alone, and a checkpoint holds everything else, so a run that is killed at
any step and resumed ends, on a CPU, with the bits of the run that was not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxsparse.core.errors import CheckpointError, FxSparseError
from fxsparse.lowering.decisions import why_none
from fxsparse.training import plots, random_state, summary
from fxsparse.training.checkpoint import write_atomically
from fxsparse.training.config import TrainConfig
from fxsparse.training.execution import load_optimizer
from fxsparse.training.experiment import Experiment, build
from fxsparse.training.interrupt import StopRequest, TrainingInterrupted, stop_requests
from fxsparse.training.metrics import MetricLog
from fxsparse.training.objective import Outcome
from fxsparse.training.run_folder import ResumePoint, RunFolder, find_resume_point
from fxsparse.training.summary import Result

HALVINGS = 20  # of the GradScaler's scale, 65,536 at first, which is then below 0.1 and not what makes it overflow


class DivergedError(FxSparseError):
    """The loss or a weight is no longer finite."""


def train(
    config: TrainConfig | None,
    run_folder: str | Path,
    resume: bool = False,
    *,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Result:
    """Train as `config` says, in `run_folder`, and return how it came out.

    With `resume` the run that lies in the folder goes on; `config` may then be None, or differ from the
    run's only where the result does not depend on it. `progress` draws a progress bar on stderr; `say` takes
    the lines for people.

    Raises `ConfigError`, `DataError` or another `FxSparseError` before anything is written;
    `DivergedError` and `CheckpointError` later, leaving the last good checkpoint intact; and
    `TrainingInterrupted` after Ctrl-C or SIGTERM, when the state has been saved.
    """
    if resume:
        changes = dataclasses.asdict(config.resolved()) if config else {}
        return continue_run(run_folder, changes=changes, progress=progress, say=say)
    assert config is not None
    start = ResumePoint(RunFolder(run_folder), config, None)
    start.folder.require_new()
    return _run(start, progress, say)


def continue_run(
    path: str | Path,
    out: str | Path | None = None,
    *,
    changes: dict[str, Any] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Result:
    """Go on with the run whose folder or checkpoint is `path`, in the folder `out` if that is given.

    `changes` are options to change by name, of those that the result does not depend on.
    Otherwise as `train`.
    """
    start = find_resume_point(path, out)
    start = dataclasses.replace(start, config=start.config.changed_by(changes or {}))
    return _run(start, progress, say)


def _run(start: ResumePoint, progress: bool, say: Callable[[str], None]) -> Result:
    with _threads(start.config.threads):
        experiment = build(start.config, start.payload)
        done = start.payload["step"] if start.payload else 0
        if done == experiment.total_steps and start.folder.result.exists():
            say(f"{start.folder.path} has finished already")
            result = Result.from_json(start.folder.result.read_text())
            say(summary.after(result))
            return result
        say(summary.before(experiment))
        with start.folder.claimed():
            return _Loop(experiment, start, progress, say).run()


class _Loop:
    """One run in progress; `step` counts the optimizer steps that are complete."""

    def __init__(self, experiment: Experiment, start: ResumePoint, progress: bool, say: Callable[[str], None]):
        self.parts, self.folder = experiment, start.folder
        self.config, self.device = experiment.config, experiment.device
        self.progress, self.say = progress, say
        self.step = 0
        self.seconds_before = 0.0
        self.last_checkpoint: Path | None = None
        real = torch.float32 if self.device.type == "mps" else torch.float64
        # since the last record: summed loss, predictions that are right, predictions
        self.window = torch.zeros(3, dtype=real, device=self.device)
        # on the device, so nothing waits for them: steps in a row without a finite loss, and the first of too many
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self.first_bad_step = torch.full((), -1, device=self.device)
        self.patience = HALVINGS if self.parts.scaler.is_enabled() else 1
        self.metric = experiment.task.metric
        self.shown = {"loss": "-", self.metric.short: "-", "eval": "-"}
        packed = None
        if start.payload is not None:
            packed = start.payload["metrics"]
            self._restore(start.payload)
            found = self.folder.checkpoints()
            self.last_checkpoint = found[-1] if found else None
        self.rewirings_seen = experiment.rewirer.update_count
        write_atomically(self.folder.config, self.config.to_json().encode())
        self.folder.result.unlink(missing_ok=True)
        self.log = MetricLog(self.folder.metrics, packed)
        self.started = time.monotonic()

    def run(self) -> Result:
        """Train to the end, write the result and the plot."""
        if self.config.tensorboard:
            trouble = self.log.open_tensorboard(self.folder.tensorboard, self.step)
            if trouble:
                self.say(trouble)
        bar = tqdm(
            total=self.parts.total_steps,
            initial=self.step,
            unit="step",
            desc=self.config.method,
            dynamic_ncols=True,
            disable=not self.progress,
        )
        try:
            with stop_requests() as stop, bar:
                self._lower()
                self._keep_weights()
                for inputs, targets in self._batches():
                    self._train_step(inputs, targets)
                    bar.update()
                    self._lower()
                    self._keep_weights()
                    self._after_step(bar, stop)
            return self._finish()
        except TrainingInterrupted:
            raise
        except KeyboardInterrupt:  # the second Ctrl-C, in the middle of a step
            raise KeyboardInterrupt(f"interrupted; {self._last_good()}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._last_good()}") from error
        finally:
            self.log.close()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the steps that are left."""
        per_epoch = len(self.parts.train_batches)
        while self.step < self.parts.total_steps:
            epoch, first = divmod(self.step, per_epoch)
            for batch in self.parts.train_batches.epoch(epoch, start=first):
                if self.step == self.parts.total_steps:
                    return
                yield batch

    def _train_step(self, inputs: Tensor, targets: Tensor) -> None:
        outcome = self.parts.train_step(inputs, targets, self.step)
        self.step += 1
        self._observe(outcome)

    def _observe(self, outcome: Outcome) -> None:
        """Add a step to the running means; nothing here waits for the device."""
        loss, count = outcome.loss.detach(), outcome.count
        finite = torch.isfinite(loss)
        sums = torch.stack([loss * count, outcome.correct, torch.full_like(loss, count)])
        self.window += sums.masked_fill(~finite, 0)
        self.bad_steps.add_(1).masked_fill_(finite, 0)
        are_too_many = (self.bad_steps >= self.patience) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(are_too_many, self.step - self.patience + 1)

    def _after_step(self, bar: tqdm, stop: StopRequest) -> None:
        """Records, evaluation, checkpoint and stop, each where it is due."""
        parts, last = self.parts, self.step == self.parts.total_steps
        if self.step % self.config.log_interval == 0 or last:
            self._record_training()
            bar.set_postfix(self.shown, refresh=False)
        if self.step % parts.eval_interval == 0 or last:
            self._evaluate(parts.watched_split)
            bar.set_postfix(self.shown, refresh=False)
        if last and parts.watched_split != "test":
            self._evaluate("test")
        if self.step % parts.checkpoint_interval == 0 or last or stop.made:
            self._save()
        if stop.made and not last:
            assert self.last_checkpoint is not None
            raise TrainingInterrupted(self.step, self.last_checkpoint, self.folder.path)

    def _record_training(self) -> None:
        self._check_finite()
        self._record_rewirings()
        loss_sum, correct, count = self.window.tolist()
        self.window.zero_()
        if not count:
            return  # the scaler has skipped all of these steps
        loss, accuracy = loss_sum / count, correct / count
        epoch = self.step / len(self.parts.train_batches)
        self.log.add(
            "train",
            self.step,
            epoch=epoch,
            **self.metric.figures(loss, accuracy),
            lr=self.parts.rate_at(self.step - 1),
        )
        self.log.add_timing(self.step, self._seconds())
        self.shown |= {"loss": f"{loss:.3f}", self.metric.short: f"{self.metric.of(loss, accuracy):.3f}"}

    def _record_rewirings(self) -> None:
        if self.parts.rewirer.update_count == self.rewirings_seen:
            return  # reading the history waits for the device
        history = self.parts.rewirer.history
        for done in history[self.rewirings_seen :]:
            self.log.add(
                "rewire",
                done.step,
                drop_fraction=float(done.drop_fraction),
                skipped=done.skipped,
                changed={name: int(count) for name, count in done.changed.items()},
                active={name: int(count) for name, count in done.active.items()},
                grown_gradient_norm=done.grown_gradient_norm,
            )
        self.rewirings_seen = len(history)

    def _evaluate(self, split: str) -> None:
        self._check_finite()
        self._record_rewirings()
        loss, accuracy = self.parts.evaluate(split)
        self._record_telemetry()
        self.log.add("eval", self.step, split=split, **self.metric.figures(loss, accuracy))
        self.shown["eval"] = f"{self.metric.of(loss, accuracy):.3f}"

    def _record_telemetry(self) -> None:
        """What has become of every layer, once an evaluation."""
        if not self.parts.rewirer.method.rewires or self.log.last("telemetry", step=self.step):
            return
        rows = self.parts.rewirer.telemetry()
        self.log.add(
            "telemetry",
            self.step,
            density={row.name: row.density for row in rows},
            ever_active={row.name: row.explored for row in rows},
            churn={row.name: row.churn for row in rows},
            dead_outputs={row.name: row.dead_outputs for row in rows},
            dead_inputs={row.name: row.dead_inputs for row in rows},
        )

    def _save(self) -> None:
        self._check_finite()
        values = {name: v for name, v in self.parts.sparse.state_dict().items() if v.is_floating_point()}
        finite = torch.stack([torch.isfinite(value).all() for value in values.values()])  # one wait for all
        for name, is_finite in zip(values, finite.tolist(), strict=True):
            if not is_finite:
                raise self._diverged(f"{name} is no longer finite after step {self.step}")
        self._record_rewirings()
        self.last_checkpoint = self.folder.save_checkpoint(self.step, self._payload(), self.config.keep_checkpoints)

    def _lower(self) -> None:
        """Goes on with active weights alone where the configuration says so and the method is ready for it."""
        if self.parts.may_lower(self.step):
            sparse = self.parts.sparse.lower(train=True)
            why = why_none(sparse.lowering_decisions)
            self.say(
                f"lowered at step {self.step}: {len(sparse.lowered)} of {len(sparse.sites)} weights hold active values"
                + (f"; {why}" if why else "")
            )

    def _keep_weights(self) -> None:
        """Saves the weights for good where the configuration says so, for another run to rewind to."""
        if self.step in (self.config.keep_steps or ()):
            kept = {"step": self.step, "config": self.config.to_json(), "model": self.parts.sparse.state_dict()}
            self.folder.keep(self.step, kept)

    def _payload(self) -> dict[str, Any]:
        parts = self.parts
        return {
            "step": self.step,
            "config": self.config.to_json(),
            "model": parts.sparse.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "rewirer": parts.rewirer.state_dict(),
            "scaler": parts.scaler.state_dict(),
            "random": random_state.capture(),
            "begun_with": parts.inheritance.to_resume(),
            "window": self.window,
            "metrics": self.log.pack(),
            "seconds": self._seconds(),
            "versions": summary.versions(),
        }

    def _restore(self, payload: dict[str, Any]) -> None:
        parts = self.parts
        parts.sparse.load_state_dict(payload["model"])
        load_optimizer(parts.optimizer, payload["optimizer"])
        parts.rewirer.load_state_dict(payload["rewirer"])
        parts.scaler.load_state_dict(payload["scaler"])
        self.step = payload["step"]
        self.window.copy_(payload["window"])
        self.seconds_before = payload["seconds"]
        random_state.restore(payload["random"])

    def _check_finite(self) -> None:
        step = int(self.first_bad_step)
        if step >= 0:
            raise self._diverged(f"the loss is no longer finite at step {step}")

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what}; {self._last_good()}; try a lower --lr or a longer --warmup-steps, in another --out"
        )

    def _last_good(self) -> str:
        return f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "no checkpoint yet"

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _finish(self) -> Result:
        result = summary.collect(self.parts, self.log, str(self.folder.path), self._seconds())
        write_atomically(self.folder.result, result.to_json().encode())
        self.say(summary.after(result))
        if self.config.plots:
            self.say(plots.draw_or_explain([self.folder.path], self.folder.plot))
        return result


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """`count` torch threads within the block; None leaves them."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
