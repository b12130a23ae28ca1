"""The loop of a process that measures: reads requests and answers in JSON, one a line.

What libraries print goes to the error stream; an exception is an answer of its own, `{"failed": TEXT}`.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve_requests(serve: Callable[[dict[str, Any], dict[int, Any]], dict[str, Any]]) -> None:
    """Answers every request by `serve(request, loaded)`, where `loaded` keeps what requests have made."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded: dict[int, Any] = {}
    for line in sys.stdin:
        try:
            answer = serve(json.loads(line), loaded)
        except KeyboardInterrupt:
            return
        except BaseException as error:  # whatever it was, the other rows go on
            text = (str(error).strip().splitlines() or [""])[0]
            answer = {"failed": f"{type(error).__name__}: {text}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def use_threads(number: int) -> None:
    """`number` threads for PyTorch, where it is installed."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(number)
