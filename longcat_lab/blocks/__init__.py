"""Blocks of LongCat-class models, one folder each; importing this package registers the kinds that come with it.

A folder holds `config.py` (settings, cost), `module.py` (the nn.Module) and `op.py` (the reference operation that reads like
its equation, and a fast one of the same signature where it pays).
"""

from longcat_lab.blocks.bigram_lambda.config import BigramLambdaConfig
from longcat_lab.blocks.context import Cache, ForwardContext
from longcat_lab.blocks.decoder_layer.config import DecoderLayerConfig
from longcat_lab.blocks.engram.config import EngramConfig
from longcat_lab.blocks.hash_sum.config import HashSumConfig
from longcat_lab.blocks.interface import Block, BlockConfig, Budget, ModelShape, kinds, register, slot
from longcat_lab.blocks.mla.config import MLAConfig
from longcat_lab.blocks.moe.config import MoEConfig
from longcat_lab.blocks.mtp.config import MTPConfig
from longcat_lab.blocks.ngram_embedding.config import NgramEmbeddingConfig
from longcat_lab.blocks.ple.config import PLEConfig
from longcat_lab.blocks.ple_ffn.config import PLESwiGLUConfig, PLNESwiGLUConfig
from longcat_lab.blocks.rms_norm.config import RMSNormConfig
from longcat_lab.blocks.rope.config import RopeConfig, YarnConfig
from longcat_lab.blocks.scmoe.config import ScMoELayerConfig
from longcat_lab.blocks.serial_layer.config import SerialLayerConfig
from longcat_lab.blocks.sparse_attention.config import DSAConfig, LSAConfig
from longcat_lab.blocks.swiglu.config import SwiGLUConfig
from longcat_lab.blocks.token_embedding.config import TokenEmbeddingConfig

__all__ = [
    "BigramLambdaConfig",
    "Block",
    "BlockConfig",
    "Budget",
    "Cache",
    "DSAConfig",
    "DecoderLayerConfig",
    "EngramConfig",
    "ForwardContext",
    "HashSumConfig",
    "LSAConfig",
    "MLAConfig",
    "MTPConfig",
    "MoEConfig",
    "ModelShape",
    "NgramEmbeddingConfig",
    "PLEConfig",
    "PLESwiGLUConfig",
    "PLNESwiGLUConfig",
    "RMSNormConfig",
    "RopeConfig",
    "ScMoELayerConfig",
    "SerialLayerConfig",
    "SwiGLUConfig",
    "TokenEmbeddingConfig",
    "YarnConfig",
    "kinds",
    "register",
    "slot",
]
