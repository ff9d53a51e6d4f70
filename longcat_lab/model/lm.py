"""LongcatLM on one page.

tokens [B, T] -> embedding (with n-gram tables beside it, if any)            [B, T, H]
              -> num_layers shortcut layers: 2 x (MLA, dense FFN), 1 mixture  [B, T, H]
              -> RMSNorm -> untied head                                       [B, T, V] logits

What is unusual against a plain transformer: a layer holds two attentions and two dense networks around one mixture whose
result joins at its end; some experts compute nothing; the input embedding may look tokens up by their predecessors too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longcat_lab.blocks.mla.op import causal_document_mask
from longcat_lab.config.model import ModelConfig
from longcat_lab.config.run import RunConfig
from longcat_lab.errors import LabError
from longcat_lab.model.initialise import initialise


class LongcatLM(nn.Module):
    """A causal language model of LongCat's blocks. Parameter names follow the published checkpoints where those have one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.shape()
        self.config = config
        self.embed_tokens = config.embedding.build(shape)
        self.rope = config.rope.build(shape)
        self.layers = nn.ModuleList(config.layer.build(shape) for _ in range(config.num_layers))
        self.norm = config.norm.build(shape)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 [B, T], T at most max_position_embeddings.
            document_ids: int64 [B, T], equal inside a document: attention and n-grams do not cross from one to the next.
                None takes each row for one document.

        Returns:
            [B, T, vocab_size], before any softmax.
        """
        x = self.embed_tokens(tokens, document_ids)
        mask = None if document_ids is None else causal_document_mask(document_ids)
        rope = self.rope(tokens.shape[1], self.config.attention.qk_rope_head_dim, like=x)
        for layer in self.layers:
            x = layer(x, rope, mask)
        return self.lm_head(self.norm(x))


def build(config: RunConfig | ModelConfig, seed: int | None = None) -> LongcatLM:
    """The model with its initial weights; under `torch.device("meta")` without any.

    Args:
        config: a run (whose own seed serves) or a model.
        seed: of the initial weights; 0 where neither says.

    Raises:
        LabError: it does not fit into memory.
    """
    model_config = config.model if isinstance(config, RunConfig) else config
    if seed is None:
        seed = config.seed if isinstance(config, RunConfig) else 0
    with torch.no_grad():
        try:
            model = LongcatLM(model_config)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "alloc" not in str(error) and "overflow" not in str(error):
                raise
            raise LabError(
                "The model does not fit into this machine's memory: `longcat-lab budget` shows which part to make smaller."
            ) from None
        if not next(model.parameters()).is_meta:
            initialise(model, model_config.initializer_range, seed)
    return model
