from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from longcat_lab.blocks.context import ForwardContext
from longcat_lab.blocks.interface import Block, ModelShape
from longcat_lab.blocks.ngram_embedding.op import fuse
from longcat_lab.blocks.ngram_embedding.tables import HashedTables
from longcat_lab.blocks.swiglu.op import silu_gated
from longcat_lab.blocks.table import Table

if TYPE_CHECKING:
    from longcat_lab.blocks.ple_ffn.config import PLNESwiGLUConfig


class LookupSwiGLU(Block):
    """y = W_d (SiLU(W_g x) * u) with u looked up by the tokens. x [B, T, H] to [B, T, H]; names as in SwiGLU, so that arms stay paired."""

    reads_context = True

    def __init__(self, shape: ModelShape, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, shape.hidden_size, bias=False)
        # What an up-projection of an input of RMS 1 starts with: sqrt(H) products with weights of initializer_range.
        self.up_rms = shape.initializer_range * shape.hidden_size**0.5

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        return self.down_proj(silu_gated(self.gate_proj(x), self.looked_up(context)))

    def looked_up(self, context: ForwardContext) -> Tensor:
        """u [B, T, F] of the tokens of this pass."""
        raise NotImplementedError


class PLESwiGLU(LookupSwiGLU):
    """u = E_l[t]: one row of the inner width F for each token."""

    def __init__(self, shape: ModelShape, ffn_hidden_size: int) -> None:
        super().__init__(shape, ffn_hidden_size)
        self.token_rows = Table(shape.vocab_size, ffn_hidden_size, self.up_rms)

    def looked_up(self, context: ForwardContext) -> Tensor:
        return self.token_rows.read(context.tokens)


class PLNESwiGLU(LookupSwiGLU):
    """u = W_u concat(rows), hashed rows of its own tables; with token_rows (E_0[t] + W_u concat(rows)) / (E + 1).

    Either way u starts with the RMS that an up-projection's output starts with.
    """

    def __init__(self, config: PLNESwiGLUConfig, shape: ModelShape) -> None:
        super().__init__(shape, config.ffn_hidden_size)
        width, tables = config.width(shape), config.tables
        # The mean's E + 1 branches start alike, each sqrt(E + 1) times what comes out.
        std = self.up_rms * (tables + 1) ** 0.5 if config.token_rows else self.up_rms
        self.up_std = (width if config.token_rows else tables * width) ** -0.5
        self.scale = 1 / (tables + 1)
        # Another draw of the hash (where it draws anything) for each dense network; `attention_index` numbers the two of a shortcut layer.
        salt = max(shape.attention_index, 2 * shape.layer_index)
        self.tables = HashedTables(config, shape.vocab_size, width, std, salt)
        self.token_rows = Table(shape.vocab_size, config.ffn_hidden_size, std) if config.token_rows else None
        self.up_proj = nn.Linear(tables * width, config.ffn_hidden_size, bias=False)

    def initial_std(self) -> dict[str, float]:
        return {"up_proj.weight": self.up_std}

    def looked_up(self, context: ForwardContext) -> Tensor:
        read = self.tables.read(self.tables.addresses.of(context))
        if self.token_rows is None:
            return self.up_proj(read.flatten(-2))
        return fuse(self.token_rows.read(context.tokens), read, self.up_proj.weight, self.scale, self.scale)
