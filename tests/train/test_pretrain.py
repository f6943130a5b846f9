"""One-process pretraining: it learns, it is reproduced by its settings, stopped and gone on with as if it never had."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import scfm
from scfm.errors import ConfigError, IntegrityError, ScfmError
from scfm.train.distributed.run_lock import RunLock
from scfm.train.pretrain import pretrain
from scfm.train.schedule import learning_rate_factor

# So few cells fill no budget well, which is advised against.
pytestmark = pytest.mark.filterwarnings("ignore:token_budget:scfm.errors.ScfmWarning")

SMALL = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "ffn_size": 32,
    "max_tokens": 128,
    "dropout": 0.0,
}
SMALL |= {"precision": "float32", "device": "cpu", "token_budget": 300, "microbatches_per_step": 2}


@pytest.fixture
def corpus(tiny_adata):
    """Real genes are needed: a fresh vocabulary takes its genes from the package's table."""
    from scfm.data.gene_tables import human_symbols

    symbols = sorted(symbol for symbol, genes in human_symbols().items() if len(genes) == 1)
    tiny_adata.var_names = symbols[: tiny_adata.n_vars]
    return tiny_adata


def run(corpus, out, *, progress=None, **changes):
    settings = {**SMALL, "data": [corpus], "out": out, "num_epochs": 2, **changes}
    return pretrain(settings, progress=progress)


def lines_of(result) -> list[dict]:
    lines = [json.loads(line) for line in result.metrics_file.read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def losses_of(result) -> list[float]:
    return [line["loss"] for line in lines_of(result)]


def stopping_at(step: int, number: int = signal.SIGUSR1):
    """A callback by which the run sends itself a signal after that step, twice."""

    def progress(line: dict) -> None:
        if line["step"] == step and "event" not in line:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    return progress


def test_it_learns_and_writes_what_it_says(corpus, tmp_path) -> None:
    result = run(corpus, tmp_path / "run", num_epochs=20, learning_rate=1e-2, held_out_fraction=0.2)
    lines = lines_of(result)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and result.step == len(lines)
    first, last = np.mean([x["loss"] for x in lines[:5]]), np.mean([x["loss"] for x in lines[-5:]])
    assert last < first - 0.3
    assert set(lines[0]) >= {"loss", "learning_rate", "grad_norm", "tokens", "cells", "tokens_per_s", "mfu"}
    assert lines[-1]["epoch"] == 19 and lines[-1]["progress"] == 1.0
    again = scfm.load(result.folder, dtype="float32")
    packed = result.corpus.held_out_pack(100)
    assert packed.num_cells
    np.testing.assert_array_equal(again.embed(packed), result.model.embed(packed))
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["learning_rate"] == 1e-2
    # The parts of an epoch add up: no cell is lost between steps and epochs.
    steps_of_an_epoch = sum(line["cells"] for line in lines) / 20
    assert steps_of_an_epoch == pytest.approx(result.corpus.num_training, rel=0.06)


@pytest.mark.parametrize("family", ["scgpt", "scbert", "scfoundation"])
def test_every_family_trains_stops_and_goes_on_bitwise(corpus, tmp_path, family: str) -> None:
    settings = {
        "family": family,
        "token_budget": 600,
        "num_epochs": 9,
        "max_steps": 6,
        "dropout": None,
        "learning_rate": 3e-3,
    }
    settings["model"] = {
        "scfoundation": {"decoder_size": 16, "decoder_layers": 1, "decoder_heads": 2, "num_bins": 10}
    }.get(family, {})
    whole = run(corpus, tmp_path / "whole", **settings)
    assert len(losses_of(whole)) == 6 and np.isfinite(losses_of(whole)).all()
    run(corpus, tmp_path / "parts", progress=stopping_at(2), **settings)
    parts = run(corpus, tmp_path / "parts", **settings)
    assert losses_of(parts) == losses_of(whole)
    loaded = scfm.load(whole.folder, dtype="float32", device="cpu")
    assert loaded.family == family
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, parts.model.state_dict()[name]), name


