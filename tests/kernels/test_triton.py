"""The Triton operators against the reference: on an accelerator where there is one, else in Triton's interpreter on a CPU.

Whether Triton interprets is settled when it is first imported, and torch imports it for reasons of its own; so the operators run in
a process of their own, which is this file run as a script. A second one compiles them for a card that need not be there.
"""

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import traceback

import pytest
import torch

from longcat_lab.blocks.sparse_attention import op

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
BOUND = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 2e-2}


# --- the other process --------------------------------------------------------------------------------------------------------


def operators():
    """What the process does, by name. Each takes tensors, then anything, and returns one tensor or several."""
    from longcat_kernels import triton_indexing, triton_sparse_attention

    def of_view(q, k, columns, indices, scale):
        return triton_sparse_attention.sparse_attention(q, k, k[..., :columns], indices, scale)

    def twice(q, k, indices):
        o, _ = of_view(q.requires_grad_(), k, 8, indices, 1.0)
        return torch.autograd.grad(o.sum(), q, create_graph=True)

    def takes(tensor):
        return torch.tensor([triton_indexing.takes(tensor), triton_indexing.takes(tensor, tensor.double()), triton_indexing.available()])

    return {
        "index_topk": triton_indexing.index_topk,
        "selected_scores": triton_indexing.selected_scores,
        "sparse_attention": triton_sparse_attention.sparse_attention,
        "of_view": of_view,
        "twice": twice,
        "takes": takes,
    }


def answer(name, inputs, rest, d_out, device):
    """([results], [gradients of inputs]) of one operator."""
    inputs = [tensor.to(device).requires_grad_(d_out is not None) for tensor in inputs]
    results = operators()[name](*inputs, *(part.to(device) if isinstance(part, torch.Tensor) else part for part in rest))
    results = list(results) if isinstance(results, tuple) else [results]
    if d_out is not None:
        results[0].backward(d_out.to(results[0]))
    return [result.detach().cpu() for result in results], [None if tensor.grad is None else tensor.grad.cpu() for tensor in inputs]


def serve():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints elsewhere
    with contextlib.suppress(EOFError):
        while True:
            request = pickle.load(sys.stdin.buffer)
            try:
                reply = answer(*request, device)
            except Exception as error:
                reply = error if type(error) in (ValueError, RuntimeError) else RuntimeError(traceback.format_exc())
            pickle.dump(reply, replies)
            replies.flush()


