"""Runs value binning with every array ending at the last byte before forbidden memory (see guard_page_probe)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from guard_page_probe import guarded
from test_value_bins import make_cells
from value_bins_oracle import encode_cell


def main() -> None:
    for length in [*range(20), 31, 32, 33, 63, 64, 65, 127, 1000, 1023]:
        for data_type, kind in (("f4", "counts"), ("f8", "distinct"), ("f4", "logged"), ("u1", "counts")):
            for index_type in ("i4", "i8"):
                plain = make_cells(length, [3, length], 1024, data_type, index_type, kind, max_tokens=90)
                arrays = {
                    name: guarded(value)
                    for name, value in vars(plain).items()
                    if isinstance(value, np.ndarray)
                }
                values = replace(plain, **arrays).run().values
                np.testing.assert_array_equal(
                    values, np.concatenate([encode_cell(plain, row)[1] for row in (0, 1)])
                )
    print("ok")


if __name__ == "__main__":
    main()
