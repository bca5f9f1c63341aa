"""Masks of scores in front of a softmax: minus infinity, or as good as that, as a number that has few bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tacit.capture import Capture

# What stands for minus infinity before a softmax: exp of it is 0, beside scores of up to some hundreds.
MASKED = -512.0
_NO_SCORE = -1e6


def finite(graph: Capture, value: Any) -> Any:
    """A number that masks scores of a softmax, minus infinity or as good as that, as one that has few bits.

    So are the numbers of a constant that is added to the scores.
    """
    if isinstance(value, str):
        if not graph.is_weight(value) or not graph.before_softmax():
            return value
        given = graph.value(value)
        hides = given.is_floating_point() and bool((given <= _NO_SCORE).any())
        return graph.constant("score_mask", torch.where(given <= _NO_SCORE, MASKED, given)) if hides else value
    masks = isinstance(value, (int, float)) and value <= _NO_SCORE and graph.before_softmax()
    return MASKED if masks else value
