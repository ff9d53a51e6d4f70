"""Dense networks whose up-projection is looked up: by the token (PLE) or by its n-grams (PLNE)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from longcat_lab.blocks.interface import BlockConfig, Budget, ModelShape, register
from longcat_lab.blocks.ngram_embedding.config import check_layers
from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings
from longcat_lab.blocks.ple_ffn.module import PLESwiGLU, PLNESwiGLU
from longcat_lab.blocks.swiglu.config import SwiGLUConfig
from longcat_lab.node import ConfigError

INNER = "inner width of the dense feed-forward network"
LAYERS = "layers whose dense networks look up; the others are plain SwiGLU. Empty: all"


class LookupSettings(BlockConfig):
    """What both kinds share: the inner width, and in which layers they stand."""

    where: ClassVar[str] = "model.ffn"
    ffn_hidden_size: int = Field(256, ge=1, description=INNER)
    injection_layers: list[int] | None = Field(None, description=LAYERS)

    def plain(self) -> SwiGLUConfig:
        """The network of other layers and of the prediction steps."""
        return SwiGLUConfig(ffn_hidden_size=self.ffn_hidden_size)

    def looks_up(self, shape: ModelShape) -> bool:
        """Whether the layer at `shape.layer_index` is one of `injection_layers`."""
        return self.injection_layers is None or shape.layer_index in self.injection_layers

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.injection_layers is not None:
            check_layers(self.injection_layers, shape, self.where, first=0)
        dense = getattr(shape.layer, "first_k_dense_replace", shape.num_layers)  # of `decoder`: later layers have a mixture in its place
        if dense == 0 or (self.injection_layers or [0])[-1] >= dense:
            raise ConfigError(
                f"{self.where}: {self.kind} stands in the dense networks, and layers from {dense} on have none: raise "
                "model.layer.first_k_dense_replace, or name lower layers in injection_layers."
            )

    def budget(self, shape: ModelShape) -> Budget:
        return self.lookup_budget(shape) if self.looks_up(shape) else self.plain().budget(shape)

    def build(self, shape: ModelShape) -> nn.Module:
        return self.lookup(shape) if self.looks_up(shape) else self.plain().build(shape)

    def lookup_budget(self, shape: ModelShape) -> Budget:
        raise NotImplementedError

    def lookup(self, shape: ModelShape) -> nn.Module:
        raise NotImplementedError


@register("ffn")
class PLESwiGLUConfig(LookupSettings):
    """y = W_d (SiLU(W_g x) * E_l[t]): a row of each layer's own table, one for each token, in place of the up-projection.

    Source: STEM (arXiv 2601.10639); LongCat-Flash-Lite (arXiv 2601.21204) section 5.1, where it is called PLE.
    """

    kind: Literal["ple_swiglu"] = "ple_swiglu"

    def lookup_budget(self, shape: ModelShape) -> Budget:
        rows = Budget(params=shape.vocab_size * self.ffn_hidden_size)  # looked up, not multiplied
        return rows + Budget.of_weights(2 * shape.hidden_size * self.ffn_hidden_size)

    def lookup(self, shape: ModelShape) -> PLESwiGLU:
        return PLESwiGLU(shape, self.ffn_hidden_size)


@register("ffn")
class PLNESwiGLUConfig(LookupSettings, HashSettings):
    """y = W_d (SiLU(W_g x) * W_u concat(rows)): hashed n-gram rows of each network's own tables in place of its input's up-projection.

    With token_rows the n-gram embedding takes the place: (E_0[t] + sum_i W_i r_i) / (E + 1).
    Source: LongCat-Flash-Lite (arXiv 2601.21204) section 5.1, per-layer n-gram embedding; its eq. 3 for token_rows.
    """

    kind: Literal["plne_swiglu"] = "plne_swiglu"
    where: ClassVar[str] = "model.ffn"
    token_rows: bool = Field(False, description="a row of the inner width for each token too, and the mean of it and the projected rows")

    def lookup_budget(self, shape: ModelShape) -> Budget:
        rows = self.table_params(shape) + shape.vocab_size * self.ffn_hidden_size * self.token_rows
        weights = self.tables * self.width(shape) + 2 * shape.hidden_size
        return Budget(params=rows) + Budget.of_weights(weights * self.ffn_hidden_size)

    def lookup(self, shape: ModelShape) -> PLNESwiGLU:
        return PLNESwiGLU(self, shape)
