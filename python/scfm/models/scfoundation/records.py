"""OmegaConf's objects in a checkpoint, read as the plain containers that they hold.

A training framework may save its configuration as OmegaConf objects instead of dicts. Their classes are never
imported: wherever a file names one, a class of this module stands in that runs nothing and keeps what it is given.
``plain`` then takes names and values out of it. Anything else that a file might name stays refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scfm.errors import ConfigError

__all__ = ["RECORDS", "plain"]

_DEEPEST = 24
_MOST_ENTRIES = 100_000


class _Record:
    """Any of OmegaConf's objects: its state, kept."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dict(_Record):
    """DictConfig."""


class _List(_Record):
    """ListConfig."""


class _Node(_Record):
    """AnyNode, IntegerNode and their like: one value."""


class _Metadata(_Record):
    """What OmegaConf notes about a node."""


class _Type(_Record):
    """A type that the metadata names."""


class _Default(dict[Any, Any]):
    """collections.defaultdict, of which only the items matter."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()


RECORDS: dict[str, type] = {
    "omegaconf.dictconfig.DictConfig": _Dict,
    "omegaconf.listconfig.ListConfig": _List,
    **{
        f"omegaconf.nodes.{name}": _Node
        for name in (
            "AnyNode",
            "IntegerNode",
            "FloatNode",
            "StringNode",
            "BooleanNode",
            "InterpolationResultNode",
        )
    },
    "omegaconf.base.Metadata": _Metadata,
    "omegaconf.base.ContainerMetadata": _Metadata,
    "collections.defaultdict": _Default,
    **{
        name: _Type
        for module in ("builtins", "__builtin__")
        for name in (
            f"{module}.{one}"
            for one in ("dict", "list", "tuple", "int", "long", "float", "str", "unicode", "bool", "object")
        )
    },
    "typing.Any": _Type,
}


def plain(found: Any, path: str | Path) -> Any:
    """``found`` with OmegaConf's objects replaced by dicts, lists and values. Raises ConfigError."""
    return _Plain(path).of(found, 0)


class _Plain:
    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.num_entries = 0

    def of(self, found: Any, depth: int) -> Any:
        self.num_entries += 1
        if depth > _DEEPEST or self.num_entries > _MOST_ENTRIES:
            raise ConfigError("nested too deeply, or too large", path=self.path, where="config")
        if isinstance(found, _Record):
            return self.of(self._content(found), depth + 1)
        if isinstance(found, dict):
            return {self._key(key): self.of(item, depth + 1) for key, item in dict.items(found)}
        if isinstance(found, list | tuple):
            return [self.of(item, depth + 1) for item in found]
        if found is None or type(found) in (str, int, float, bool):
            return found
        raise ConfigError(
            f"holds a {type(found).__name__}; expected names, numbers and text",
            path=self.path,
            where="config",
        )

    def _content(self, record: _Record) -> Any:
        key = {_Dict: "_content", _List: "_content", _Node: "_val"}.get(type(record))
        if key is None or not isinstance(record.state, dict) or key not in record.state:
            raise ConfigError("an OmegaConf object without its content", path=self.path, where="config")
        return record.state[key]

    def _key(self, key: Any) -> str:
        if type(key) is not str:
            raise ConfigError(f"a name is a {type(key).__name__}", path=self.path, where="config")
        return key
