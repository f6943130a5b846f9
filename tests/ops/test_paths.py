"""The table of paths: which is taken, why the others are not, and forcing one."""

from __future__ import annotations

import threading

import pytest
import torch

from scfm.errors import InvalidArgumentError
from scfm.ops import native, paths, triton_kernels


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_TABLE", dict(paths._TABLE))
    too_wide = paths.Path("fast", "made up", lambda tensor: "too wide" if tensor.shape[-1] > 4 else None)
    paths.register("made_up", [too_wide, paths.Path("slow", "made up", lambda tensor: None)])


@pytest.mark.usefixtures("table")
def test_the_first_path_without_an_objection_is_taken() -> None:
    assert paths.choose("made_up", torch.zeros(2, 4)) == "fast"
    assert paths.choose("made_up", torch.zeros(2, 5)) == "slow"


@pytest.mark.usefixtures("table")
def test_every_path_says_why() -> None:
    narrow = {v.path: (v.chosen, v.why) for v in paths.explain("made_up", torch.zeros(2, 4))}
    assert narrow == {"fast": (True, "the fastest that can"), "slow": (False, "slower than fast")}
    wide = {v.path: (v.chosen, v.why) for v in paths.explain("made_up", torch.zeros(2, 5))}
    assert wide == {"fast": (False, "too wide"), "slow": (True, "the fastest that can")}


@pytest.mark.usefixtures("table")
def test_a_forced_path_is_taken_or_nothing_is() -> None:
    with paths.use_path("made_up", "slow"):
        assert paths.choose("made_up", torch.zeros(2, 4)) == "slow"
        verdicts = paths.explain("made_up", torch.zeros(2, 4))
        assert [(v.chosen, v.why) for v in verdicts] == [(False, "slow is forced"), (True, "forced")]
    with paths.use_path("made_up", "fast"), pytest.raises(InvalidArgumentError, match="fast: too wide"):
        paths.choose("made_up", torch.zeros(2, 5))
    assert paths.choose("made_up", torch.zeros(2, 4)) == "fast"


@pytest.mark.usefixtures("table")
def test_a_forced_path_holds_in_every_thread() -> None:
    """autograd runs the backward of GPU tensors in threads of its own, which know no context of the caller's."""
    seen: list[str] = []
    with paths.use_path("made_up", "slow"):
        thread = threading.Thread(target=lambda: seen.append(paths.choose("made_up", torch.zeros(2, 4))))
        thread.start()
        thread.join()
    assert seen == ["slow"]


@pytest.mark.usefixtures("table")
def test_the_innermost_forced_path_holds_and_leaves_the_others() -> None:
    outer, inner = paths.use_path("made_up", "slow"), paths.use_path("made_up", "fast")
    narrow = torch.zeros(2, 4)
    with outer:
        with inner:
            assert paths.choose("made_up", narrow) == "fast"
        assert paths.choose("made_up", narrow) == "slow"
    first, second = paths.use_path("made_up", "fast"), paths.use_path("made_up", "slow")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as another thread may, before the one that came later
    assert paths.choose("made_up", narrow) == "slow"
    second.__exit__(None, None, None)
    assert paths.choose("made_up", narrow) == "fast"


def test_the_order_has_a_reason_on_every_device() -> None:
    assert set(paths.ORDER) == {"cpu", "cuda"} and all(paths.ORDER.values())


def test_the_interpreter_takes_tensors_of_the_cpu_and_no_others(monkeypatch) -> None:
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: True)
    monkeypatch.setattr(triton_kernels, "missing", lambda: None)
    assert triton_kernels.objection(torch.zeros(1, 1, 16)) is None
    assert "interpreted" in (triton_kernels.objection(torch.zeros(1, 1, 16, device="meta")) or "")
    monkeypatch.setattr(triton_kernels, "interpreted", lambda: False)
    assert triton_kernels.objection(torch.zeros(1, 1, 16)) == "computes on a GPU"


@pytest.mark.parametrize(("operator", "path"), [("made_up_too", "torch"), ("varlen_attention", "abacus")])
def test_unknown_names_are_refused(operator, path) -> None:
    with pytest.raises(InvalidArgumentError, match="is no path of"), paths.use_path(operator, path):
        pass


def test_a_native_module_of_another_version_is_not_called() -> None:
    objection = native.objection_unless("varlen_forward", "a_function_of_tomorrow")
    assert "lacks a_function_of_tomorrow" in (objection(torch.zeros(1, 1, 8)) or "")


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(1, 1, 8, dtype=torch.float64), "has no float64"),
        (torch.zeros(1, 1, 257), "head_dim 257 is above 256"),
        (torch.zeros(1, 1, 8, device="meta"), "computes on the CPU"),
    ],
)
def test_native_objects_in_words(tensor, reason) -> None:
    assert native.objection_unless()(tensor) == reason


@pytest.mark.parametrize("operator", paths.operators())
def test_every_operator_has_a_way_for_every_dtype(operator) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        verdicts = paths.explain(operator, torch.zeros(2, 2, 300, dtype=dtype))
        assert sum(v.chosen for v in verdicts) == 1
        assert all(v.why for v in verdicts)
