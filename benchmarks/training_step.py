"""One training step (forward, backward, optimizer) of a LongCat-Flash-shaped proxy against transformers' model of the same shape."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Row, compare
from longcat_lab.blocks.loss_op import Scored, cross_entropies
from longcat_lab.config import RunConfig, load
from longcat_lab.model import build
from longcat_lab.training.mechanisms import after_step

# The same optimizer for both.
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-16, "weight_decay": 0.1, "fused": True}


def proxy(expert_width: int) -> RunConfig:
    return load("flash-proxy", f"model.moe.expert_ffn_hidden_size={expert_width}")


def ours(config: RunConfig) -> Callable[[Tensor], None]:
    """Our training step on tokens [B, T + 1]: the next token's loss, as `fit` computes it."""
    model = build(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(tokens: Tensor) -> None:
        hidden = model.norm(model.hidden(tokens[:, :-1]))
        labels = tokens[:, 1:].contiguous()
        total, _ = cross_entropies([Scored(hidden, labels, 1 / labels.numel())], model.lm_head.weight)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(model)

    return step


def peer(config: RunConfig) -> Callable[[Tensor], None]:
    """The training step of transformers' LongcatFlashForCausalLM of the same shape, with its own loss."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    model_config, attention, moe = config.model, config.model.attention, config.model.moe
    shared = ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    mixture = ("n_routed_experts", "zero_expert_num", "moe_topk", "expert_ffn_hidden_size", "routed_scaling_factor")
    model = LongcatFlashForCausalLM(
        LongcatFlashConfig(
            **{name: getattr(attention, name) for name in shared},
            **{name: getattr(moe, name) for name in mixture},
            hidden_size=model_config.hidden_size,
            num_layers=model_config.num_layers,
            vocab_size=model_config.vocab_size,
            max_position_embeddings=model_config.max_position_embeddings,
            ffn_hidden_size=model_config.ffn.ffn_hidden_size,
            head_dim=attention.qk_rope_head_dim,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(tokens: Tensor) -> None:
        inputs = tokens[:, :-1].contiguous()
        model(input_ids=inputs, labels=inputs).loss.backward()  # it shifts the labels itself
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_step() -> Iterator[Row]:
    """Tokens a second are the inverse of these times: a ratio of 0.33 is three times the tokens a second. One thread and two."""
    threads = torch.get_num_threads()
    try:
        for width in (128, 512):
            config = proxy(width)
            mine, theirs = ours(config), peer(config)
            tokens = torch.randint(0, config.model.vocab_size, (config.data.batch_size, config.data.sequence_length + 1))
            for count in (1, 2)[: os.cpu_count()]:
                torch.set_num_threads(count)
                yield compare(
                    f"step/{width}/{count}",
                    ("longcat_lab", lambda mine=mine, tokens=tokens: mine(tokens)),
                    ("transformers", lambda theirs=theirs, tokens=tokens: theirs(tokens)),
                    pairs=7,
                )
    finally:
        torch.set_num_threads(threads)
