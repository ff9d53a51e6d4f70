"""A dense feed-forward network with squared ReLU: a block's configuration, what it costs, and its module."""

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import nn

import longcat_lab as lab


class SquaredRelu(lab.Block):
    def __init__(self, hidden, inner):
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


@lab.register("ffn")
class SquaredReluConfig(lab.BlockConfig):
    kind: Literal["squared_relu"] = "squared_relu"
    ffn_hidden_size: int = Field(256, ge=1, description="inner width")

    def budget(self, shape):
        return lab.Budget.of_weights(2 * shape.hidden_size * self.ffn_hidden_size)

    def build(self, shape):
        return SquaredRelu(shape.hidden_size, self.ffn_hidden_size)
