"""Files that are never half written."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Written beside the file and put in its place, so that a stop leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    os.replace(beside, path)
