"""The dictionaries that Geneformer's tokenizer stands on: tokens, medians, gene mapping, gene names.

The authors ship four files a version; only the token dictionary is indispensable. V1 and V2 differ in
their special tokens and so in every cell's tokens: which one a dictionary is follows from whether it holds
``<cls>``, is never guessed, and a caller who says otherwise gets an error. scfm's own folders hold the same
in one ``vocab.json``.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scfm.data.safe_pickle import load_json, load_mapping, parse_json
from scfm.errors import ConfigError, FormatError, InvalidArgumentError, ScfmWarning, VersionError
from scfm.tokenize.dictionary_files import DictionaryFiles, located, places, sets_in

__all__ = ["SPECIAL_TOKENS", "GeneformerDictionaries", "Version"]

Version = Literal["V1", "V2"]
SPECIAL_TOKENS: dict[Version, tuple[str, ...]] = {
    "V1": ("<pad>", "<mask>"),
    "V2": ("<pad>", "<mask>", "<cls>", "<eos>"),
}
MAX_TOKEN_ID = 10_000_000
_FORMAT = "scfm-geneformer-vocab"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class GeneformerDictionaries:
    """What turns genes into tokens and back.

    token: Ensembl id or special token -> token id; ``<pad>`` is 0, ids are unique.
    median: Ensembl id -> the gene's median non-zero expression in the training corpus (counts per
        10,000), > 0; genes with a token only. Empty without a median file: token ids only, then.
    mapping: upper-case key (Ensembl id; in the authors' V2 also symbols and aliases) -> Ensembl id that
        has a token.
    names: gene symbol -> Ensembl id as the authors spell them, with or without a token.
    version: "V1" (no ``<cls>``) or "V2". source: the file it came from.
    """

    token: dict[str, int]
    median: dict[str, float]
    mapping: dict[str, str]
    names: dict[str, str]
    version: Version
    source: str

    @classmethod
    def from_files(
        cls, path: str | Path, version: str | None = None, *, vocab_size: int | None = None
    ) -> GeneformerDictionaries:
        """Read a folder of dictionaries, a token dictionary with its siblings, or a vocab.json.

        ``version`` ("V1" or "V2") and the model's ``vocab_size`` choose when a folder holds several sets;
        what they cannot settle raises ConfigError naming the candidates, and so does a set that contradicts
        them. Raises MissingFileError, FormatError and UnsafeCheckpointError for absent, malformed and
        hostile files.
        """
        wanted, path = _known_version(version), Path(path)
        own = path / "vocab.json" if path.is_dir() and not sets_in(path) else path
        if own.name == "vocab.json" and own.is_file():
            return _agreeing(cls._from_content(load_json(own), str(own)), wanted, vocab_size)
        tokens = {files: _read_token_dictionary(files.token) for files in located(path)}
        return cls._read(_choose(tokens, wanted, vocab_size, path), tokens, vocab_size)

    @classmethod
    def find(
        cls,
        model_folder: str | Path,
        dictionaries: str | Path | GeneformerDictionaries | None = None,
        version: str | None = None,
        *,
        vocab_size: int | None = None,
    ) -> GeneformerDictionaries | None:
        """The dictionaries of the model in ``model_folder``, or None if there are none.

        ``dictionaries`` (a folder, a token dictionary, or dictionaries already read) decides if given.
        Otherwise the model's folder and the places around it where the authors keep theirs are searched in
        order; a set with another number of tokens than ``vocab_size`` belongs to another model and is
        passed over, with a ScfmWarning if nothing better turns up. Raises as ``from_files`` does.
        """
        if isinstance(dictionaries, GeneformerDictionaries):
            return _agreeing(dictionaries, _known_version(version), vocab_size)
        if dictionaries is not None:
            return cls.from_files(dictionaries, version, vocab_size=vocab_size)
        vocab = Path(model_folder) / "vocab.json"
        if vocab.is_file() and load_json(vocab).get("format") == _FORMAT:
            return cls.from_files(vocab, version, vocab_size=vocab_size)
        return cls._search(places(Path(model_folder)), _known_version(version), vocab_size)

    @classmethod
    def _search(
        cls, folders: Sequence[Path], wanted: Version | None, vocab_size: int | None
    ) -> GeneformerDictionaries | None:
        passed_over: list[tuple[Path, Version, int]] = []
        for folder in folders:
            tokens = {files: _read_token_dictionary(files.token) for files in sets_in(folder)}
            fitting = {
                files: token
                for files, token in tokens.items()
                if wanted in (None, _version_of(token)) and vocab_size in (None, _size(token))
            }
            if fitting:
                return cls._read(_choose(fitting, wanted, vocab_size, folder), fitting, vocab_size)
            passed_over += [
                (files.token, _version_of(token), _size(token)) for files, token in tokens.items()
            ]
        if passed_over:
            listed = "; ".join(f"{path} ({found}, {size:,} tokens)" for path, found, size in passed_over[:5])
            if wanted is not None and all(found != wanted for _, found, _ in passed_over):
                raise ConfigError(f"version={wanted!r} was asked for, found only {listed}", where="version")
            warnings.warn(
                f"dictionaries passed over, because the model has {vocab_size:,} tokens: {listed}. "
                "Without dictionaries the model runs on token ids only; dictionaries= names the right ones.",
                ScfmWarning,
                stacklevel=4,
            )
        return None

    @classmethod
    def _read(
        cls, files: DictionaryFiles, tokens: Mapping[DictionaryFiles, dict[str, int]], vocab_size: int | None
    ) -> GeneformerDictionaries:
        token = tokens[files]
        result = cls(
            token=token,
            median=_usable_medians(load_mapping(files.median, value="float"), token, files.median)
            if files.median
            else {},
            mapping=_usable_mapping(load_mapping(files.mapping, value="str"), token, files.mapping)
            if files.mapping
            else _identity(token),
            names=load_mapping(files.names, value="str") if files.names else {},
            version=_version_of(token),
            source=str(files.token),
        )
        return _agreeing(result, None, vocab_size)

    @classmethod
    def from_vocabulary(
        cls,
        genes: Sequence[str],
        medians: Mapping[str, float],
        version: str,
        symbols: Mapping[str, str] | None = None,
    ) -> GeneformerDictionaries:
        """Fresh dictionaries for pretraining: special tokens, then ``genes`` (Ensembl ids) in their order.

        medians: Ensembl id -> median non-zero expression (counts per 10,000), finite and > 0; a gene
        without one has a token but is never produced by the tokenizer. symbols: gene symbol -> Ensembl id;
        symbols that two genes share when upper-cased are not mapped. Raises InvalidArgumentError,
        ConfigError.
        """
        checked = _known_version(version)
        if checked is None:
            raise ConfigError("a version is needed: 'V1' or 'V2'", where="version")
        specials = SPECIAL_TOKENS[checked]
        twice = [gene for gene, count in Counter(genes).items() if count > 1 or gene in SPECIAL_TOKENS["V2"]]
        if twice or not genes:
            raise InvalidArgumentError(
                f"genes must be distinct and not none; {len(twice):,} are repeated or special, as {twice[:5]}"
            )
        bad = [gene for gene, median in medians.items() if not (math.isfinite(median) and median > 0)]
        if bad:
            raise InvalidArgumentError(f"medians must be finite and > 0; {len(bad):,} are not: {bad[:5]}")
        token = {name: token_id for token_id, name in enumerate([*specials, *genes])}
        names = dict(symbols or {})
        return cls(
            token=token,
            median={gene: float(medians[gene]) for gene in genes if gene in medians},
            mapping=_unambiguous(names, token) | _identity(token),
            names=names,
            version=checked,
            source="from_vocabulary",
        )

    @classmethod
    def from_json(cls, text: str, *, source: str = "vocab.json") -> GeneformerDictionaries:
        """Read what ``to_json`` wrote. Raises FormatError; VersionError if a newer scfm wrote it."""
        return cls._from_content(parse_json(text.encode("utf-8"), source), source)

    @classmethod
    def _from_content(cls, found: Mapping[str, Any], source: str) -> GeneformerDictionaries:
        if found.get("format") != _FORMAT:
            raise FormatError(
                f"not a vocabulary of scfm's Geneformer: format is {found.get('format')!r}", path=source
            )
        if found.get("format_version") != _FORMAT_VERSION:
            raise VersionError(
                f"vocabulary format {found.get('format_version')!r}; this scfm reads {_FORMAT_VERSION}",
                path=source,
                hint="Upgrade with `pip install -U scfm`.",
            )
        token = _checked_tokens(_section(found, "token", int, source), source)
        version = _version_of(token)
        if found.get("version") != version:
            raise FormatError(f"says version {found.get('version')!r}, its tokens are {version}", path=source)
        return cls(
            token=token,
            median=_usable_medians(_section(found, "median", float, source), token, source),
            mapping=_usable_mapping(_section(found, "mapping", str, source), token, source),
            names=_section(found, "names", str, source),
            version=version,
            source=source,
        )

    def to_json(self) -> str:
        """The whole of it as JSON text; medians keep every bit. The source path is left out."""
        content = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "version": self.version,
            "token": self.token,
            "median": self.median,
            "mapping": self.mapping,
            "names": self.names,
        }
        return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=0) + "\n"

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id: the fewest rows that a model's embedding must have."""
        return _size(self.token)

    @property
    def special_tokens(self) -> dict[str, int]:
        """``<pad>``, ``<mask>`` and, in V2, ``<cls>`` and ``<eos>`` -> token id."""
        return {name: self.token[name] for name in SPECIAL_TOKENS[self.version]}

    @property
    def genes(self) -> list[str]:
        """All tokens that are genes, in the order of their ids."""
        return sorted(_genes(self.token), key=self.token.__getitem__)

    @property
    def genes_without_median(self) -> list[str]:
        """Genes that have a token but no usable median, so that the tokenizer cannot rank them."""
        return [gene for gene in self.genes if gene not in self.median]


def _known_version(version: str | None) -> Version | None:
    for known in SPECIAL_TOKENS:
        if version == known:
            return known
    if version is None:
        return None
    raise ConfigError(f"found {version!r}; Geneformer's versions are 'V1' and 'V2'", where="version")


def _version_of(token: Mapping[str, int]) -> Version:
    return "V2" if "<cls>" in token else "V1"


def _size(token: Mapping[str, int]) -> int:
    return max(token.values()) + 1


def _genes(token: Mapping[str, int]) -> Iterable[str]:
    return (name for name in token if not (name.startswith("<") and name.endswith(">")))


def _identity(token: Mapping[str, int]) -> dict[str, str]:
    """Every gene under its own name: what V1's mapping file holds, and the stand-in where there is none."""
    return {gene.upper(): gene for gene in _genes(token)}


def _unambiguous(symbols: Mapping[str, str], token: Mapping[str, int]) -> dict[str, str]:
    targets: dict[str, set[str]] = {}
    for symbol, gene in symbols.items():
        if gene in token:
            targets.setdefault(symbol.upper(), set()).add(gene)
    return {symbol: next(iter(genes)) for symbol, genes in targets.items() if len(genes) == 1}


def _read_token_dictionary(path: Path) -> dict[str, int]:
    return _checked_tokens(load_mapping(path, value="int"), path)


def _checked_tokens(token: dict[str, int], path: Path | str) -> dict[str, int]:
    def refuse(message: str) -> FormatError:
        return FormatError(f"not a token dictionary: {message}", path=path)

    outside = [(name, token_id) for name, token_id in token.items() if not 0 <= token_id < MAX_TOKEN_ID]
    if outside:
        raise refuse(f"{len(outside):,} ids are not in 0..{MAX_TOKEN_ID - 1:,}: {outside[:5]}")
    if token.get("<pad>") != 0 or "<mask>" not in token:
        raise refuse(f"<pad> must be 0 and <mask> present; <pad> is {token.get('<pad>')}")
    if len(set(token.values())) != len(token):
        counts = Counter(token.values())
        shared = [(name, token_id) for name, token_id in token.items() if counts[token_id] > 1]
        raise refuse(f"{len(shared):,} names share an id: {shared[:5]}")
    if ("<cls>" in token) != ("<eos>" in token):
        raise refuse("V2 has both <cls> and <eos>, V1 neither; this has one of them")
    if not any(True for _ in _genes(token)):
        raise refuse("it has no genes")
    return token


def _usable_medians(
    medians: Mapping[str, float], token: Mapping[str, int], path: Path | str | None
) -> dict[str, float]:
    """Medians of genes with a token. Zero is no median (dividing by it ranks a gene first in every cell)."""
    bad = [(gene, median) for gene, median in medians.items() if not (math.isfinite(median) and median >= 0)]
    if bad:
        raise FormatError(f"{len(bad):,} medians are negative or not finite: {bad[:5]}", path=path)
    return {gene: medians[gene] for gene in _genes(token) if medians.get(gene, 0.0) > 0.0}


def _usable_mapping(
    mapping: Mapping[str, str], token: Mapping[str, int], path: Path | str | None
) -> dict[str, str]:
    """The mapping to genes that have a token (the authors' filter), with upper-case keys."""
    genes = set(_genes(token))
    result: dict[str, str] = {}
    for key, gene in mapping.items():
        if gene in genes and result.setdefault(key.upper(), gene) != gene:
            raise FormatError(f"{key.upper()!r} leads to {result[key.upper()]!r} and {gene!r}", path=path)
    return result


def _choose(
    tokens: Mapping[DictionaryFiles, dict[str, int]],
    wanted: Version | None,
    vocab_size: int | None,
    where: Path,
) -> DictionaryFiles:
    """The one set that agrees with ``wanted`` and, if several do, has exactly ``vocab_size`` tokens."""
    left = [files for files, token in tokens.items() if wanted in (None, _version_of(token))]
    if not left:
        found = ", ".join(f"{files.token.name} ({_version_of(token)})" for files, token in tokens.items())
        raise ConfigError(f"version={wanted!r} contradicts what is there: {found}", path=where)
    if len(left) > 1 and vocab_size is not None:
        left = [files for files in left if _size(tokens[files]) == vocab_size] or left
    if len(left) > 1:
        listed = ", ".join(
            f"{files.token.name} ({_version_of(tokens[files])}, {_size(tokens[files]):,} tokens)"
            for files in left
        )
        raise ConfigError(
            f"several token dictionaries: {listed}",
            path=where,
            hint="Say version='V1' or 'V2', or give the token dictionary's own path.",
        )
    return left[0]


def _agreeing(
    found: GeneformerDictionaries, wanted: Version | None, vocab_size: int | None
) -> GeneformerDictionaries:
    if wanted not in (None, found.version):
        raise ConfigError(
            f"version={wanted!r}, but the dictionary is {found.version} "
            f"({'has' if found.version == 'V2' else 'lacks'} <cls>)",
            path=found.source,
        )
    # A table padded to a multiple of eight for speed is the only honest reason for a difference.
    padded = vocab_size is not None and vocab_size % 8 == 0 and 0 <= vocab_size - found.vocab_size < 64
    if vocab_size is not None and found.vocab_size != vocab_size and not padded:
        raise ConfigError(
            f"token ids reach {found.vocab_size - 1:,}; the model has {vocab_size:,} tokens",
            path=found.source,
            hint="These dictionaries belong to another model.",
        )
    return found


def _section(found: Mapping[str, Any], name: str, kind: type, source: str) -> dict[str, Any]:
    section = found.get(name)
    if not isinstance(section, dict):
        raise FormatError(f"expected an object, found {type(section).__name__}", path=source, where=name)
    allowed = (int, float) if kind is float else (kind,)
    wrong = [
        (key, value)
        for key, value in section.items()
        if type(value) not in allowed or (type(value) is int and kind is float and abs(value) > 2**1000)
    ]
    if wrong:
        listed = [key[:60] for key, _ in wrong[:5]]
        raise FormatError(f"{len(wrong):,} values are not {kind.__name__}: {listed}", path=source, where=name)
    return section
