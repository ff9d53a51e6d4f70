"""Presets, overrides, and the sentences that bad ones get."""

import pytest

from longcat_lab.config import ConfigError, apply, load, presets, read_yaml, write_yaml


@pytest.mark.parametrize("name", sorted(presets()))
def test_presets_load_and_survive_a_round_trip(name):
    config = load(name)
    assert load(config.to_dict()) == config


def test_the_presets_that_were_promised_are_there():
    assert {"tiny", "nano", "micro"} <= set(presets())


def test_overrides_are_typed_by_the_field():
    config = load("tiny", "training.optimizer.learning_rate=1e-4", "model.moe.expected_real_experts=1", "training.evaluate_every=null")
    assert config.training.optimizer.learning_rate == 1e-4
    assert config.model.moe.expected_real_experts == 1.0
    assert config.training.evaluate_every is None


def test_an_override_below_an_empty_node_makes_it():
    assert load("tiny").model.embedding.ngram is None
    config = load("tiny", "model.embedding.ngram.order=3")
    assert (config.model.embedding.ngram.order, config.model.embedding.ngram.kind) == (3, "ngram_embedding")
    assert load(config, "model.embedding.ngram=null") == load("tiny")


def test_a_new_kind_drops_what_only_the_old_one_knew(tmp_path):
    config = load("tiny", f"data.source.path={tmp_path}", "data.source.kind=files")
    assert config.data.source.kind == "files"


def test_loading_leaves_its_input_alone():
    base = {"model": {"moe": {"moe_topk": 2}}}
    apply(base, {"model.moe.moe_topk": 1})
    assert base == {"model": {"moe": {"moe_topk": 2}}}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_layer=3", "Unknown key 'model.num_layer', did you mean 'num_layers'?"),
        ("modell.num_layers=3", "Unknown key 'modell', did you mean 'model'?"),
        ("model.embedding.ngram.oder=3", "Unknown key 'model.embedding.ngram.oder', did you mean 'order'?"),
        ("data.source.packges=[a]", "Unknown key 'data.source.packges', did you mean 'packages'?"),
        ("training.optimizer.learning_rat=1", "Unknown key 'training.optimizer.learning_rat', did you mean 'learning_rate'?"),
        ("model.num_layers=two", "'model.num_layers': input should be a valid integer, got 'two'."),
        ("model.num_layers=1.5", "'model.num_layers': input should be a valid integer, got 1.5."),
        ("model.num_layers=true", "'model.num_layers': input should be a valid integer, got True."),
        ("model.num_layers=0", "'model.num_layers': input should be greater than or equal to 1, got 0."),
        ("training.schedule.kind=linear", "'training.schedule.kind': input should be 'wsd' or 'cosine', got 'linear'."),
        ("model.attention.kind=mls", "'model.attention': there is no attention kind 'mls', did you mean 'mla'?"),
        ("model.num_layers", "Override 'model.num_layers': write it as dotted.key=value."),
        ("model.num_layers.deep=1", "'model.num_layers.deep': 'num_layers' is a value, not a node with keys below it."),
        ("model=3", "'model': input should be a valid dictionary or instance of ModelConfig, got 3."),
        ("training.micro_batch_size=3", "training.micro_batch_size 3 does not divide data.batch_size 4"),
        ("data.sequence_length=65", "data.sequence_length 65 is above model.max_position_embeddings 64"),
        ("training.schedule.warmup_steps=20", "schedule.warmup_steps is 20, not below steps 20"),
        ("model.attention.qk_rope_head_dim=7", "qk_rope_head_dim is 7"),
        ("data.seed=[1", "not valid YAML"),
        ("model.moe.kind=[1]", "'model.moe': there is no moe kind [1]; known here: moe"),
        ("model.moe.kind={a: 1}", "'model.moe': there is no moe kind {'a': 1}; known here: moe"),
        ("data.source.kind=[files]", "'data.source': input tag '['files']' found using 'kind' does not match any of the expected tags"),
        ("seed=2020-13-45", "'seed': input should be a valid integer, got '2020-13-45'."),
        ("seed=!!int foo", "Override 'seed=!!int foo', line 1, column 1: not valid YAML: this cannot be read as '!!int'."),
        ("seed=!!bool foo", "line 1, column 1: not valid YAML: this cannot be read as '!!bool'."),
        ("seed=!!timestamp 2020-13-45", "line 1, column 1: not valid YAML: this cannot be read as '!!timestamp'."),
        ("seed=!!map foo", "line 1, column 1: not valid YAML: expected a mapping node"),
        ("seed=" + "[" * 3000, "[...': not valid YAML: it is nested too deeply, take out brackets or indentation."),
        ("seed=a\0b", r"Override 'seed=a\x00b', line 1, column 2: not valid YAML: the character #x0000 is not allowed, remove it."),
        ("seed='a\nb", "line 2, column 2: not valid YAML: found unexpected end of stream."),
        ("mo\ndel=1", r"Unknown key 'mo\ndel', did you mean 'model'?"),
        ("seed=0x" + "f" * 5000, "'seed': input should be less than 2147483648, got a very long number."),
        ("seed=2147483648", "'seed': input should be less than 2147483648, got 2147483648."),
        ("data.seed=2147483648", "'data.seed': input should be less than 2147483648, got 2147483648."),
        ("model.embedding.ngram.vocab_ratio=.inf", "'model.embedding.ngram.vocab_ratio': input should be a finite number, got inf."),
        ("training.optimizer.learning_rate=.nan", "'training.optimizer.learning_rate': input should be a finite number, got nan."),
        ("data.source.package_share=-.inf", "'data.source.package_share': input should be a finite number, got -inf."),
        ("model..x=1", "'model..x': the dotted key has an empty part; write names with one dot between them"),
        (".=1", "'.': the dotted key has an empty part"),
        ("model.=1", "'model.': the dotted key has an empty part"),
    ],
)
def test_a_bad_override_gets_one_sentence_that_names_it(override, sentence):
    with pytest.raises(ConfigError) as caught:
        load("tiny", override)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sections_that_disagree_are_named_without_a_prefix():
    with pytest.raises(ConfigError) as caught:
        load("tiny", "data.sequence_length=65")
    assert str(caught.value) == "data.sequence_length 65 is above model.max_position_embeddings 64: make one fit the other."


