"""Options that several verbs take, worded once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataFile = Annotated[Path, typer.Argument(help=".h5ad or .loom with raw counts.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="The authors' folder, a folder saved by scfm, or a hub id.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Dictionaries = Annotated[
    Path | None, typer.Option(help="Folder or token-dictionary file, if not beside the model.")
]
Family = Annotated[
    str | None,
    typer.Option(help="geneformer, scgpt, scbert or scfoundation, where the file does not tell it."),
]
Variant = Annotated[
    str | None, typer.Option(help='Of scFoundation\'s file: "cell" (default), "rde" or "gene".')
]
Genes = Annotated[
    Path | None,
    typer.Option(help="The genes' order (scBERT, scFoundation) or vocab.json, if not beside the model."),
]
Version = Annotated[str | None, typer.Option(help='"V1" or "V2", where no dictionary tells.')]
CountsLayer = Annotated[
    str | None, typer.Option("--counts-layer", help='Where raw counts are: "X", "raw.X" or a layer.')
]
AssumeCounts = Annotated[bool, typer.Option(help="Take the values as counts even if they do not look it.")]
Species = Annotated[str, typer.Option(help='"human", or "mouse" through one-to-one orthologues.')]
Device = Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]
