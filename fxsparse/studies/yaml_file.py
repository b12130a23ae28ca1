"""YAML as a person expects it: `1e-3` is a number, a key given twice is a mistake, an error is one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fxsparse.core.errors import ConfigError

_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # YAML 1.1 takes 1e-3, without a dot, for text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, less its two surprises."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (dict, list)) or key in found:
            reason = "is given twice" if not isinstance(key, (dict, list)) else "is no name"
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} {reason}", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def read_yaml(path: str | Path) -> Any:
    """What the file at `path` says, as plain values.

    Raises:
        ConfigError: the file cannot be read or is not YAML; names the line.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"could not read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{place}: {getattr(error, 'problem', None) or error}") from error
