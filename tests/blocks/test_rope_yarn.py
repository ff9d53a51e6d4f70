"""YaRN's frequencies and scales against transformers' and against the published models' numbers."""

import math

import pytest
import torch

from longcat_lab.blocks import RopeConfig, YarnConfig
from longcat_lab.blocks.rope.op import rope_frequencies, yarn_frequencies
from longcat_lab.config import ConfigError, load
from longcat_lab.model import build

DEEPSEEK = {"theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
LONGCAT = {"theta": 1e6, "factor": 120.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0, "beta_slow": 1.0}


def frequencies(settings, dim=64):
    names = ("theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    return yarn_frequencies(dim, *(settings[name] for name in names))


@pytest.mark.parametrize(
    "settings", [DEEPSEEK, LONGCAT, {**LONGCAT, "beta_fast": 4.0, "factor": 2.5}], ids=["deepseek", "longcat", "other"]
)
@pytest.mark.parametrize("mscales", [(1.0, 1.0), (1.0, 0.7)])
def test_frequencies_and_amplitude_are_those_of_transformers(settings, mscales):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    context = settings["original_max_position_embeddings"]
    parameters = {
        "rope_type": "yarn",
        "rope_theta": settings["theta"],
        "factor": settings["factor"],
        "original_max_position_embeddings": context,
        "beta_fast": settings["beta_fast"],
        "beta_slow": settings["beta_slow"],
        "mscale": mscales[0],
        "mscale_all_dim": mscales[1],
    }
    theirs = transformers.LlamaConfig(
        hidden_size=64 * 2, num_attention_heads=2, max_position_embeddings=int(context * settings["factor"]), rope_parameters=parameters
    )
    found, amplitude = rope_utils.ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
    torch.testing.assert_close(frequencies(settings), found.double(), rtol=1e-5, atol=1e-12)
    ours = YarnConfig(**settings, mscale=mscales[0], mscale_all_dim=mscales[1]).build(load("tiny").model.shape())
    assert ours.amplitude == pytest.approx(amplitude)


def test_scores_are_multiplied_as_in_the_published_models():
    """(0.1 ln factor + 1)^2: 1.874 for DeepSeek-V3.2's factor 40, 2.187 for LongCat-2.0's 120."""
    assert YarnConfig(**DEEPSEEK).attention_scale == pytest.approx(1.874, abs=5e-4)
    assert YarnConfig(**LONGCAT).attention_scale == pytest.approx(2.187, abs=5e-4)
    assert YarnConfig(**LONGCAT, mscale_all_dim=0.0).attention_scale == 1.0
    module = build(load("tiny", "model.rope.kind=yarn", "model.rope.factor=40")).layers[0].self_attn[0]
    assert module.softmax_scale == pytest.approx(16**-0.5 * (0.1 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize("settings", [DEEPSEEK, LONGCAT], ids=["deepseek", "longcat"])
def test_fast_pairs_are_kept_and_slow_ones_stretched(settings):
    plain, found = rope_frequencies(64, settings["theta"]), frequencies(settings)
    turns = settings["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept, stretched = turns > settings["beta_fast"] * 1.6, turns < settings["beta_slow"] / 1.6  # a pair's rounding aside
    assert kept.any() and stretched.any()
    assert torch.equal(found[kept], plain[kept])
    torch.testing.assert_close(found[stretched], plain[stretched] / settings["factor"])
    assert (found.diff() < 0).all() and (found <= plain).all() and (found >= plain / settings["factor"]).all()


def test_factor_one_is_plain_rope():
    shape, like = load("tiny").model.shape(), torch.zeros(1, dtype=torch.float64)
    yarn, plain = YarnConfig(**{**LONGCAT, "factor": 1.0}), RopeConfig(theta=1e6)
    torch.testing.assert_close(frequencies({**LONGCAT, "factor": 1.0}), rope_frequencies(64, 1e6))
    for a, b in zip(yarn.build(shape)(20, 16, like), plain.build(shape)(20, 16, like), strict=True):
        torch.testing.assert_close(a, b)
    assert yarn.attention_scale == plain.attention_scale == 1.0
    tokens = torch.randint(0, 512, (1, 12))
    with torch.no_grad():
        stretched = build(load("tiny", "model.rope.kind=yarn", "model.rope.factor=1"))(tokens)
        torch.testing.assert_close(stretched, build(load("tiny"))(tokens))


def test_positions_may_start_anywhere():
    module, like = YarnConfig(**DEEPSEEK).build(load("tiny").model.shape()), torch.zeros(1, dtype=torch.float64)
    whole, late = module(50, 64, like), module(20, 64, like, start=30)
    assert all(torch.equal(a[30:], b) for a, b in zip(whole, late, strict=True))


def test_turns_in_the_wrong_order_are_named():
    with pytest.raises(ConfigError, match=r"beta_slow is 40\.0, not below beta_fast 32\.0"):
        load("tiny", "model.rope.kind=yarn", "model.rope.beta_slow=40")
