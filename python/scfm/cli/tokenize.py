"""``scfm tokenize``: rank-value tokens of a file, packed, as one safetensors file."""

from __future__ import annotations

import json
import time

from scfm.cli import options
from scfm.cli.console import emit, reporting, say


def tokenize(
    data: options.DataFile,
    dictionaries: options.Dictionaries,
    out: options.Out,
    version: options.Version = None,
    counts_layer: options.CountsLayer = None,
    assume_counts: options.AssumeCounts = False,
    species: options.Species = "human",
    as_json: options.Json = False,
) -> None:
    """Tokens of every cell of DATA: token_ids, cu_seqlens and cell_ids (rows of DATA) in OUT.

    Embedding does not need this step: it tokenizes on the fly.
    """
    with reporting(as_json=as_json):
        from scfm.errors import InvalidArgumentError
        from scfm.models.weights import write_safetensors
        from scfm.tokenize.geneformer import GeneformerTokenizer

        if dictionaries is None:
            raise InvalidArgumentError("give the model's dictionaries", where="--dictionaries")
        if out.suffix != ".safetensors":
            raise InvalidArgumentError("expected a name ending in .safetensors", where="--out", path=out)
        if not out.parent.is_dir():
            raise InvalidArgumentError("the folder does not exist", where="--out", path=out.parent)
        tokenizer = GeneformerTokenizer.from_dictionaries(dictionaries, version=version, species=species)
        start = time.perf_counter()
        packed = tokenizer(data, layer=counts_layer, assume_counts=assume_counts)
        seconds = time.perf_counter() - start
        report = tokenizer.report
        assert report is not None
        tensors = {
            "token_ids": packed.token_ids,
            "cu_seqlens": packed.cu_seqlens,
            "cell_ids": packed.cell_ids,
        }
        write_safetensors(out, tensors, {"scfm_tokens": json.dumps(tokenizer.describe())})
        if as_json:
            emit({"ok": True, "out": str(out), "seconds": seconds, **report.to_dict()})
        else:
            say(str(report))
            say(f"{packed.num_cells:,} cells, {packed.num_tokens:,} tokens in {seconds:.2f} s -> {out}")
