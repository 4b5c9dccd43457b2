"""What stands on the decoder: the LM head, the two classifiers and the span head."""

from __future__ import annotations

from collections.abc import Sequence
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
    pad_token_id: int | None = None
    """Of sequence classification, where the checkpoint names one: texts are not classified by this token."""

    def classified_part(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The tokens up to the last that isn't padding, or the first token of nothing but padding.

        The rightmost one counts, as in transformers' `GenericForSequenceClassification`; attention is causal, so what
        follows it can be left out.
        """
        end = len(token_ids)
        while self.pad_token_id is not None and end > 1 and token_ids[end - 1] == self.pad_token_id:
            end -= 1
        return token_ids[:end]

    def forward(self, hidden_RH: Tensor) -> Tensor:
        """-> float32 [R, outputs], no softmax."""
        return linear(hidden_RH, self.weight, self.bias)
