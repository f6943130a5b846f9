"""scGPT-spatial: a cell's expression predicted from the cells around it.

Each cell's embedding is replaced by the mean of its nearest neighbours' on the slide, itself left out, and decoded as
masked value prediction by cell does, with a decoder of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.scgpt.inputs import checked_inputs
from scfm.models.scgpt.model import Scgpt
from scfm.models.scgpt.parts import required


def impute_from_neighbors(
    model: Scgpt, packed: PackedCells, cell_embeddings: Tensor, coordinates: Any, *, num_neighbors: int = 5
) -> Tensor:
    """Expression of each token's gene as its cell's neighbours suggest, float32 (T,), in the units of the values.

    cell_embeddings: (C, hidden_size), as forward gives them; coordinates: (C, 2) or more columns, of the cells of the
    pack, among which neighbours are looked for. Equal distances go by the cells' order. Raises InvalidArgumentError.
    """
    decoder = required(model.impute_mvc_decoder, "impute_mvc_decoder", "neighbourhood decoder")
    inputs = checked_inputs(model.config, packed, model.device, needs_values=False)
    nearest = nearest_neighbors(coordinates, packed.num_cells, num_neighbors).to(model.device)
    if cell_embeddings.shape != (packed.num_cells, model.config.hidden_size):
        raise InvalidArgumentError(
            f"{tuple(cell_embeddings.shape)}; expected {(packed.num_cells, model.config.hidden_size)}",
            where="cell_embeddings",
        )
    surroundings = cell_embeddings[nearest].mean(dim=1)
    prediction: Tensor = decoder(model.gene_rows(inputs), surroundings, inputs.cell_of_token).prediction
    return prediction


def nearest_neighbors(coordinates: Any, num_cells: int, num_neighbors: int) -> Tensor:
    """int64 (C, num_neighbors): each cell's nearest others, nearest first."""
    places = torch.as_tensor(coordinates).cpu().double()
    if places.dim() != 2 or len(places) != num_cells or not bool(places.isfinite().all()):
        raise InvalidArgumentError(
            f"{tuple(places.shape)}; expected finite numbers, a row for each of {num_cells} cells",
            where="coordinates",
        )
    if not 1 <= num_neighbors < num_cells:
        raise InvalidArgumentError(f"{num_neighbors}; expected 1 to {num_cells - 1}", where="num_neighbors")
    rows = []
    for start in range(0, num_cells, 1024):  # so that no square of all cells is ever in memory
        distances = torch.cdist(places[start : start + 1024], places)
        own = torch.arange(len(distances))
        distances[own, own + start] = torch.inf
        rows.append(torch.sort(distances, dim=1, stable=True).indices[:, :num_neighbors])
    return torch.cat(rows)
