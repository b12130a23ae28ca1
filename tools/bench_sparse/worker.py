"""A process of its own for a contender: reads requests and answers in JSON, one a line.

`{"do": "load", "contender": NAME, "case": {...}}` loads under a number, `{"do": "run", "number": N, "seconds": S}`
takes turns for at least S seconds and at least one turn, `{"do": "drop", "number": N}` forgets. What libraries print
goes to the error stream.
"""

import time
from typing import Any

from bench_parts.serving import serve_requests, use_threads


def serve(request: dict[str, Any], loaded: dict[int, Any]) -> dict[str, Any]:
    if request["do"] == "load":
        from .contenders import CONTENDERS

        use_threads(request["case"]["threads"])
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


if __name__ == "__main__":
    serve_requests(serve)
