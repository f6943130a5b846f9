"""Hugging Face's Trainer on the same cells, driven as Geneformer's pretrainer drives it: cells sorted into batches of
like length, padded to the longest of each, masked by its own collator, BertForMaskedLM with plain ("eager") attention,
logits of every position. Needs transformers, datasets and accelerate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scfm.models.geneformer.config import GeneformerConfig
from scfm.tokenize.dictionaries import GeneformerDictionaries


@dataclass
class StepClock:
    """seconds: from the beginning of the first optimiser step to the end of each, without setting up."""

    begun: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.begun = self.begun or time.perf_counter()

    def stop(self) -> None:
        self.seconds.append(time.perf_counter() - self.begun)


def hugging_face_trainer(
    transformers: Any,
    config: GeneformerConfig,
    vocab: GeneformerDictionaries,
    cells: list[list[int]],
    *,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    dtype: torch.dtype,
    folder: Path,
) -> tuple[Callable[[], Any], StepClock]:
    """One epoch over the cells, to be called; and its clock. dtype: bfloat16 is the Trainer's autocast.

    Attention probabilities are not dropped, as they are not on our side, which spares the peer that work.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    settings = {name: value for name, value in config.to_hf().items() if name != "architectures"}
    settings["attention_probs_dropout_prob"] = 0.0
    model = transformers.BertForMaskedLM._from_config(
        transformers.BertConfig(**settings), attn_implementation="eager"
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(dict(vocab.token), unk_token="<pad>")),
        pad_token="<pad>",
        mask_token="<mask>",
    )
    clock = StepClock()

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": cells, "length": [len(cell) for cell in cells]}),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.15),
        callbacks=[Clock()],
    )
    return trainer.train, clock
