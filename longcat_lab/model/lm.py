"""LongcatLM on one page.

tokens [B, T] -> embedding (with n-gram tables beside it, if any)            [B, T, H]
              -> num_layers shortcut layers: 2 x (MLA, dense FFN), 1 mixture  [B, T, H]
              -> RMSNorm -> untied head                                       [B, T, V] logits of token t + 1
              -> MTP, if any: D steps of [embedding of token t + k ; hidden]  [B, T, V] logits of token t + k + 1

What is unusual against a plain transformer: a layer holds two attentions and two dense networks around one mixture whose
result joins at its end; some experts compute nothing; the input embedding may look tokens up by their predecessors too; one
block may be applied several times to predict several tokens ahead. (Other kinds of layer: `serial`, `decoder`.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longcat_lab.blocks import Cache, ForwardContext
from longcat_lab.blocks.context import Part, document_starts, taken
from longcat_lab.blocks.loss_op import Vocabulary
from longcat_lab.blocks.token_embedding.module import check_tokens
from longcat_lab.config.model import ModelConfig
from longcat_lab.config.run import RunConfig
from longcat_lab.errors import LabError
from longcat_lab.model.initialise import initialise
from longcat_lab.model.memory import check_model


class LongcatLM(nn.Module):
    """A causal language model of LongCat's blocks. Parameter names follow the published checkpoints where those have one.

    recompute: layers keep their input alone and run again in backward (less memory, a third more work); not part of the weights.
    stage: the layers that run here; those of other pipeline stages are not built. part: which positions of its rows run here.
    vocabulary: where others hold the other rows of the head.
    """

    recompute = False
    part: Part | None = None
    vocabulary: Vocabulary | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.shape()
        self.config = config
        self.embed_tokens = config.embedding.build(shape)
        self.rope = config.rope.build(shape)
        self.layers = nn.ModuleList(config.layer.build(replace(shape, layer_index=i)) for i in range(config.num_layers))
        self.stage = range(config.num_layers)
        self.norm = config.norm.build(shape)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = config.mtp.build(shape) if config.mtp is not None else None

    def context(
        self,
        like: Tensor,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        cache: Cache | None = None,
        share: float = 1.0,
    ) -> ForwardContext:
        """What the layers of one pass share, for hidden states [B, T, H] of the dtype and on the device of `like` (of a part of the rows,
        where one runs here; the other arguments are of whole rows).
        """
        part, start = self.part, cache.length if cache is not None else 0
        length = like.shape[1] if part is None else part.length
        first = None if document_ids is None else taken(document_starts(document_ids), part)
        rope = self.rope(length, self.config.attention.qk_rope_head_dim, like, start)
        if part is None:
            return ForwardContext(rope, first, padding, share, cache)
        real = None if padding is None else 1 - padding.double().mean()
        padding = None if padding is None else part.take(padding)
        return ForwardContext(tuple(part.take(each, 0) for each in rope), first, padding, share, cache, part=part, real=real)

    def hidden(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        cache: Cache | None = None,
        share: float = 1.0,
        x: Tensor | None = None,
    ) -> Tensor:
        """The last layer's output [B, T, H], before the final norm; of a part of the rows [B, here, H], where one runs here.

        Args:
            tokens: int64 [B, T], T at most max_position_embeddings.
            document_ids: int64 [B, T], equal inside a document: attention does not cross from one to the next, nor do n-grams
                unless their `boundary` says so.
                None takes each row for one document.
            padding: bool [B, T], True where there is no token: nothing is routed to a real expert or counted there.
            cache: of the tokens before these (one document a row); it takes these in.
            share: of the global batch's tokens that are here (weighs the layers' own losses).
            x: what the pipeline stage before this one returned; None where the embedding is here.
        """
        history = None if cache is None else cache.tokens
        if x is None:
            x = self.embed_tokens(tokens, document_ids, history, **({} if self.part is None else {"part": self.part}))
        context = self.context(x, document_ids, padding, cache, share)
        context.tokens, context.document_ids, context.history, context.embedded = tokens, document_ids, history, x
        enter = getattr(self.embed_tokens, "enter", lambda point, x, context: x)
        for point in self.stage:
            layer, x = self.layers[point], enter(point, x, context)  # n-gram kinds add to the residual stream here
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
        if self.stage.stop == len(self.layers):
            x = enter(self.stage.stop, x, context)
        if cache is not None:
            cache.advance(tokens)
        return x

    def forward(self, tokens: Tensor, document_ids: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab_size] of the next token, before any softmax; arguments as in `hidden`.

        Raises:
            LabError: a token is outside the vocabulary.
        """
        check_tokens(tokens, self.config.vocab_size)
        return self.lm_head(self.norm(self.hidden(tokens, document_ids, padding)))

    def ahead(
        self,
        hidden: Tensor,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        padding: Tensor | None = None,
        share: float = 1.0,
    ) -> list[Tensor]:
        """The prediction steps' states, each [B, T, H] and normed for the head; `hidden` is what `hidden()` returned for `tokens`."""
        start = hidden if self.config.mtp.hidden == "raw" else self.norm(hidden)
        shared: dict[str, object] = {}

        def context() -> ForwardContext:
            made = self.context(hidden, document_ids, padding, share=share)
            made.shared = shared  # a later step may use what an earlier one selected
            return made

        return self.mtp(start, tokens, self.embed_tokens, context)


def build(config: RunConfig | ModelConfig, seed: int | None = None) -> LongcatLM:
    """The model with its initial weights; under `torch.device("meta")` without any.

    Args:
        config: a run (whose own seed serves) or a model.
        seed: of the initial weights; 0 where neither says.

    Raises:
        LabError: it does not fit into memory (how much it takes, how much is free, what would fit).
    """
    model_config = config.model if isinstance(config, RunConfig) else config
    if seed is None:
        seed = config.seed if isinstance(config, RunConfig) else 0
    check_model(lambda: LongcatLM(model_config))
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
            initialise(model, model_config.initializer_range, seed, model_config.width_scale)
    return model