def compile_all(width_of):
    """Compiles each kernel for compute capability 9.0; prints its name, its shared memory in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from longcat_kernels import triton_indexing, triton_sparse_attention

    narrow = dict.fromkeys(["q", "k", "v", "o", "d_o", "d_q"], "*bf16")
    types = {"first": "*i64", "chosen": "*i32", "indices": "*i32", "codes": "*u32", "scale": "fp32", **narrow}
    wide = dict.fromkeys(["w", "scores", "d_scores", "d_k", "d_w", "sums", "mass", "inner", "d_v"], "*fp32")
    q, k = torch.empty(1, 1, width_of["heads"], sum(width_of["columns"])), torch.empty(1, 1, sum(width_of["columns"]))
    q, k = q.bfloat16(), k.bfloat16()
    blocks = triton_sparse_attention._blocks(q, k, k[..., : width_of["columns"][0]])
    core = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    index = {"HEADS": triton_indexing.padded(width_of["heads"] // 2), "WIDTH": width_of["index"], "HAS_FIRST": True}
    index |= {"QUERIES": triton_indexing.QUERIES, "KEYS": triton_indexing.KEYS, "READ": triton_indexing.READ}
    for module, known, options in [
        (triton_indexing, {**index, "CHOSEN": triton_indexing.CHOSEN}, {"num_warps": 8, "num_stages": 2}),
        (triton_sparse_attention, blocks, core),
    ]:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel, constants = getattr(module, name), dict(known)
            if name == "_key_gradient_kernel":
                constants["CHOSEN"] = triton_sparse_attention.WITH_GRADIENTS
            constants = {each: value for each, value in constants.items() if each in kernel.arg_names}
            signature = {each: "constexpr" if each in constants else {**types, **wide}.get(each, "i32") for each in kernel.arg_names}
            aligned = {(at,): [["tt.divisibility", 16]] for at, each in enumerate(kernel.arg_names) if signature[each][0] == "*"}
            source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            assert compiled.asm["cubin"]
            print(name, compiled.metadata.shared, flush=True)


def other_process(*arguments, interpret, **settings):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "LONGCAT_LAB_KERNELS"):
        environment.pop(name, None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, **settings)


@pytest.fixture(scope="module")
def run():
    """(operator's name, tensors, anything else, d_out or None) to ([results], [gradients])."""
    process = other_process(__file__, "serve", interpret=not torch.cuda.is_available(), stdin=subprocess.PIPE)

    def call(name, inputs, *rest, d_out=None):
        pickle.dump((name, inputs, rest, d_out), process.stdin)
        process.stdin.flush()
        reply = pickle.load(process.stdout)
        if isinstance(reply, Exception):
            raise reply
        return reply

    yield call
    process.stdin.close()
    process.stdout.close()
    assert process.wait(60) == 0


# --- inputs -------------------------------------------------------------------------------------------------------------------


def whole_numbers(batch, queries, keys, heads, width):
    """q, k, w whose scores are small whole numbers: exact in any order of summing, and full of ties."""
    q = torch.randint(-2, 3, (batch, queries, heads, width)).float()
    return q, torch.randint(-1, 2, (batch, keys, width)).float(), torch.randint(-2, 3, (batch, queries, heads)).float()


def documents(batch, queries, keys):
    """The first key of each query's document: boundaries at random places, other ones in each row."""
    begins = torch.rand(batch, keys) < 0.03
    latest = (begins * torch.arange(keys)).cummax(1).values
    return latest[:, keys - queries :].contiguous()


def selection(batch, queries, keys, topk):
    """A random selection, with -1 in front of the early ones."""
    first = documents(batch, queries, keys)
    return op.select(torch.randn(batch, queries, keys), op.visible_keys(first, queries, keys, first.device), topk)


def close(mine, reference, bound):
    """The largest difference, against the reference's largest number."""
    reference = reference.detach()
    assert mine.shape == reference.shape
    assert float((mine.double() - reference).abs().max()) <= bound * float(reference.abs().max())


def reference_gradients(operator, inputs, d_out):
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    result = operator(*inputs)
    value = result[0] if isinstance(result, tuple) else result
    value.masked_fill(value.isinf(), 0).backward(d_out.double())
    return result, [tensor.grad for tensor in inputs]


# --- selection ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "topk", "sinks", "window", "packed", "dtype"),
    [
        (20, 70, 3, 9, 0, 0, True, torch.float32),  # more than the chunk of queries whose scores are kept at a time
        (9, 61, 5, 7, 2, 5, False, torch.bfloat16),  # no place left beside sinks and window
        (6, 67, 2, 21, 3, 4, False, torch.float16),  # ties in several blocks of keys
        (1, 45, 4, 13, 1, 1, False, torch.float32),  # decoding
        (12, 12, 2, 50, 3, 4, True, torch.float32),  # topk beyond all keys
    ],
)
def test_the_selection_is_the_references(run, queries, keys, heads, topk, sinks, window, packed, dtype):
    q, k, w = whole_numbers(2, queries, keys, heads, 5)
    first = documents(2, queries, keys) if packed else None
    (mine,), _ = run("index_topk", [q.to(dtype), k.to(dtype), w], first, topk, sinks, window)
    expected = op.index_topk(q, k, w, first, topk, sinks, window)
    assert mine.dtype == torch.int32 and torch.equal(mine, expected)


def test_scores_that_differ_in_their_last_bits_are_told_apart(run):
    """Large numbers of both signs, a few units apart: what decides is the last 8 bits of 32."""
    k = torch.stack((torch.full((1, 60), 2.0**12), torch.randint(0, 7, (1, 60)).float()), -1)
    q = torch.tensor([2.0**11, 1.0]).expand(1, 8, 1, 2).contiguous()
    w = torch.tensor([1.0, -1.0]).repeat(4)[None, :, None]
    (mine,), _ = run("index_topk", [q, k, w], None, 9)
    assert torch.equal(mine, op.index_topk(q, k, w, None, 9))


