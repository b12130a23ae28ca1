"""The command's training loop, on real data: configuration -> experiment -> loop -> run folder.

    from fxsparse.training import TrainConfig, train
    result = train(TrainConfig(data="digits", method="rigl", sparsity=0.9), "runs/digits")

`config` names every option, `experiment` builds what it asks for, `loop` trains; what differs between images
(`classification`) and texts (`next_character`) is a `task`. `run_folder`, `checkpoint` and `metrics` keep what
must not get lost, `summary` and `plots` show it. One's own loop needs none of this: see `fxsparse.sparsify`.
"""

from fxsparse.training.config import TrainConfig
from fxsparse.training.interrupt import TrainingInterrupted
from fxsparse.training.loop import DivergedError, continue_run, train
from fxsparse.training.summary import Result

__all__ = ["DivergedError", "Result", "TrainConfig", "TrainingInterrupted", "continue_run", "train"]
