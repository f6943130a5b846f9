"""Settings of a run: what cannot be is named before any data is read."""

from __future__ import annotations

import pytest

import scfm
from scfm.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rat": 1}, "learning_rate"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": True}, "num_layers"),
        ({"hidden_size": 30, "num_heads": 4}, "num_heads"),
        ({"schedule": "step"}, "schedule"),
        ({"preset": "V9"}, "preset"),
        ({"max_minutes": -1}, "max_minutes"),
        ({"max_steps": "ten"}, "max_steps"),
        ({"max_steps": 0.5}, "max_steps"),
        ({"seed": -1}, "seed"),
        ({"clip_norm": -1}, "clip_norm"),
        ({"clip_norm": "x"}, "clip_norm"),
        ({"species": "rat"}, "species"),
        ({"special_tokens": "no"}, "special_tokens"),
        ({"device": "abacus"}, "device"),
        ({"layer": 3}, "layer"),
        ({"out": 3}, "out"),
        ({"mask_ratio": 0.3}, "mask_ratio"),
        ({"objective": {"mask_rati": 0.3}}, "mask_ratio"),
        ({"objective": {"mask_ratio": 1.5}}, "mask_ratio"),
        ({"model": {"activatoin": "relu"}}, "activation"),
        ({"model": {"activation": "tanh"}}, "model.activation"),
        ({"model": {"vocab_size": 9}}, "model.vocab_size"),
        ({"family": "scgpt", "model": {"num_bins": "x"}}, "model.num_bins"),
        ({"family": "scgpt", "preset": "V1-10M"}, "preset"),
        ({"family": "scbert", "model": {"num_features": 0}}, "model.num_features"),
        ({"family": "scfoundation", "model": {"decoder_size": -3}}, "model.decoder_size"),
        ({"data": [{"pat": "a"}]}, "pat"),
        ({"data": [{"path": "a", "keep": {"batch": "v2"}}]}, "keep"),
        ({"probe": [{"path": "a"}]}, "label"),
        ({"allow_change": ["learning_rat"]}, "learning_rate"),
        ({"shard_size": 2}, "shard_size"),
        ({"keep_last": 1}, "keep_last"),
        ({"shuffle_window": 8}, "shuffle_window"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_before_any_data_is_read(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        scfm.PretrainConfig.from_mapping({"data": ["missing.h5ad"], **settings})


def test_what_is_given_beside_a_preset_counts() -> None:
    config = scfm.PretrainConfig(preset="V2-104M", num_layers=6, max_tokens=2048)
    assert (config.num_layers, config.max_tokens, config.hidden_size) == (6, 2048, 768)


def test_toml_with_overrides(tmp_path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('data = ["a.h5ad"]\npreset = "V1-10M"\nlearning_rate = 1e-3\n')
    config = scfm.PretrainConfig.from_file(file, ["learning_rate=3e-3", "out=elsewhere", "num_epochs=7"])
    assert (config.learning_rate, config.out, config.num_epochs) == (3e-3, "elsewhere", 7)
    assert (config.num_layers, config.hidden_size, config.ffn_size) == (6, 256, 512)


def test_a_budget_holds_cells_of_every_family() -> None:
    assert scfm.PretrainConfig().token_budget == 8192
    assert scfm.PretrainConfig(family="scbert").token_budget >= 16_907
    assert scfm.PretrainConfig(family="scfoundation").token_budget >= 19_266
    assert scfm.PretrainConfig(family="scbert", token_budget=500).token_budget == 500


def test_every_familys_defaults_make_a_shape() -> None:
    from scfm.train.model_shape import model_shape

    for family in ("geneformer", "scgpt", "scbert", "scfoundation"):
        config = scfm.PretrainConfig(family=family, num_layers=2)
        assert model_shape(config, 500).num_layers == 2


def test_what_a_resumed_run_may_change_is_not_its_identity() -> None:
    one = scfm.PretrainConfig(out="a", keep_last=5, device="cpu")
    assert one.identity() == scfm.PretrainConfig(out="b", max_minutes=3).identity()
    assert one.identity() != scfm.PretrainConfig(out="a", learning_rate=2e-3).identity()
