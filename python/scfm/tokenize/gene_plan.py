"""Which column of a data set feeds which token: worked out once per source, then used for every block.

The columns that feed tokens become *slots*, in the order the authors' tokenizer would leave its columns in:
genes fed by one column keep the column order; genes fed by several (aliases, duplicates that are to be summed)
follow, in order of first appearance. Slot order is also the order of ties.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scfm.data.gene_mapping import GeneMapping
from scfm.tokenize.dictionaries import GeneformerDictionaries


@dataclass(frozen=True)
class GeneSlots:
    """column_slot: int32 (genes in the data,), -1 where a column is no token; genes: the gene of each slot. Slots
    below ``num_single`` are fed by exactly one column. num_repeated: columns whose gene another column feeds
    too, kept apart.
    """

    column_slot: np.ndarray
    genes: list[str]
    num_single: int
    num_repeated: int


@dataclass(frozen=True)
class GenePlan:
    """The slots of GeneSlots with slot_token: int32 (slots,); slot_median: float64 (slots,), CP10k.
    num_without_median: columns left out.
    """

    column_slot: np.ndarray
    slot_token: np.ndarray
    slot_median: np.ndarray
    num_single: int
    num_repeated: int
    num_without_median: int


def plan_slots(ids: Sequence[str | None], *, collapse: bool) -> GeneSlots:
    """Slots for the genes of the columns, None being no gene. ``collapse``: sum columns of the same gene."""
    fed_by = Counter(gene for gene in ids if gene is not None)
    single: list[str] = []
    summed: dict[str, int] = {}
    column_slot = np.full(len(ids), -1, dtype=np.int32)
    for column, gene in enumerate(ids):
        if gene is None:
            continue
        if collapse and fed_by[gene] > 1:
            summed.setdefault(gene, len(summed))
        else:
            column_slot[column] = len(single)
            single.append(gene)
    for column, gene in enumerate(ids):
        if gene in summed:
            column_slot[column] = len(single) + summed[gene]
    repeated = 0 if collapse else sum(count for count in fed_by.values() if count > 1)
    return GeneSlots(column_slot, [*single, *summed], len(single), repeated)


def plan_genes(mapping: GeneMapping, vocab: GeneformerDictionaries, *, sum_duplicates: bool) -> GenePlan:
    """Slots for one data set. ``sum_duplicates``: also sum columns that bear the very same identifier."""
    ids = [gene if gene is None or gene in vocab.median else None for gene in mapping.ids]
    without_median = sum(new is None and old is not None for new, old in zip(ids, mapping.ids, strict=True))
    slots = plan_slots(ids, collapse=mapping.collapse or sum_duplicates)
    genes = slots.genes
    return GenePlan(
        column_slot=slots.column_slot,
        slot_token=np.fromiter((vocab.token[g] for g in genes), dtype=np.int32, count=len(genes)),
        slot_median=np.fromiter((vocab.median[g] for g in genes), dtype=np.float64, count=len(genes)),
        num_single=slots.num_single,
        num_repeated=slots.num_repeated,
        num_without_median=without_median,
    )
