from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext, Part, taken
from longcat_lab.blocks.interface import Block
from longcat_lab.errors import LabError


class TokenEmbedding(Block):
    """One row a token. tokens int64 [B, T] to [B, T, H] (of a part of the rows: [B, here, H]); document ids and history are not needed.

    n-gram kinds are token embeddings that read more; some of them also, or only, `enter` the residual stream at layers.

    whole_rows: it needs all positions of a row in one place.
    """

    whole_rows = False
    roles: ClassVar[dict[str, str]] = {"weight": "embedding"}

    def __init__(self, vocab_size: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.std = std

    def initial_std(self) -> dict[str, float]:
        return {"weight": self.std}

    def forward(
        self, tokens: Tensor, document_ids: Tensor | None = None, history: Tensor | None = None, part: Part | None = None
    ) -> Tensor:
        tokens = taken(tokens, part)
        if tokens.device.type == "cpu":  # elsewhere it would wait for the device; LongcatLM.forward and the loader ask for those
            check_tokens(tokens, len(self.weight))
        return nn.functional.embedding(tokens, self.weight)

    def enter(self, point: int, x: Tensor, context: ForwardContext) -> Tensor:
        """The residual stream x [B, T, H] before layer `point`; behind the last layer `point` is the number of layers."""
        return x


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises LabError where an id is not in the vocabulary."""
    if tokens.numel() and not torch.compiler.is_compiling():
        lowest, highest = (int(each) for each in torch.aminmax(tokens))
        if lowest < 0 or highest >= vocab_size:
            raise LabError(
                f"Token id {lowest if lowest < 0 else highest} is outside the vocabulary of {vocab_size} (model.vocab_size): "
                "encode the text with the tokenizer that the model was built for, or raise model.vocab_size."
            )
