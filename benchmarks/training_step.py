"""One training step (forward, backward, optimizer) of a LongCat-Flash-shaped proxy against transformers' model of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Row, compare
from longcat_lab.blocks.loss_op import Scored, cross_entropies
from longcat_lab.config import load
from longcat_lab.model import LongcatLM, build

SEQUENCES, LENGTH, VOCABULARY = 4, 512, 8192
# Flash's proportions at hidden 256: two attentions and two dense networks of twice the hidden size a layer, 512 + 256 experts to 32 + 16.
ATTENTION = {
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-16, "weight_decay": 0.1, "fused": True}  # the same for both


def ours(expert_width: int) -> tuple[LongcatLM, Callable[[Tensor], None]]:
    """Our model and its training step on tokens [B, T + 1]."""
    settings = {
        "hidden_size": 256,
        "num_layers": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "initializer_range": 0.02,
        "attention": ATTENTION,
        "ffn": {"ffn_hidden_size": 512},
        "moe": {"n_routed_experts": 32, "zero_expert_num": 16, "moe_topk": 4, "expert_ffn_hidden_size": expert_width},
    }
    model = build(load({"model": settings, "data": {"sequence_length": LENGTH}})).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(tokens: Tensor) -> None:
        hidden = model.norm(model.hidden(tokens[:, :-1]))
        labels = tokens[:, 1:].contiguous()
        total, _ = cross_entropies([Scored(hidden, labels, 1 / labels.numel())], model.lm_head.weight)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def peer(expert_width: int) -> tuple[torch.nn.Module, Callable[[Tensor], None]]:
    """transformers' LongcatFlashForCausalLM of the same shape and its training step, with its own loss."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    config = LongcatFlashConfig(
        **ATTENTION,
        hidden_size=256,
        num_layers=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        ffn_hidden_size=512,
        head_dim=ATTENTION["qk_rope_head_dim"],
        n_routed_experts=32,
        zero_expert_num=16,
        moe_topk=4,
        expert_ffn_hidden_size=expert_width,
        routed_scaling_factor=6.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LongcatFlashForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(tokens: Tensor) -> None:
        inputs = tokens[:, :-1].contiguous()
        model(input_ids=inputs, labels=inputs).loss.backward()  # it shifts the labels itself
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def training_step() -> Iterator[Row]:
    """Tokens a second of both are the inverse of these times: a ratio of 0.33 is three times the tokens a second. Two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for width in (128, 512):
            (_, mine), (_, theirs) = ours(width), peer(width)
            tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1))
            yield compare(
                f"step/FFN {width}",
                ("longcat_lab", lambda mine=mine, tokens=tokens: mine(tokens)),
                ("transformers", lambda theirs=theirs, tokens=tokens: theirs(tokens)),
                pairs=7,
            )
    finally:
        torch.set_num_threads(threads)
