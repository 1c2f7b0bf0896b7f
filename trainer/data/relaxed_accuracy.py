"""Relaxed accuracy of one answer: the metric of ChartQA, as the public harnesses compute it.

Source of the rule: pix2struct `metrics.py` (`relaxed_correctness`), which lmms-eval and VLMEvalKit carry too;
the tolerance is that of Masry et al. 2022, "ChartQA", section 5.1. Its oddities are kept, because figures are
compared with published ones: "50%" does not answer "50", "1,000" is text, and a year may be 5 % off.
"""

import unicodedata

TOLERANCE = 0.05  # of the target's size


def correct(prediction: str, target: str) -> bool:
    """Say whether `prediction` answers `target` under the relaxed rule.

    Numbers may be 5 % off; all else, a target of zero included, must be the same text but for its case.
    White space around either side is dropped (VLMEvalKit drops it around the prediction) and both are taken in the
    Unicode form NFC, which is all that a Qwen2 tokenizer can produce. ChartQA's own labels are the same with and
    without either.
    """
    prediction, target = _normalized(prediction), _normalized(target)
    predicted, expected = _number(prediction), _number(target)
    if predicted is not None and expected:
        return abs(predicted - expected) / abs(expected) <= TOLERANCE
    return prediction.lower() == target.lower()


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _number(text: str) -> float | None:
    """What Python reads as a float; a trailing percent sign divides by 100. None for any other text."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
