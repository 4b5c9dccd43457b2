"""What stands on the decoder: the LM head, the two classifiers and the span head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.config import HeadKind
from model.linear import Weight, linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """One linear map from hidden states to scores.

    | kind | rows to pass | outputs |
    |---|---|---|
    | causal_lm | where a token is drawn | V logits |
    | sequence_classification | the last token of each sequence that isn't padding | one per label |
    | token_classification | every token | one per label |
    | question_answering | every token | start, end of the answer |
    """

    kind: HeadKind
    weight: Weight
    """[outputs, H]."""
    bias: Tensor | None

    def forward(self, hidden_RH: Tensor) -> Tensor:
        """-> float32 [R, outputs], no softmax."""
        return linear(hidden_RH, self.weight, self.bias)
