"""One run in a process of its own, told by its exit code: the state is in the run's folder.

Processes are forked from a server that has imported torch once, so that a short run is not mostly imports; one
that dies, of too little memory for instance, takes no other with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from fxsparse.core.errors import DataError
from fxsparse.studies.run_state import FINISHED, train_there
from fxsparse.studies.stopping import stopped_after
from fxsparse.training import TrainConfig

RUN_FAILED = 1
DATA_MISSING = 3
INTERRUPTED = 130
PRELOADED = (__name__, "sklearn.datasets")  # the digits' import takes longer than a short run on them


def start_worker(folder: Path, config: TrainConfig) -> tuple[BaseProcess, Connection]:
    """A process that trains the run, or goes on with it; the connection takes what it says of missing data."""
    start_methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in start_methods else "spawn")
    if "forkserver" in start_methods:
        context.set_forkserver_preload(list(PRELOADED))
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(folder, config, there))  # type: ignore[attr-defined]
    process.start()
    there.close()
    return process, here


def _work(folder: Path, config: TrainConfig, said: Connection) -> None:
    """Train, in a session of its own: Ctrl-C in the terminal is for the parent to pass on."""
    if hasattr(os, "setsid"):
        os.setsid()
    try:
        with stopped_after(None):
            threading.Thread(target=_stop_with_parent, daemon=True).start()
            state = train_there(folder, config, progress=False)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except DataError as error:
        said.send(str(error))
        sys.exit(DATA_MISSING)
    sys.exit(0 if state.word == FINISHED else RUN_FAILED)


def _stop_with_parent() -> None:
    """Save and stop when the parent has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
