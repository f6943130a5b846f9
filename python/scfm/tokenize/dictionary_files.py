"""Where Geneformer's dictionary files lie and which of them belong together; names only, nothing is read.

The authors' file names are a fixed stem, a free suffix and ``.pkl``: ``token_dictionary_gc104M.pkl``.
Files with the same suffix belong together. JSON twins (``.json``, ``.json.gz``) are accepted and preferred
to a pickle of the same name. One folder may hold several sets; choosing between them is the business of
``dictionaries``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scfm.errors import MissingFileError

__all__ = ["DictionaryFiles", "located", "places", "sets_in"]

_STEMS = {
    "token": "token_dictionary",
    "median": "gene_median_dictionary",
    "mapping": "ensembl_mapping_dict",
    "names": "gene_name_id_dict",
}
_ENDINGS = (".json", ".json.gz", ".pkl")


@dataclass(frozen=True)
class DictionaryFiles:
    """One set of dictionary files; all but the token dictionary may be absent."""

    token: Path
    median: Path | None = None
    mapping: Path | None = None
    names: Path | None = None


def sets_in(folder: Path) -> list[DictionaryFiles]:
    """Every set of dictionaries in ``folder``, by suffix. Empty if there is none or no such folder."""
    found = {kind: _by_suffix(folder, stem) for kind, stem in _STEMS.items()}
    return [_set_of(token, suffix, found) for suffix, token in sorted(found["token"].items())]


def located(path: Path) -> list[DictionaryFiles]:
    """The sets that a user means by ``path``: those in a folder, or the one of a token-dictionary file.

    Raises MissingFileError saying what was looked for.
    """
    if path.is_dir():
        found = sets_in(path)
        if not found:
            raise MissingFileError(
                "no token dictionary in this folder; looked for token_dictionary*.pkl, .json and .json.gz",
                path=path,
            )
        return found
    if not path.exists():
        raise MissingFileError("no such dictionary file or folder", path=path)
    suffix = _suffix(path.name, _STEMS["token"])
    if suffix is None:
        return [DictionaryFiles(path)]
    return [_set_of(path, suffix, {kind: _by_suffix(path.parent, stem) for kind, stem in _STEMS.items()})]


def places(model_folder: Path) -> list[Path]:
    """Where a model's dictionaries may lie, in order: with it, then as in the authors' repository."""
    own = model_folder.absolute()
    return [
        own,
        own / "gene_dictionaries_30m",
        own / "geneformer",
        own / "geneformer" / "gene_dictionaries_30m",
        own.parent / "geneformer",
        own.parent / "geneformer" / "gene_dictionaries_30m",
        own.parent / "gene_dictionaries_30m",
    ]


def _suffix(name: str, stem: str) -> str | None:
    """The free part of a dictionary's file name, or None if this is no such file."""
    for ending in _ENDINGS:
        if name.startswith(stem) and name.endswith(ending) and not name.startswith("."):
            return name[len(stem) : len(name) - len(ending)]
    return None


def _by_suffix(folder: Path, stem: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    if not folder.is_dir():
        return found
    for ending in _ENDINGS:
        for path in sorted(folder.glob(f"{stem}*{ending}")):
            suffix = _suffix(path.name, stem)
            if suffix is not None and path.is_file():
                found.setdefault(suffix, path)
    return found


def _set_of(token: Path, suffix: str, found: dict[str, dict[str, Path]]) -> DictionaryFiles:
    """The set of ``token``: siblings of its suffix; in a folder with one set only, whatever the suffix."""

    def sibling(kind: str) -> Path | None:
        files = found[kind]
        if suffix not in files and len(files) == 1 and len(found["token"]) == 1:
            return next(iter(files.values()))
        return files.get(suffix)

    return DictionaryFiles(token, sibling("median"), sibling("mapping"), sibling("names"))
