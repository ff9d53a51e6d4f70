"""Checkpoints of published models, both ways: config.json and safetensors in LongCat's or DeepSeek's names."""

from longcat_lab.model.pretrained.read import from_pretrained
from longcat_lab.model.pretrained.write import save_pretrained

__all__ = ["from_pretrained", "save_pretrained"]
