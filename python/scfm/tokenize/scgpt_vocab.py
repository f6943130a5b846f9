"""scGPT's vocabulary: gene symbols and three special tokens, each with its row in the model's embedding.

The authors' vocab.json is one object {token: id}, in any order. Its ids must be exactly 0..n-1, for they are
rows of a weight; a file that says otherwise belongs to another model and is refused by name. Special tokens that
the file lacks go behind its last id, in the authors' order, because that is where training put them.
Source: the released scGPT gene tokenizer and checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scfm.data.safe_pickle import load_json
from scfm.errors import FormatError

__all__ = ["CLS", "EOC", "PAD", "SPECIAL_TOKENS", "ScgptVocab"]

PAD, CLS, EOC = "<pad>", "<cls>", "<eoc>"
SPECIAL_TOKENS = (PAD, CLS, EOC)
_MAX_TOKENS = 10_000_000


@dataclass(frozen=True)
class ScgptVocab:
    """token: gene symbol or special token -> id, in the order of the ids, which are 0..size-1.

    source: the file it came from, "" for none; appended: the special tokens that it lacked.
    """

    token: dict[str, int] = field(repr=False)
    source: str = ""
    appended: tuple[str, ...] = ()

    @classmethod
    def from_file(cls, path: str | Path) -> ScgptVocab:
        """Read vocab.json. Raises MissingFileError, and FormatError naming the token or id that is wrong."""
        return _checked(load_json(path), str(path))

    @classmethod
    def from_dict(cls, token: Mapping[str, int]) -> ScgptVocab:
        """From {token: id}. Raises FormatError naming the token or id that is wrong."""
        return _checked(dict(token), "")

    @property
    def size(self) -> int:
        """Tokens, special ones included: the rows of the model's gene embedding."""
        return len(self.token)

    @property
    def pad_id(self) -> int:
        return self.token[PAD]

    @property
    def cls_id(self) -> int:
        return self.token[CLS]

    @property
    def eoc_id(self) -> int:
        return self.token[EOC]

    @property
    def names(self) -> list[str]:
        """Every token, in the order of the ids."""
        return list(self.token)

    @property
    def genes(self) -> list[str]:
        """The tokens that are genes, in the order of their ids."""
        return [name for name in self.token if not is_special(name)]


def is_special(name: str) -> bool:
    """Whether a token is none of the genes: <pad>, <cls>, <eoc> and their like."""
    return name.startswith("<") and name.endswith(">")


def _checked(found: dict[Any, Any], source: str) -> ScgptVocab:
    def refuse(message: str, hint: str | None = None) -> FormatError:
        return FormatError(f"not a scGPT vocabulary: {message}", path=source or None, hint=hint)

    for name, token_id in found.items():
        if not isinstance(name, str) or not name:
            raise refuse(f"{name!r} with id {token_id!r} is no name of a token")
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise refuse(f"{name!r} has {token_id!r}, expected a whole number, its id")
    if not 0 < len(found) <= _MAX_TOKENS:
        raise refuse(f"{len(found):,} tokens, expected 1 to {_MAX_TOKENS:,}")
    by_id: dict[int, str] = {}
    for name, token_id in found.items():
        if not 0 <= token_id < len(found):
            raise refuse(
                f"{name!r} has id {token_id}; {len(found):,} tokens have the ids 0 to {len(found) - 1}",
                hint="Take the vocab.json that came with the checkpoint.",
            )
        if token_id in by_id:
            raise refuse(f"{by_id[token_id]!r} and {name!r} share the id {token_id}")
        by_id[token_id] = name
    token = {by_id[token_id]: token_id for token_id in range(len(found))}
    if all(is_special(name) for name in token):
        raise refuse("it has no genes")
    appended = tuple(name for name in SPECIAL_TOKENS if name not in token)
    for name in appended:
        token[name] = len(token)
    return ScgptVocab(token, source, appended)
