"""A process of its own for a contender: reads requests and answers in JSON, one a line.

`{"do": "load", "contender": NAME, "case": {...}}` loads under a number, `{"do": "run", "number": N, "seconds": S}`
takes turns for at least S seconds and at least one turn, `{"do": "drop", "number": N}` forgets. What libraries print
goes to the error stream.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
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


def serve(request: dict[str, Any], loaded: dict[int, Any]) -> dict[str, Any]:
    if request["do"] == "load":
        from .contenders import CONTENDERS

        _threads(request["case"]["threads"])
        number = len(loaded)
        loaded[number] = CONTENDERS[request["contender"]](request["case"])
        loaded[number].turn()
        return {"number": number, "error": loaded[number].error, "facts": loaded[number].facts}
    if request["do"] == "drop":
        loaded[request["number"]] = None
        return {}
    turns, start = [], time.perf_counter()
    while not turns or time.perf_counter() - start < request["seconds"]:
        turns.append(loaded[request["number"]].turn())
    return {"turns": turns}


def _threads(number: int) -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(number)


if __name__ == "__main__":
    main()
