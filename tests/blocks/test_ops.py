"""Every operation against its equation, a second implementation, or torch's own, in float64 on fresh random inputs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from longcat_lab.blocks.mla.op import attention, attention_reference, causal_document_mask
from longcat_lab.blocks.rms_norm.op import rms_norm, rms_norm_reference
from longcat_lab.blocks.rope.op import rope_angles, rotate, rotate_pairs, rotate_reference
from longcat_lab.blocks.swiglu.op import swiglu_reference


def doubles(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def test_rms_norm_fast_equals_reference():
    x, w = doubles(5, 7, 16), doubles(16)
    torch.testing.assert_close(rms_norm(x, w, 1e-5), rms_norm_reference(x, w, 1e-5), rtol=1e-12, atol=1e-12)


def test_rms_norm_gives_unit_mean_square_and_keeps_bf16():
    x = 50 * doubles(3, 1024)
    assert rms_norm(x, torch.ones(1024, dtype=torch.float64), 1e-9).square().mean(-1).allclose(torch.ones(3, dtype=torch.float64))
    low = torch.randn(4, 64, dtype=torch.bfloat16)
    assert rms_norm_reference(low, torch.ones(64, dtype=torch.bfloat16), 1e-5).dtype == torch.bfloat16


def test_rms_norm_gradient():
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (doubles(3, 6, grad=True), doubles(6, grad=True)))


def test_rotation_in_real_numbers_equals_the_complex_reference():
    x, angles = doubles(2, 3, 9, 8), rope_angles(torch.arange(9), 8, 10_000.0)
    reference = rotate_reference(x, angles.cos(), angles.sin())
    for op in (rotate_pairs, rotate):
        torch.testing.assert_close(op(x, angles.cos(), angles.sin()), reference, rtol=1e-12, atol=1e-12)
    low = x.bfloat16()
    torch.testing.assert_close(rotate(low, angles.cos().bfloat16(), angles.sin().bfloat16()).double(), reference, rtol=0.05, atol=0.05)


def test_rotation_gradient():
    angles = rope_angles(torch.arange(3), 4, 100.0)
    for op in (rotate_pairs, rotate_reference):
        assert gradcheck(lambda x, op=op: op(x, angles.cos(), angles.sin()), (doubles(2, 3, 4, grad=True),))


def test_rotation_scores_depend_on_the_distance_alone():
    q, k = doubles(1, 8).expand(20, 8), doubles(1, 8).expand(20, 8)
    angles = rope_angles(torch.arange(20), 8, 100.0)
    scores = rotate(q, angles.cos(), angles.sin()) @ rotate(k, angles.cos(), angles.sin()).T
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-10, atol=1e-10)


def test_rotation_turns_pair_i_by_theta_to_the_minus_2i_over_dim():
    angles = rope_angles(torch.tensor([3]), 4, 100.0)
    torch.testing.assert_close(angles, torch.tensor([[3.0, 0.3]], dtype=torch.float64))
    turned = rotate(torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64), angles.cos(), angles.sin())
    expected = [[math.cos(3), math.sin(3), -math.sin(0.3), math.cos(0.3)]]
    torch.testing.assert_close(turned, torch.tensor(expected, dtype=torch.float64))


def test_swiglu_is_its_equation_entry_by_entry():
    x, gate, up, down = doubles(2, 3), doubles(4, 3), doubles(4, 3), doubles(3, 4)
    out = swiglu_reference(x, gate, up, down)
    for row in range(2):
        inner = [float((gate[f] @ x[row]) / (1 + math.exp(-float(gate[f] @ x[row]))) * (up[f] @ x[row])) for f in range(4)]
        expected = [sum(float(down[h, f]) * inner[f] for f in range(4)) for h in range(3)]
        torch.testing.assert_close(out[row], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("packed", [False, True])
def test_attention_fast_equals_reference(packed):
    q, k, v = doubles(2, 3, 12, 8), doubles(2, 3, 12, 8), doubles(2, 3, 12, 5)
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12]) if packed else None
    mask = causal_document_mask(ids) if packed else None
    torch.testing.assert_close(attention(q, k, v, mask), attention_reference(q, k, v, mask), rtol=1e-10, atol=1e-10)


def test_attention_mask_is_causal_and_ends_at_documents():
    mask = causal_document_mask(torch.tensor([[0, 0, 1, 1, 1]]))[0, 0]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask.int().tolist() == expected


def test_attention_gradient():
    mask = causal_document_mask(torch.tensor([[0, 0, 1, 1]]))
    arguments = [doubles(1, 2, 4, 3, grad=True) for _ in range(3)]
    assert gradcheck(lambda q, k, v: attention(q, k, v, mask), arguments)


def test_mla_equals_an_implementation_written_token_by_token():
    """The latent form, head by head and token by token, from DeepSeek-V2's equations with LongCat's scales."""
    from longcat_lab.blocks import ForwardContext
    from longcat_lab.config import load

    shape = load("tiny").model.shape()
    config = shape.attention
    module = config.build(shape).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    length, heads, nope = 6, config.num_attention_heads, config.qk_nope_head_dim
    x = doubles(1, length, shape.hidden_size)
    angles = rope_angles(torch.arange(length), config.qk_rope_head_dim, 10_000.0)
    out = module(x, ForwardContext((angles.cos(), angles.sin())))[0]

    def turn(vector, position):
        return rotate_reference(vector[None], angles[position : position + 1].cos(), angles[position : position + 1].sin())[0]

    def norm(vector, weight):
        return weight * vector / (vector.square().mean() + 1e-5).sqrt()

    keys, values = [], []
    for t in range(length):
        latent = module.kv_a_proj_with_mqa.weight @ x[0, t]
        c = norm(latent[: config.kv_lora_rank], module.kv_a_layernorm.weight) * math.sqrt(shape.hidden_size / config.kv_lora_rank)
        per_head = (module.kv_b_proj.weight @ c).view(heads, -1)
        k_rope = turn(latent[config.kv_lora_rank :], t)
        keys.append([torch.cat((per_head[h, :nope], k_rope)) for h in range(heads)])
        values.append([per_head[h, nope:] for h in range(heads)])
    for t in range(length):
        c_q = norm(module.q_a_proj.weight @ x[0, t], module.q_a_layernorm.weight) * math.sqrt(shape.hidden_size / config.q_lora_rank)
        q = (module.q_b_proj.weight @ c_q).view(heads, -1)
        mixed = []
        for h in range(heads):
            query = torch.cat((q[h, :nope], turn(q[h, nope:], t)))
            weight = F.softmax(torch.stack([query @ keys[s][h] for s in range(t + 1)]) / math.sqrt(config.qk_head_dim), 0)
            mixed.append(sum(weight[s] * values[s][h] for s in range(t + 1)))
        torch.testing.assert_close(out[t], module.o_proj.weight @ torch.cat(mixed), rtol=1e-9, atol=1e-9)
