"""`KEY=VALUE` pairs of a command line."""

import json
from collections.abc import Sequence
from typing import Any

from fxsparse.core.errors import ConfigError


def key_values(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    """The pairs as a dict; a value is read as JSON where it is JSON, else as text. `flag` is for the message.

    Raises:
        ConfigError: a word that is not of the form `KEY=VALUE`.
    """
    found = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ConfigError(f"{flag} {text!r} is not of the form KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
