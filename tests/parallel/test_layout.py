"""Ranks, axes and groups as arithmetic; impossible layouts are named before anything starts."""

import itertools

import pytest

import longcat_lab as lab
from longcat_lab.parallel.layout import DENSE, make_layout


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


def test_a_run_is_the_same_run_in_any_layout():
    from longcat_lab.training.provenance import identity

    assert identity(lab.load("tiny")) == identity(lab.load("tiny", "parallel.tensor=2", "parallel.pipeline=2"))
