"""Runs FAVOR+ attention with every array ending at the last byte before forbidden memory (see guard_page_probe)."""

from __future__ import annotations

import numpy as np
from guard_page_probe import Array, guarded

from scfm import _native as native

EPS = 1e-4


def writable(array: Array) -> Array:
    copy = guarded(array.reshape(-1)).reshape(array.shape)
    copy.flags.writeable = True
    return copy


def run(lengths: list[int], heads: int, dim: int, features: int, bf16: bool) -> None:
    random = np.random.default_rng(dim)
    shape = (sum(lengths), heads, dim)

    def tensor() -> Array:
        values = random.standard_normal(shape, dtype=np.float32)
        return writable((values.view(np.uint32) >> 16).astype(np.int16) if bf16 else values)

    q, k, v, grad_out, out, dq, dk, dv = (tensor() for _ in range(8))
    projection = writable(random.standard_normal((features, dim), dtype=np.float32))
    key_max, key_max_grad = (writable(np.zeros(len(lengths), np.float32)) for _ in range(2))
    cu_seqlens = guarded(np.cumsum([0, *lengths], dtype=np.int32))
    native.favor_forward(q, k, v, projection, out, key_max, False, cu_seqlens, EPS)
    grads = (dq, dk, dv, key_max, False, key_max_grad)
    native.favor_backward(grad_out, q, k, v, projection, *grads, cu_seqlens, EPS)
    if not bf16:
        assert all(np.isfinite(x).all() for x in (out, dq, dk, dv, key_max_grad))


def main() -> None:
    for dim in (1, 7, 8, 9, 15, 16, 17, 31, 64):
        for bf16 in (False, True):
            run([3, 1, 47, 50], heads=2, dim=dim, features=dim + 3, bf16=bf16)
    print("ok")


if __name__ == "__main__":
    main()