def test_real_scores_are_selected_as_float64_would(run):
    """The lowest score taken is not below the highest one left, but for rounding; and no key comes twice or out of order."""
    q, k, w = torch.randn(1, 10, 4, 9), torch.randn(1, 50, 9), torch.randn(1, 10, 4)
    (mine,), _ = run("index_topk", [q, k, w], None, 15)
    scores = op.index_scores(q.double(), k.double(), w.double())
    taken = torch.zeros(1, 10, 50, dtype=torch.bool).scatter(2, mine.long(), True)
    left = op.visible_keys(None, 10, 50, mine.device) & ~taken
    assert (mine.diff(dim=-1) > 0).all() and (mine >= 0).all() and (taken.sum(-1) == 15).all()
    lowest, highest = scores.masked_fill(~taken, torch.inf).amin(-1), scores.masked_fill(~left, -torch.inf).amax(-1)
    assert (lowest >= highest - 1e-5).all()


# --- scores at the selected keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_selected_scores_and_their_gradients(run, dtype):
    q, k, w = torch.randn(2, 6, 5, 12).to(dtype), torch.randn(2, 40, 12).to(dtype), torch.randn(2, 6, 5)
    indices = selection(2, 6, 40, 21)
    d_out = torch.randn(indices.shape).masked_fill(indices < 0, torch.nan)  # what comes from no key is not looked at
    (mine,), gradients = run("selected_scores", [q, k, w], indices, d_out=d_out)
    expected, wanted = reference_gradients(lambda *each: op.selected_scores(*each, indices), [q, k, w], d_out)
    assert (indices < 0).any() and torch.equal(mine == -torch.inf, indices < 0)
    close(mine.masked_fill(indices < 0, 0), expected.masked_fill(indices < 0, 0), 2e-6)  # products are exact, sums are fp32
    for gradient, want, tensor in zip(gradients, wanted, (q, k, w)):
        assert gradient.dtype == tensor.dtype
        close(gradient, want, BOUND[dtype])


# --- attention ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "width", "value", "topk", "dtype"),
    [
        (3, 24, 16, 20, torch.float32),  # fewer heads than a block, widths that are no powers of two, keys that fill no block
        (18, 16, 24, 16, torch.float32),  # two blocks of heads; v wider than k
        (5, 40, 20, 33, torch.float16),
        (4, 16, 12, 9, torch.bfloat16),
    ],
)
def test_attention_its_mass_and_its_gradients(run, heads, width, value, topk, dtype):
    q, k, v = (torch.randn(*shape).to(dtype) for shape in ((2, 4, heads, width), (2, 44, width), (2, 44, value)))
    indices, d_out = selection(2, 4, 44, topk), torch.randn(2, 4, heads, value)
    (o, mass), gradients = run("sparse_attention", [q, k, v], indices, 0.4, d_out=d_out)
    expected, wanted = reference_gradients(lambda *each: op.sparse_attention(*each, indices, 0.4), [q, k, v], d_out)
    assert (indices < 0).any() and not mass[indices < 0].any()
    assert o.dtype == dtype and mass.dtype == torch.float32
    close(mass, expected[1], 2e-6)
    for mine, want in zip([o, *gradients], [expected[0], *wanted]):
        close(mine, want, BOUND[dtype])


@pytest.mark.parametrize("columns", [16, 20])
def test_values_that_are_columns_of_the_keys(run, columns):
    """Read with the keys, once; their gradient is the keys' too."""
    q, k, indices = torch.randn(2, 4, 3, 24), torch.randn(2, 40, 24), selection(2, 4, 40, 17)
    d_out = torch.randn(2, 4, 3, columns)
    (o, mass), gradients = run("of_view", [q, k], columns, indices, 0.4, d_out=d_out)
    expected, wanted = reference_gradients(lambda q, k: op.sparse_attention(q, k, k[..., :columns], indices, 0.4), [q, k], d_out)
    close(mass, expected[1], 2e-6)
    for mine, want in zip([o, *gradients], [expected[0], *wanted]):
        close(mine, want, 2e-6)