def test_random_projections_are_redrawn_between_steps_and_resumed(corpus, tmp_path, monkeypatch) -> None:
    """Counted in microbatches of the run: after more than 3 of them, at 2 a step, steps 3 and 5 draw first."""
    from scfm.models.nn import performer
    from scfm.train.training_model import new_objective

    monkeypatch.setattr(performer, "REDRAW_INTERVAL", 3)
    settings = {"family": "scbert", "num_epochs": 9, "max_steps": 5, "token_budget": 600, "dropout": None}
    drawn_at = []
    redraw = performer.Performer.redraw

    def noted(stack: performer.Performer) -> None:
        drawn_at.append(int(stack.calls_since_last_redraw))
        redraw(stack)

    monkeypatch.setattr(performer.Performer, "redraw", noted)
    whole = run(corpus, tmp_path / "whole", **settings)
    assert drawn_at == [4, 4] and int(whole.model.performer.calls_since_last_redraw) == 2
    assert whole.model.performer.redraw_interval == 3
    first = new_objective(
        scfm.PretrainConfig(data=[corpus], **{**SMALL, **settings}), whole.corpus, "cpu"
    ).model
    projection = "performer.layers.0.attention.projection_matrix"
    assert not torch.equal(first.state_dict()[projection], whole.model.state_dict()[projection])
    run(corpus, tmp_path / "parts", progress=stopping_at(3), **settings)
    parts = run(corpus, tmp_path / "parts", **settings)
    assert losses_of(parts) == losses_of(whole)
    assert torch.equal(parts.model.state_dict()[projection], whole.model.state_dict()[projection])


def test_settings_reproduce_the_run(corpus, tmp_path) -> None:
    one, two = (run(corpus, tmp_path / name, dropout=0.1) for name in "ab")
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = run(corpus, tmp_path / "c", dropout=0.1, seed=1)
    assert not torch.equal(one.model.gene_table, other.model.gene_table)


def test_row_73_stopped_by_signals_and_gone_on_with_is_bitwise_the_same(corpus, tmp_path) -> None:
    """Dropout, several stops, checkpoints between: the losses are those of a run that was left alone."""
    settings = {"dropout": 0.1, "num_epochs": 3, "checkpoint_every": 3}
    whole = run(corpus, tmp_path / "whole", **settings)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    first = run(corpus, tmp_path / "parts", progress=stopping_at(2, signal.SIGTERM), **settings)
    assert (first.stopped, first.step, first.folder, first.finished) == ("SIGTERM", 2, None, False)
    assert first.checkpoint == tmp_path / "parts" / "checkpoints" / "step-00000002"
    assert not (tmp_path / "parts" / "model").exists()
    told = []

    def second_stop(line: dict) -> None:
        told.append(line)
        stopping_at(7)(line)

    second = run(corpus, tmp_path / "parts", progress=second_stop, **settings)
    assert (second.stopped, second.step) == ("SIGUSR1", 7)
    assert told[0]["event"] == "resumed" and told[0]["step"] == 2
    assert told[-1]["event"] == "stopping" and told[-1]["why"] == "SIGUSR1"
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1))
    last = run(corpus, tmp_path / "parts", **settings)
    assert last.finished and losses_of(last) == losses_of(whole)
    for a, b in zip(last.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_gives_its_result_again_and_trains_on_when_it_may(corpus, tmp_path) -> None:
    one = run(corpus, tmp_path / "run")
    written = one.metrics_file.read_bytes()
    again = run(corpus, tmp_path / "run", progress=lambda line: pytest.fail("nothing was left to do"))
    assert again.finished and again.step == one.step and again.metrics_file.read_bytes() == written
    for a, b in zip(one.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    longer = run(corpus, tmp_path / "run", num_epochs=3, allow_change=["num_epochs"])
    assert longer.step > one.step
    loaded = scfm.load(longer.folder, dtype="float32", device="cpu")
    assert torch.equal(loaded.gene_table, longer.model.gene_table)


def test_killed_between_its_last_checkpoint_and_its_model(corpus, tmp_path, monkeypatch) -> None:
    from scfm.models.geneformer.model import Geneformer

    with monkeypatch.context() as patched:
        patched.setattr(Geneformer, "save", lambda model, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(corpus, tmp_path / "run")
    assert run(corpus, tmp_path / "run").folder.is_dir()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 5e-3}, "learning_rate"),
        ({"seed": 7}, "seed"),
        ({"token_budget": 400}, "token_budget"),
        ({"microbatches_per_step": 4}, "microbatches_per_step"),
        ({"schedule": "cosine"}, "schedule"),
        ({"hidden_size": 64}, "hidden_size"),
        ({"objective": {"mask_ratio": 0.3}}, "objective.mask_ratio"),
    ],
    ids=str,
)
def test_row_72_changed_settings_are_refused_by_name(stopped_run, corpus, change: dict, named: str) -> None:
    out, before = stopped_run
    with pytest.raises(ConfigError, match=rf"{named} \(was .* now .*allow_change=\[\"{named}\"\]"):
        run(corpus, out, **change)
    assert files_of(out) == before


