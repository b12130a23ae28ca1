"""Surveys what fxsparse captures and masks: torchvision, timm, transformers and the hard networks of models/zoo.

    python tools/coverage.py                              # everything that is not done yet
    python tools/coverage.py --set timm --only 'swin*'    # some of it
    python tools/coverage.py --write docs/coverage.md     # then the page, from all rows there are

One model a process, with limits of time and memory. A row is written as soon as it is there, so the run may be
stopped at any time and goes on where it was; `--rerun` measures again.
"""

import argparse
import logging
import os
import signal
import sys
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where this file is loaded by path, too

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded


def main(argv: list[str] | None = None) -> int:
    """Runs the survey; the exit code: 1 where `--check` finds a row that misses the goal."""
    arguments = _parser().parse_args(argv)
    from survey import sets

    chosen = arguments.set or list(sets.SETS)
    _import_libraries(chosen)
    from survey import measure, page, runner

    jobs = [
        (which, name)
        for which in chosen
        for name in sets.names(which)
        if any(fnmatchcase(name, pattern) for pattern in arguments.only or ["*"])
    ]
    if not jobs:
        print(f"coverage: error: no model is called {' or '.join(arguments.only or [])}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(f"{which} {name}" for which, name in jobs))
        return 0
    done = {} if arguments.rerun else runner.read_rows(arguments.folder)
    limits = runner.Limits(arguments.limit_seconds, arguments.limit_gigabytes)
    todo = [job for job in jobs if job not in done]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the running processes are ended too
    try:
        runner.run(todo, measure.measure, arguments.folder, at_once=arguments.jobs, limits=limits)
    except KeyboardInterrupt:
        print("coverage: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    rows = runner.read_rows(arguments.folder)
    if arguments.write:
        known = [rows[which, name] for which in sets.SETS for name in sets.names(which) if (which, name) in rows]
        arguments.write.write_text(page.page(known, {which: len(sets.names(which)) for which in sets.SETS}))
        print(f"wrote {arguments.write} from {len(known)} rows")
    missed = [job for job in jobs if not page.good(rows[job])]
    print(f"{len(jobs) - len(missed)} of {len(jobs)} models meet the goal")
    for which, name in missed if arguments.check else ():
        print(f"  {which} {name}")
    return 1 if arguments.check and missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--set",
        action="append",
        choices=["torchvision", "timm", "transformers", "zoo"],
        help="only this set; repeatable",
    )
    parser.add_argument("--only", action="append", metavar="GLOB", help="only models with such a name; repeatable")
    parser.add_argument("--list", action="store_true", help="list the models, measure nothing")
    parser.add_argument("--rerun", action="store_true", help="measure again what has a row")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, of one thread each (default: 1)")
    parser.add_argument("--limit-seconds", type=float, default=180, help="of one model (default: 180)")
    parser.add_argument("--limit-gigabytes", type=float, default=12, help="of one model (default: 12)")
    parser.add_argument("--folder", type=Path, default=Path("runs/coverage"), help="of the rows (runs/coverage)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page from all rows")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a chosen model misses the goal")
    return parser


def _import_libraries(chosen: list[str]) -> None:
    """Once, before the processes are forked."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for which in chosen:
        if which in ("torchvision", "timm", "transformers"):
            __import__(which)
    from survey import sets

    import fxsparse

    fxsparse.sparsify(
        *sets.build("zoo", "tied_linear")
    )  # torch imports parts of itself at first use; no backward pass:
    # autograd's threads do not survive a fork
    if "transformers" in chosen:
        sets.build("transformers", "bert")


if __name__ == "__main__":
    sys.exit(main())
