"""Ranks, axes and groups as arithmetic; impossible layouts are named before anything starts."""

import itertools
from typing import Literal

import pytest
import torch

import longcat_lab as lab
from longcat_lab.blocks.context import ForwardContext, Part
from longcat_lab.model import LongcatLM
from longcat_lab.parallel.fitting import check_config
from longcat_lab.parallel.layout import DENSE, make_layout
from longcat_lab.parallel.tensor import check as check_widths


def layout(world, *settings, preset="tiny"):
    return make_layout(lab.load(preset, *settings), world)


def test_one_process_needs_nothing():
    one = layout(1)
    assert one.world == one.stage_size == one.batch_ways == 1 and one.stages == ((0, 1),)
    assert one.told() == "1 process"


def test_what_is_left_is_data_shard():
    assert layout(4).data_shard == 4
    assert layout(4, "parallel.tensor=2").data_shard == 2
    assert layout(4, "parallel.tensor=2", "parallel.data_replicate=2").data_shard == 1


def test_ranks_and_coordinates_are_one_to_one_and_tensor_is_innermost():
    all_six = layout(
        16,
        *(f"parallel.{axis}=2" for axis in ("pipeline", "context", "tensor", "expert", "embedding")),
        "model.num_layers=2",
    )
    places = [all_six.coordinates(rank) for rank in range(16)]
    assert len({tuple(place[axis] for axis in DENSE) for place in places}) == 16
    assert [place["tensor"] for place in places[:4]] == [0, 1, 0, 1]
    assert [place["pipeline"] for place in places] == [0] * 8 + [1] * 8
    assert len({(p["pipeline"], p["data_replicate"], p["expert_shard"], p["expert"]) for p in places}) == 16
    assert len({(p["pipeline"], p["embedding_replicate"], p["embedding"]) for p in places}) == 16
    assert all_six.expert_shard == 4 and all_six.embedding_replicate == 4


def test_every_sequence_is_read_by_one_place():
    wide = layout(8, "parallel.data_replicate=2", "parallel.context=2")
    read = {rank: wide.batch_place(rank) for rank in range(8)}
    assert sorted(read.values()) == sorted(itertools.chain.from_iterable([place] * 2 for place in range(4)))
    assert read[0] == read[1]  # parts of one sequence


def test_layers_over_stages():
    deep = ("model.num_layers=5", "parallel.pipeline=3")
    assert layout(3, *deep).stages == ((0, 2), (2, 4), (4, 5))
    assert layout(3, *deep, "parallel.layers_per_stage=[1,3,1]").stages == ((0, 1), (1, 4), (4, 5))


@pytest.mark.parametrize(
    ("world", "settings", "said"),
    [
        (3, ["parallel.tensor=2"], "does not divide the 3 processes"),
        (4, ["parallel.data_shard=3"], "= 3, but there are 4 processes"),
        (8, [], "data_shard 8 does not divide data.batch_size 4"),
        (2, ["parallel.pipeline=2"], "more stages than model.num_layers 1"),
        (2, ["parallel.pipeline=2", "model.num_layers=2", "parallel.layers_per_stage=[1,2]"], "must be 2 positive numbers"),
        (3, ["parallel.tensor=3"], "parallel.tensor 3 does not divide"),
        (
            2,
            ["parallel.tensor=2", "model.moe.n_shared_experts=1", "model.moe.expert_ffn_hidden_size=17"],
            "hidden_size 17: change",
        ),
        (2, ["parallel.expert=4"], "parallel.expert 4 does not divide data_shard x context x tensor 2"),
        (2, ["parallel.embedding=4"], "parallel.embedding 4 does not divide the processes of a pipeline stage 2"),
        (4, ["parallel.context=4", "data.sequence_length=60"], "twice parallel.context 8 does not divide data.sequence_length 60"),
        (2, ["training.micro_batch_size=4"], "training.micro_batch_size 4 does not divide the sequences of one process 2"),
        (
            2,
            ["parallel.pipeline=2", "model.attention.kind=lsa", "model.attention.cli_factor=4", "model.num_layers=2"],
            "A pipeline stage begins at attention 2, inside the group of cli_factor 4",
        ),
    ],
)
def test_what_cannot_be_is_said(world, settings, said):
    with pytest.raises(lab.LabError) as refused:
        layout(world, *settings)
    assert said in str(refused.value) and "\n" not in str(refused.value)


class Looks(lab.Block):
    """A dense network that mixes positions, which no configuration tells."""

    def __init__(self, hidden):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden, hidden))

    def forward(self, x):
        return x.cumsum(1) @ self.weight


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["parallel.embedding=2"], "parallel.embedding 2: this model has no n-gram tables"),
        (["parallel.context=2", "model.ffn.kind=looks"], "Looks may look at positions that another process holds; set parallel.context=1"),
        (["parallel.pipeline=2", "model.num_layers=2", "model.embedding.ngram.kind=engram"], "is read at layers"),
        (["parallel.context=2", "model.embedding.ngram.kind=engram"], "needs whole rows"),
    ],
)
def test_what_only_the_blocks_tell_is_said_before_anything_starts(fresh_registry, settings, said):
    @lab.register("ffn")
    class LooksConfig(lab.BlockConfig):
        kind: Literal["looks"] = "looks"

        def budget(self, shape):
            return lab.Budget.of_weights(shape.hidden_size**2)

        def build(self, shape):
            return Looks(shape.hidden_size)

    with pytest.raises(lab.LabError, match=said) as refused:
        check_config(lab.load("tiny", *settings), 2)
    assert "\n" not in str(refused.value)


def test_a_block_of_ones_own_that_says_so_serves_a_part_of_a_row(fresh_registry):
    class Serves(Looks):
        serves_parts = True

    @lab.register("ffn")
    class ServesConfig(lab.BlockConfig):
        kind: Literal["serves"] = "serves"

        def budget(self, shape):
            return lab.Budget.of_weights(shape.hidden_size**2)

        def build(self, shape):
            return Serves(shape.hidden_size)

    check_config(lab.load("tiny", "parallel.context=2", "model.ffn.kind=serves"), 2)


def test_a_width_of_a_block_that_tensor_does_not_divide():
    model = LongcatLM(lab.load("tiny").model)
    check_widths(model, 2)
    model.layers[0].mlps[0].gate_proj = torch.nn.Linear(8, 7, bias=False)
    with pytest.raises(lab.LabError, match=r"parallel.tensor 2 does not divide 7, a width of layers.0.mlps.0.gate_proj.weight"):
        check_widths(model, 2)


def test_a_part_of_a_row_has_no_mask():
    part = Part(((0, 2), (6, 8)), 8, 2, None, None)
    context = ForwardContext((torch.zeros(4, 1), torch.zeros(4, 1)), part=part)
    with pytest.raises(lab.LabError, match=r"asks for a whole row's mask; let it go through context.chunks"):
        _ = context.mask
    assert all(each.part is None for _, each in context.chunks)


def test_a_run_is_the_same_run_in_any_layout():
    from longcat_lab.training.provenance import identity

    assert identity(lab.load("tiny")) == identity(lab.load("tiny", "parallel.tensor=2", "parallel.pipeline=2"))