@pytest.fixture
def stopped_run(corpus, tmp_path):
    """The folder of a run that was stopped after two steps, and what its files hold."""
    run(corpus, tmp_path / "run", progress=stopping_at(2))
    return tmp_path / "run", files_of(tmp_path / "run")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_row_72_changed_data_are_refused_by_name_unless_allowed(stopped_run, corpus) -> None:
    out, before = stopped_run
    corpus.X = corpus.X[::-1].tocsr()
    with pytest.raises(IntegrityError, match=r"other data: .*AnnData.*allow_change=\[\"data\"\]"):
        run(corpus, out)
    assert files_of(out)["metrics.jsonl"] == before["metrics.jsonl"]
    assert run(corpus, out, allow_change=["data"]).finished


def test_row_72_what_may_change_changes(stopped_run, corpus) -> None:
    out, _ = stopped_run
    settings = {"checkpoint_every": 2, "keep_last": 3, "activation_checkpointing": 1, "evaluate_every": None}
    assert run(corpus, out, learning_rate=2e-3, allow_change=["learning_rate"], **settings).finished


def test_resume_false_refuses_a_folder_with_a_run(stopped_run, corpus, tmp_path) -> None:
    out, before = stopped_run
    with pytest.raises(ConfigError, match="resume"):
        run(corpus, out, resume=False)
    assert files_of(out) == before
    (tmp_path / "other" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds a model"):
        run(corpus, tmp_path / "other")


def test_the_clock_stops_a_run_at_a_step_and_never_bends_it(corpus, tmp_path) -> None:
    whole = run(corpus, tmp_path / "whole")
    part = run(corpus, tmp_path / "run", max_minutes=1e-9)
    assert part.stopped == "max_minutes" and part.step == 0 and part.checkpoint is not None
    assert losses_of(run(corpus, tmp_path / "run")) == losses_of(whole)


class Poisoned:
    """The objective's losses, not finite at some calls; counts them."""

    def __init__(self, monkeypatch, bad_calls) -> None:
        from scfm.train.objectives.geneformer_pretraining import GeneformerPretraining

        self.calls = 0
        sound = GeneformerPretraining.losses

        def losses(objective, prepared):
            found = sound(objective, prepared)
            self.calls += 1
            return {
                "masked_genes": found["masked_genes"] * (float("nan") if self.calls in bad_calls else 1.0)
            }

        monkeypatch.setattr(GeneformerPretraining, "losses", losses)


def test_row_66_a_step_that_is_not_finite_is_skipped(corpus, tmp_path, monkeypatch) -> None:
    Poisoned(monkeypatch, {5})  # a microbatch of step 3
    told = []
    result = run(corpus, tmp_path / "run", progress=told.append)
    assert result.finished
    lines = lines_of(result)
    assert [line["step"] for line in lines if line.get("applied") is False] == [3]
    skipped = [line for line in told if line.get("event") == "skipped"]
    assert [line["step"] for line in skipped] == [3] and "masked_genes on rank 0" in skipped[0]["why"]
    assert lines[2]["loss"] == "NaN" and np.isfinite(lines[3]["loss"])


def test_row_66_several_in_a_row_stop_the_run_and_leave_the_weights(corpus, tmp_path, monkeypatch) -> None:
    settings = {"checkpoint_every": 2, "num_epochs": 4, "max_bad_steps": 3}
    with monkeypatch.context() as patched:
        Poisoned(patched, range(5, 1000))
        with pytest.raises(ScfmError, match="3 steps in a row") as raised:
            run(corpus, tmp_path / "run", **settings)
    message = str(raised.value)
    assert "step 5" in message and "masked_genes on rank 0" in message
    assert str(tmp_path / "run" / "checkpoints" / "step-00000004") in message
    assert not (tmp_path / "run" / "model").exists()
    # What was computed with those losses touched nothing: the same weights as after step 2.
    from safetensors.torch import load_file

    two, four = (
        load_file(next((tmp_path / "run" / "checkpoints" / f"step-0000000{n}").glob("*.safetensors")))
        for n in (2, 4)
    )
    assert two.keys() == four.keys() and all(torch.equal(two[name], four[name]) for name in two)


def test_row_80_metrics_that_cannot_be_written_kill_nothing(corpus, tmp_path, monkeypatch) -> None:
    write = os.write

    def full_disk(handle: int, content: bytes) -> int:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("metrics.jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content)

    whole = run(corpus, tmp_path / "whole")
    monkeypatch.setattr(os, "write", full_disk)
    with pytest.warns(scfm.ScfmWarning, match="training goes on"):
        result = run(corpus, tmp_path / "run")
    assert result.finished and not losses_of(result)
    assert torch.equal(result.model.gene_table, whole.model.gene_table)


def test_row_81_a_second_job_on_the_folder_is_refused(corpus, tmp_path) -> None:
    with RunLock(tmp_path / "run"), pytest.raises(ConfigError, match=f"process {os.getpid()} on host"):
        run(corpus, tmp_path / "run")
    assert run(corpus, tmp_path / "run").finished


def test_evaluations_stand_in_the_metrics_beside_their_baselines(corpus, tmp_path) -> None:
    probe = corpus.copy()
    probe.write_h5ad(tmp_path / "probe.h5ad")
    settings = {"held_out_fraction": 0.25, "evaluate_every": 4, "num_epochs": 2}
    settings["probe"] = [{"path": str(tmp_path / "probe.h5ad"), "label": "kind"}]
    result = run(corpus, tmp_path / "run", **settings)
    evaluated = [line["step"] for line in lines_of(result) if "held_out/loss" in line]
    assert evaluated == [*range(4, result.step, 4), result.step]
    last = lines_of(result)[-1]
    assert last["held_out/loss"] == result.evaluation.metrics["held_out/loss"]
    assert {"held_out/baseline/unigram/loss", "probe/probe/knn", "probe/probe/linear"} <= set(last)
    assert "unigram" in (tmp_path / "run" / "evaluation.md").read_text()
    # Looking changes nothing.
    plain = run(corpus, tmp_path / "plain", **{**settings, "evaluate_every": None, "probe": []})
    assert losses_of(plain) == losses_of(result)


def test_an_error_leaves_the_checkpoint_that_was_being_written(corpus, tmp_path) -> None:
    def interrupt(line: dict) -> None:
        if line["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "run", checkpoint_every=3, progress=interrupt)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert losses_of(run(corpus, tmp_path / "run", checkpoint_every=3)) == losses_of(
        run(corpus, tmp_path / "whole")
    )


def test_blocks_are_compiled_inside_what_is_recomputed(corpus, tmp_path, monkeypatch) -> None:
    """torch.compile itself takes a minute on a CPU: here it is a wrapper that counts."""
    calls = []

    def compile_(function, *, dynamic):
        assert dynamic and function.__name__ == "forward"

        def compiled(*args):
            calls.append(torch.is_grad_enabled())
            return function(*args)

        return compiled

    plain = run(corpus, tmp_path / "plain", max_steps=2)
    monkeypatch.setattr(torch, "compile", compile_)
    result = run(corpus, tmp_path / "run", max_steps=2, compile=True, activation_checkpointing=1)
    assert len(calls) == 2 * 2 * 2  # steps, microbatches, and again in the backward
    assert losses_of(result) == losses_of(plain)
    assert all("forward" not in vars(layer) for layer in result.model.layers)


def test_norms_and_biases_do_not_decay(corpus, tmp_path) -> None:
    """A rate of learning that moves nothing shows the decay alone."""
    from scfm.train.distributed.launch import joined
    from scfm.train.distributed.parallel import ParallelModel
    from scfm.train.training_model import new_objective

    result = run(corpus, tmp_path / "run", max_steps=1)
    config = scfm.PretrainConfig(data=[corpus], out=tmp_path, **SMALL)
    objective = new_objective(config, result.corpus, torch.device("cpu"))
    with joined("cpu", 5.0) as world:
        groups = ParallelModel(objective, config, world).parameter_groups(0.1)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in objective.model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name


def test_the_callers_random_numbers_are_left_alone(corpus, tmp_path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(corpus, tmp_path / "run", dropout=0.1, num_epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_schedule_rises_and_falls_to_zero() -> None:
    for schedule in ("linear", "cosine"):
        factors = [
            learning_rate_factor(p, warmup_ratio=0.1, schedule=schedule) for p in np.linspace(0, 1, 101)
        ]
        assert max(factors) == pytest.approx(1.0) and factors[0] == 0.0 and abs(factors[-1]) < 1e-12
        assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    constant = [learning_rate_factor(p, warmup_ratio=0.1, schedule="constant") for p in (0.05, 0.1, 0.5, 1.0)]
    assert constant == [0.5, 1.0, 1.0, 1.0]
