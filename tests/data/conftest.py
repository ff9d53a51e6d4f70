import pytest

from longcat_lab.config.data import DataConfig
from longcat_lab.data import prepare

VOCABULARY = 512


def tiny(**changes):
    """The standard library only, a few hundred kilobytes: prepared in about a second."""
    source = {"kind": "python_packages", "packages": ["stdlib"], "validation": ["jinja2"], "out_of_distribution": ["mpmath"]}
    values = {
        "source": source,
        "sequence_length": 64,
        "batch_size": 8,
        "train_bytes": 300_000,
        "validation_bytes": 40_000,
        "out_of_distribution_bytes": 40_000,
        "tokenizer_bytes": 100_000,
    }
    return DataConfig.model_validate(values | changes)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def corpus(cache):
    return prepare(tiny(), VOCABULARY, cache)


@pytest.fixture
def config():
    """The function that makes a tiny configuration, with changes."""
    return tiny
