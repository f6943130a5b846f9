"""Every head of every scGPT variant equals the authors' on random weights, in both readings of padding."""

from __future__ import annotations

import pytest

from models.scgpt_goldens import PaddedBatch, close, forward, load

pytestmark = pytest.mark.golden
VARIANTS = [
    "B_dab_dsbn_batch_zero",
    "C_avgpool_batch_bn",
    "D_wpool_zero",
    "E_category",
    "F_scaling",
    "G_mvc_detach",
    "K_multiomic_mod",
    "K_multiomic_mod_batch",
]
CHECKPOINTS = ["ckpt_released_flash_keys", "ckpt_plain_keys", "ckpt_impl_keys"]
HEADS = {
    "mlm_output": "expression",
    "mlm_zero_probs": "zero_probabilities",
    "mvc_output": "mvc",
    "mvc_zero_probs": "mvc_zero_probabilities",
    "cell_emb": "cell_embeddings",
    "cls_output": "cls",
    "dab_output": "batch_logits",
}


def check_heads(out, batch: PaddedBatch, tag: str) -> None:
    for theirs, ours in HEADS.items():
        name = f"{tag}.{theirs}"
        if name in batch:
            want = batch[name]
            close(
                getattr(out, ours),
                want[batch.tokens] if want.dim() == 2 and want.shape == batch.tokens.shape else want,
            )


@pytest.mark.parametrize("tag", ["slow", "fast"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(goldens, variant: str, tag: str) -> None:
    batch = PaddedBatch.read(goldens("scgpt") / f"{variant}.npz")
    out = forward(load(goldens("scgpt") / variant), batch, tag)
    check_heads(out, batch, tag)
    if f"{tag}.encode" in batch:
        close(batch.spread(out.hidden, out.padding.hidden), batch[f"{tag}.encode"])


@pytest.mark.parametrize("tag", ["slow", "fast", "flashemu"])
@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_released(goldens, layout: str, tag: str) -> None:
    batch = PaddedBatch.read(goldens("scgpt") / "A_released.npz")
    model = load(goldens("scgpt") / layout)
    if model.cls_decoder is None:
        del batch.stored[f"{tag}.cls_output"]
    out = forward(model, batch, tag, output_hidden_states=True)
    check_heads(out, batch, tag)
    close(batch.spread(out.hidden, out.padding.hidden), batch[f"{tag}.encode"])
    if tag == "slow":
        for i, (hidden, padding) in enumerate(zip(out.hidden_states, out.padding_states, strict=True)):
            close(batch.spread(hidden, padding), batch["hidden_states_slow"][i])