def test_the_largest_seed_is_taken():
    config = load("tiny", f"seed={2**31 - 1}", f"data.seed={2**31 - 1}")
    assert config.seed == config.data.seed == 2**31 - 1


def test_unknown_presets_and_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no preset 'nanoo', did you mean 'nano'"):
        load("nanoo")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read: embedded null byte"):
        load("a\0.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [", "line 1, column 9: not valid YAML"),
        ("- a\n- b\n", "expected 'key: value' lines, found list"),
        ("seed: 1\nseed: 2\n", "the key 'seed' is there twice"),
        ("seed: !!python/object/apply:os.system [true]\n", "not valid YAML"),
        ("seed: 2020-13-45\n", "'seed': input should be a valid integer, got '2020-13-45'."),
        ("model: {}\nseed: !!int foo\n", "line 2, column 7: not valid YAML: this cannot be read as '!!int'."),
        ("seed: " + "[" * 3000, "not valid YAML: it is nested too deeply"),
        ("model: {}\nseed: 1\0\n", "line 2, column 8: not valid YAML: the character #x0000 is not allowed, remove it."),
    ],
)
def test_malformed_yaml_is_named_and_never_executed(tmp_path, text, sentence):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value) or sentence.startswith("'")  # a setting of the wrong type is named by its key
    assert "\n" not in str(caught.value)


def test_yaml_reads_numbers_as_numbers(tmp_path):
    path = tmp_path / "numbers.yaml"
    path.write_text("a: 1e-3\nb: 2.5E4\nc: 300_000\nd: 1e3\n")
    assert read_yaml(path) == {"a": 0.001, "b": 25000.0, "c": 300000, "d": 1000.0}
    path.write_text(write_yaml({"x": {"y": 1e-16}}))
    assert read_yaml(path) == {"x": {"y": 1e-16}}


def test_dates_stay_text(tmp_path):
    path = tmp_path / "dates.yaml"
    path.write_text("a: 2020-01-02\nb: 2020-01-02 10:00:00\nc: [2020-1-2]\n")
    assert read_yaml(path) == {"a": "2020-01-02", "b": "2020-01-02 10:00:00", "c": ["2020-1-2"]}
    path.write_text(write_yaml({"a": "2020-01-02"}))
    assert read_yaml(path) == {"a": "2020-01-02"}


def test_configurations_cannot_be_changed_in_place():
    with pytest.raises(Exception, match="frozen"):
        load("tiny").model.num_layers = 3
