"""Cross entropies in chunks and the hidden z-loss, against torch's own and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from longcat_lab.blocks import loss_op
from longcat_lab.blocks.loss_op import Scored, cross_entropies, cross_entropy_reference, hidden_z_loss


def doubles(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def labelled(*shape, vocab=11, ignored=0.3):
    labels = torch.randint(0, vocab, shape)
    return labels.masked_fill(torch.rand(shape) < ignored, -100)


def small_chunks(monkeypatch, rows, vocab=11):
    monkeypatch.setattr(loss_op, "CHUNK_ELEMENTS", rows * vocab)


@pytest.mark.parametrize("rows", [1, 4, 5, 100], ids=lambda rows: f"{rows} rows a chunk")
def test_parts_equal_torchs_cross_entropy_with_gradients(monkeypatch, rows):
    """20 rows and 5: whole chunks, a shorter last one, and all in one."""
    small_chunks(monkeypatch, rows)
    shapes, weights = [(2, 10), (5,), (3, 4)], [1.0, 0.25, 2.0]
    hidden, labels = [doubles(*shape, 7, grad=True) for shape in shapes], [labelled(*shape) for shape in shapes]
    head = doubles(11, 7, grad=True)
    total, sums = cross_entropies([Scored(h, y, w) for h, y, w in zip(hidden, labels, weights, strict=True)], head)
    (3.0 * total).backward()
    ours = [head.grad, *(h.grad for h in hidden)]
    for leaf in (head, *hidden):
        leaf.grad = None
    truth = [F.cross_entropy((h @ head.T).flatten(0, -2), y.flatten(), reduction="sum") for h, y in zip(hidden, labels, strict=True)]
    whole = sum(w * each for w, each in zip(weights, truth, strict=True))
    (3.0 * whole).backward()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.stack(sums), torch.stack(truth).detach())
    for a, b in zip(ours, [head.grad, *(h.grad for h in hidden)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not any(each.requires_grad for each in sums)


def test_gradients_equal_finite_differences(monkeypatch):
    """Not by gradcheck, which runs backward twice over one forward pass."""
    small_chunks(monkeypatch, 2, vocab=5)
    labels, leaves = labelled(5, vocab=5), [doubles(5, 3, grad=True) for _ in range(3)]

    def loss():
        a, b, head = leaves
        return cross_entropies([Scored(a, labels, 0.7), Scored(b, labels.flip(0), 1.3)], head)[0]

    loss().backward()
    for leaf in leaves:
        for i in range(leaf.numel()):
            with torch.no_grad():
                value, moved = float(leaf.view(-1)[i]), []
                for step in (1e-5, -1e-5):
                    leaf.view(-1)[i] = value + step
                    moved.append(float(loss()))
                leaf.view(-1)[i] = value
            assert float(leaf.grad.view(-1)[i]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-6, abs=1e-8)


def test_a_part_may_leave_the_head_alone():
    first, second, head, labels = doubles(6, 7, grad=True), doubles(6, 7, grad=True), doubles(11, 7, grad=True), labelled(6)
    cross_entropies([Scored(first, labels), Scored(second, labels, 0.5, trains_head=False)], head)[0].backward()
    frozen = head.detach()
    (expected,) = torch.autograd.grad(F.cross_entropy(first @ head.T, labels, reduction="sum"), head)
    torch.testing.assert_close(head.grad, expected)
    (alone,) = torch.autograd.grad(0.5 * F.cross_entropy(second @ frozen.T, labels, reduction="sum"), second)
    torch.testing.assert_close(second.grad, alone)


def test_nothing_to_score_is_a_loss_of_zero_with_gradients_of_zero():
    hidden, head = doubles(6, 7, grad=True), doubles(11, 7, grad=True)
    total, sums = cross_entropies([Scored(hidden, torch.full((6,), -100)), Scored(hidden[:0], torch.zeros(0, dtype=torch.int64))], head)
    total.backward()
    assert float(total.detach()) == float(sums[0]) == float(sums[1]) == 0.0
    assert hidden.grad.abs().max() == 0 and head.grad.abs().max() == 0


def test_a_parts_loss_has_the_same_bits_whatever_else_is_scored(monkeypatch):
    small_chunks(monkeypatch, 3)
    hidden, other, head, labels = torch.randn(8, 7), torch.randn(5, 7), torch.randn(11, 7), labelled(8)
    alone = cross_entropies([Scored(hidden, labels)], head)[1][0]
    for parts in ([Scored(other, labelled(5), 9.0), Scored(hidden, labels)], [Scored(hidden, labels, 0.1), Scored(other, labelled(5))]):
        sums = cross_entropies(parts, head)[1]
        assert torch.equal(sums[1] if parts[1].hidden is hidden else sums[0], alone)


def test_a_parts_gradient_has_the_same_bits_whatever_else_is_scored():
    hidden, other, head, labels = torch.randn(8, 7), torch.randn(5, 7), torch.randn(11, 7), labelled(8)
    found = []
    for more in ([], [Scored(other, labelled(5))]):
        leaf = hidden.clone().requires_grad_()
        cross_entropies([Scored(leaf, labels), *more], head.requires_grad_())[0].backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_a_second_backward_is_refused_in_one_sentence():
    total, _ = cross_entropies([Scored(doubles(4, 7, grad=True), labelled(4))], doubles(11, 7, grad=True))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"ran a second time.*run the forward pass again") as caught:
        total.backward()
    assert "\n" not in str(caught.value)


def test_without_gradients_only_losses_are_computed():
    hidden, head, labels = doubles(4, 7), doubles(11, 7, grad=True), labelled(4, ignored=0)
    with torch.no_grad():
        total, _ = cross_entropies([Scored(hidden, labels)], head)
    assert not total.requires_grad
    torch.testing.assert_close(total, cross_entropy_reference(hidden, head, labels).detach().double(), rtol=1e-5, atol=1e-5)
    cross_entropies([Scored(hidden, labels)], head)[0].backward()  # frozen hidden states, a head that learns
    assert head.grad.abs().max() > 0
    frozen = doubles(4, 7, grad=True)
    cross_entropies([Scored(frozen, labels)], head.detach())[0].backward()
    assert frozen.grad.abs().max() > 0


def test_under_bf16_autocast_losses_and_gradients_stay_close_and_keep_their_dtypes():
    hidden, head, labels = torch.randn(64, 32), 0.3 * torch.randn(101, 32), labelled(64, vocab=101)
    found = []
    for low in (False, True):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            total, sums = cross_entropies([Scored(leaves[0], labels)], leaves[1])
        total.backward()
        assert total.dtype == sums[0].dtype == leaves[0].grad.dtype == leaves[1].grad.dtype == torch.float32
        found.append((total.detach(), *(leaf.grad for leaf in leaves)))
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm() / a.norm()) < 0.01
        assert not torch.equal(a, b)


def test_large_logits_do_not_overflow():
    hidden, head = torch.full((2, 4), 1e3, requires_grad=True), torch.eye(4).repeat(3, 1) * torch.arange(12.0)[:, None]
    total, _ = cross_entropies([Scored(hidden, torch.tensor([11, 0]))], head)
    total.backward()
    assert float(total.detach()) == pytest.approx(11_000) and hidden.grad.isfinite().all()


def test_z_loss_gradient_in_closed_form():
    """dL/dz_i = (2 / T) lse softmax(|z|)_i sign(z_i)."""
    z = 3 * doubles(2, 5, 8, grad=True)
    (by_z,) = torch.autograd.grad(hidden_z_loss(z), z)
    lse = z.abs().logsumexp(-1, keepdim=True)
    torch.testing.assert_close(by_z, 2 / 10 * lse * z.abs().softmax(-1) * z.sign())
    assert gradcheck(hidden_z_loss, (doubles(3, 4, grad=True),))


def test_z_loss_is_smallest_at_zero_and_grows_like_the_square_of_a_massive_activation():
    assert float(hidden_z_loss(torch.zeros(3, 8192))) == pytest.approx(math.log(8192) ** 2)
    assert float(hidden_z_loss(1e-3 * torch.randn(3, 8192))) > math.log(8192) ** 2
    spike = torch.zeros(1, 8192)
    spike[0, 7] = -1e3
    assert float(hidden_z_loss(spike)) == pytest.approx(1e6)


def test_z_loss_leaves_padding_out():
    z, padding = doubles(2, 6, 8, grad=True), torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
    loss = hidden_z_loss(z, padding)
    torch.testing.assert_close(loss, hidden_z_loss(z[~padding]))
    (by_z,) = torch.autograd.grad(loss, z)
    assert by_z[padding].abs().max() == 0 and by_z[~padding].abs().min() > 0
    assert float(hidden_z_loss(z, torch.ones_like(padding)).detach()) == 0


def test_z_loss_is_fp32_for_bf16_states():
    z = (30 * torch.randn(4, 64)).bfloat16().requires_grad_()
    loss = hidden_z_loss(z)
    loss.backward()
    assert loss.dtype == torch.float32 and z.grad.dtype == torch.bfloat16
    assert torch.equal(loss.detach(), hidden_z_loss(z.detach().float()))
