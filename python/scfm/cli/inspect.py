"""``scfm inspect``: what is in a file or a model folder, without computing anything on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scfm.cli import options
from scfm.cli.console import emit, reporting, say


def inspect(
    path: Annotated[
        str, typer.Argument(help="A data set (.h5ad, .zarr, 10x, ...), a model folder or a hub id.")
    ],
    dictionaries: options.Dictionaries = None,
    version: options.Version = None,
    counts_layer: options.CountsLayer = None,
    species: options.Species = "human",
    as_json: options.Json = False,
) -> None:
    """Show what scfm finds in PATH: raw counts and genes of a data set, or shape and tensors of a model."""
    from scfm.data.read import is_data_path

    with reporting(as_json=as_json):
        facts = (
            _data_facts(path, counts_layer, dictionaries, version, species)
            if is_data_path(path)
            else _model_facts(path, dictionaries, version)
        )
        if as_json:
            emit({"ok": True, **facts})
        else:
            for name, value in facts.items():
                say(f"{name:>16}: {value}")


def _data_facts(
    path: str, layer: str | None, dictionaries: Path | None, version: str | None, species: str
) -> dict[str, Any]:
    from scfm.data.gene_mapping import map_genes
    from scfm.data.gene_tables import human_symbols
    from scfm.data.read import read
    from scfm.tokenize.dictionaries import GeneformerDictionaries

    source = read(path, layer=layer)
    if dictionaries is None:
        vocabulary = sorted({gene for genes in human_symbols().values() for gene in genes})
        known, symbols = {gene: gene for gene in vocabulary}, None
    else:
        found = GeneformerDictionaries.from_files(dictionaries, version=version)
        vocabulary = [gene for gene in found.token if not gene.startswith("<")]
        known, symbols = found.mapping, found.names
    mapping = map_genes(source.genes, known=known, vocabulary=vocabulary, symbols=symbols, species=species)
    return {
        "file": path,
        "cells": len(source),
        "genes": len(source.genes),
        "raw counts": source.counts_from,
        "reader": source.reader,
        "obs columns": source.obs_column_names,
        "var columns": list(source.genes.columns),
        "gene coverage": str(mapping.coverage()),
        "vocabulary": "GENCODE (human)" if dictionaries is None else str(dictionaries),
    }


def _model_facts(path: str, dictionaries: Path | None, version: str | None) -> dict[str, Any]:
    from scfm.models.load import load

    model = load(path, dictionaries=dictionaries, version=version, dtype="float32", device="cpu")
    return {
        "model": model.source,
        "family": model.family,
        "parameters": f"{model.num_parameters():,}",
        "config": model.config.to_dict(),
        "vocabulary": "none found" if model.vocab is None else model.vocab.source,
        "report": str(model.load_report),
    }
