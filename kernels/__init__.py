"""Triton kernels, importable as ``scfm.kernels``.

Modules here import torch and triton only, never scfm: each holds kernels and their launchers, which check nothing
but what a launch needs. The operators in ``scfm.ops`` check arguments, choose between implementations and
are what everything else calls.

Not run on a GPU by us yet: values are proved by Triton's interpreter, compilation for sm_80, sm_90 and sm_100 by
``python -m scfm.kernels.aot``, launches by a driver that takes notes (tests/kernels).

CUDA graphs: no launcher waits for the device, and grids depend on shapes only, so a forward or backward can be
captured after one ordinary call (which compiles, and looks at new offsets once). What is made during a capture is not
kept beyond it: tile lists are built inside the graph, from the offsets that each replay finds in place. The one thing
that waits is the block plan of graph_attention, built once a batch; a captured call uses the one it was built with.
"""