def test_scores_far_below_zero_neither_overflow_nor_vanish(run):
    """Beside such scores that of a place without a key, 0, is out of all proportion."""
    q, k, v = torch.ones(1, 2, 1, 1), -60 * torch.rand(1, 40, 1) - 500, torch.randn(1, 40, 6)
    indices = torch.arange(40, dtype=torch.int32).expand(1, 2, 40).clone()
    indices[0, 0, :9] = -1
    d_out = torch.randn(1, 2, 1, 6)
    (o, mass), gradients = run("sparse_attention", [q, k, v], indices, 1.0, d_out=d_out)
    expected, wanted = reference_gradients(lambda *each: op.sparse_attention(*each, indices, 1.0), [q, k, v], d_out)
    for mine, want in zip([o, mass, *gradients], [*expected, *wanted]):
        close(mine, want, 2e-3)


# --- what is refused ----------------------------------------------------------------------------------------------------------


def test_second_derivatives_are_refused(run):
    with pytest.raises(RuntimeError, match="sparse_attention is differentiable once"):
        run("twice", [torch.randn(1, 2, 2, 8), torch.randn(1, 6, 8)], selection(1, 2, 6, 4))


@pytest.mark.parametrize(
    ("name", "inputs", "rest", "sentence"),
    [
        ("index_topk", [(1, 3, 2, 4), (1, 2, 4), (1, 3, 2)], [None, 2], r"k is \[1, 2, 4\], and \[1, S, 4\] with S at least 3 fits q"),
        ("index_topk", [(1, 3, 2, 4), (1, 5, 4), (1, 3, 2)], [None, 4, 2, 3], r"topk is 4, below sinks \+ window \(5\)"),
        ("index_topk", [(1, 3, 2, 4), (1, 5, 4), (1, 3, 2)], [torch.zeros(1, 5).long(), 4], r"first is \[1, 5\], and \[1, 3\] fits q"),
        ("selected_scores", [(1, 3, 2, 4), (1, 5, 4), (1, 3)], [torch.zeros(1, 3, 2).int()], r"w \[1, 3\], and must be"),
        ("selected_scores", [(1, 3, 2, 4), (1, 5, 4), (1, 3, 2)], [torch.zeros(1, 3, 2).long()], r"indices are torch.int64"),
        ("sparse_attention", [(1, 3, 2, 4), (1, 5, 4), (1, 4, 4)], [torch.zeros(1, 3, 2).int(), 1.0], r"v is \[1, 4, 4\]"),
    ],
)
def test_what_does_not_fit_is_named(run, name, inputs, rest, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(name, [torch.randn(*shape) for shape in inputs], *rest)


def test_float64_is_refused_and_not_taken(run):
    with pytest.raises(ValueError, match=r"q is torch.float64, and must be one of torch.float32, torch.bfloat16, torch.float16"):
        run("sparse_attention", [torch.randn(1, 1, 1, 1).double(), *torch.randn(2, 1, 1, 1)], torch.zeros(1, 1, 1).int(), 1.0)
    (said,), _ = run("takes", [torch.randn(3)])
    assert said.tolist() == [True, False, True]


# --- without an interpreter ---------------------------------------------------------------------------------------------------


def test_the_package_does_not_import_triton_and_without_a_card_nothing_is_taken():
    lines = [
        "import sys, longcat_kernels",
        "print('triton' in sys.modules)",
        "import torch, longcat_kernels.triton_sparse_attention as core",
        "print('triton' in sys.modules, core.takes(torch.zeros(1)), core.available() == torch.accelerator.is_available())",
    ]
    said, _ = other_process("-c", "\n".join(lines), interpret=False, text=True).communicate(timeout=200)
    assert said.split() == ["False", "True", "False", "True"]


def compiled(*arguments):
    process = other_process(__file__, "compile", *arguments, interpret=False, text=True)
    said, _ = process.communicate(timeout=290)
    assert process.returncode == 0
    return {line.split()[0]: int(line.split()[1]) for line in said.splitlines()}


def test_every_kernel_compiles_for_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert len(compiled("small")) == 8


@pytest.mark.slow
def test_published_widths_fit_a_card(tmp_path, monkeypatch):
    """LongCat-2.0's: 64 heads of 512 + 64, 32 index heads of 128; in the 163 KiB of shared memory that an A100 has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shared = compiled("published")
    assert len(shared) == 8 and max(shared.values()) <= 163 * 1024


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        small = {"heads": 4, "columns": (32, 16), "index": 16}
        compile_all(small if sys.argv[2] == "small" else {"heads": 64, "columns": (512, 64), "index": 128})
