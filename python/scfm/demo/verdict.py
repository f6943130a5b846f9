"""The demo's last paragraph: what the numbers say, in plain words, and what a larger model is for.

Which sentence stands is decided by the numbers of this run. A loss is said first.
"""

from __future__ import annotations

from scfm.demo.scores import ALL_LOSS, HIDDEN_LOSS, KNN_ACCURACY, NMI, OURS, RANDOM
from scfm.evaluate import Report, verdict

__all__ = ["plain_verdict", "zero_shot_verdict"]

PCA = "PCA-50"
STRONGEST_COUNT = "neighbour-bigram"
PURPOSE = (
    "What a larger one is for: the same training on millions of cells of many tissues, so that one model "
    "serves data it was never fitted to, predicts hidden genes and simulated knock-outs, and can be "
    "fine-tuned with few labels; PCA does none of these. Size alone promises nothing: published evaluations "
    "found released models below PCA or scVI on some data sets too, so compare on yours, with these "
    "baselines beside it."
)
ZERO_SHOT_PURPOSE = (
    "PCA had to be fitted to cells of this set and its coordinates are good for this set only; a pretrained model "
    "puts cells of any data set into one space. Where that is not needed, PCA is simpler. Compare on your own data, "
    "with these baselines beside it."
)


def plain_verdict(masked: Report, embedding: Report, *, num_parameters: int) -> str:
    """Paragraphs of plain text computed from both reports."""
    subject = f"A model this small ({num_parameters:,} parameters, {embedding.num_train:,} training cells)"
    parts = [
        _embedding_sentence(embedding, subject),
        _learning_sentence(masked, embedding),
        verdict(embedding, KNN_ACCURACY.name),
        verdict(embedding, NMI.name),
        verdict(masked, HIDDEN_LOSS.name),
        PURPOSE,
    ]
    return "\n\n".join(parts)


def zero_shot_verdict(embedding: Report, *, num_parameters: int) -> str:
    """The same of a model that was trained on other cells: a loss to PCA, which was fitted to these, is said first."""
    subject = f"{embedding.ours.name} ({num_parameters:,} parameters, trained on other cells)"
    over_random = embedding.gains[RANDOM, KNN_ACCURACY.name]
    learned = (
        f"What it learned there serves here: kNN accuracy is {over_random.estimate:.3f} above random weights."
        if over_random.low > 0
        else f"What it learned there does not show here: kNN accuracy is {over_random.estimate:+.3f} of that of "
        "random weights, which is not clearly different from none."
        if over_random.high >= 0
        else f"What it learned there does harm here: kNN accuracy is {-over_random.estimate:.3f} below random weights."
    )
    parts = [
        _embedding_sentence(embedding, subject),
        learned,
        verdict(embedding, KNN_ACCURACY.name),
        verdict(embedding, NMI.name),
        ZERO_SHOT_PURPOSE,
    ]
    return "\n\n".join(parts)


def _embedding_sentence(report: Report, size: str) -> str:
    """Against PCA on each score: loses, wins, or neither."""
    pca = next(row for row in report.rows if row.name == PCA)
    gains = {m.name: m.gain(report.ours.values[m.name], pca.values[m.name]) for m in report.metrics}
    behind = [name for name, gain in gains.items() if gain < 0]
    ahead = [name for name, gain in gains.items() if gain > 0]
    knn = report.gains[PCA, KNN_ACCURACY.name]
    ours, theirs = report.ours.values[KNN_ACCURACY.name], pca.values[KNN_ACCURACY.name]
    numbers = f"kNN accuracy {ours:.3f} against {theirs:.3f}"
    noise = f"a difference that {report.num_test:,} test cells cannot tell from none"
    if knn.high < 0 or (behind and not ahead):
        sentence = f"{size} loses to PCA here: {numbers}{'' if knn.high < 0 else f', {noise}'}"
        return (
            f"{sentence}; ahead only on {_and(ahead)}." if ahead else f"{sentence}; it is ahead on no score."
        )
    if knn.low > 0 or (ahead and not behind):
        sentence = f"{size} is ahead of PCA here: {numbers}{'' if knn.low > 0 else f', {noise}'}"
        sentence += f"; behind on {_and(behind)}." if behind else "."
        return f"{sentence} On {report.num_test:,} test cells of one donor that proves little."
    if not ahead:
        return f"{size} is level with PCA here: {numbers}."
    return f"{size} does not beat PCA here: {numbers}, {noise}; ahead on {_and(ahead)}, behind on {_and(behind)}."


def _learning_sentence(masked: Report, embedding: Report) -> str:
    """Did training do anything, and does the model know more than counted neighbours?"""
    over_random = masked.gains[RANDOM, ALL_LOSS.name]
    over_count = masked.gains[STRONGEST_COUNT, HIDDEN_LOSS.name]
    knn_over_random = embedding.gains[RANDOM, KNN_ACCURACY.name]
    learned = (
        f"Training did teach it: held-out loss is {over_random.estimate:.2f} nats below random weights"
        if over_random.low > 0
        else "Training taught it nothing: held-out loss is "
        f"{over_random.estimate:+.2f} nats better than random weights"
    )
    labels = (
        f", and its neighbours agree with labels better ({knn_over_random.estimate:+.3f} kNN accuracy)."
        if knn_over_random.low > 0
        else f", but its neighbours agree with labels not clearly better than those of random weights "
        f"({knn_over_random.estimate:+.3f} kNN accuracy)."
    )
    if over_count.low > 0:
        count = (
            f" It predicts hidden genes better than counted neighbours, by {over_count.estimate:.2f} nats."
        )
    elif over_count.high < 0:
        count = (
            f" Yet counting which genes stand next to each other predicts hidden genes better than {OURS}, "
            f"by {-over_count.estimate:.2f} nats."
        )
    else:
        count = " It predicts hidden genes about as well as counting which genes stand next to each other."
    return learned + labels + count


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
