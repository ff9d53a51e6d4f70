"""What a run reads: where the text comes from, how much of it, and how it is cut into sequences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longcat_lab.node import Node


class PythonPackages(Node):
    """Python source that is on this machine already: the standard library and the installed dependencies of this package."""

    kind: Literal["python_packages"] = Field("python_packages", description="Source of the text: installed Python packages, no download.")
    packages: list[str] | None = Field(
        None,
        description="Packages to train on: distribution names, or 'stdlib' for the standard library; "
        "none means the standard library and every installed dependency of longcat_lab.",
    )
    validation: list[str] = Field(
        ["networkx", "jinja2", "fsspec"],  # torch itself requires these three, so they are always there
        min_length=1,
        description="Packages held out for validation: installed, and never trained on.",
    )
    out_of_distribution: list[str] = Field(
        ["sympy", "mpmath"],  # also required by torch; symbolic mathematics, and the numerics under it in the same style
        description="Packages of another style, held out to measure generalization; an empty list makes no such split.",
    )
    package_share: float = Field(
        0.15,
        gt=0,
        le=1,
        description="Largest share of a split that one package may fill while other packages have text left.",
    )

    @model_validator(mode="after")
    def _held_out_once(self) -> PythonPackages:
        both = sorted(set(self.validation) & set(self.out_of_distribution))
        if both:
            raise ValueError(f"{', '.join(both)} cannot be both validation and out_of_distribution, remove it from one of the lists")
        return self


class Files(Node):
    """Text on a local disk."""

    kind: Literal["files"] = Field("files", description="Source of the text: local .txt, .md, .py, .jsonl or .parquet files.")
    path: str = Field(min_length=1, description="A file, or a folder that is searched with its subfolders.")
    text_field: str = Field("text", min_length=1, description="Field (.jsonl) or column (.parquet) that holds a document's text.")
    validation_path: str | None = Field(
        None, description="File or folder held out for validation; none takes some of the documents under `path`."
    )
    out_of_distribution_path: str | None = Field(None, description="File or folder of another style, held out; none makes no such split.")


class HuggingFace(Node):
    """A dataset of the Hugging Face hub, streamed: only the part that is used is downloaded."""

    kind: Literal["huggingface"] = Field("huggingface", description="Source of the text: a streamed Hugging Face dataset.")
    name: str = Field(min_length=1, description="Dataset on the hub, such as 'HuggingFaceFW/fineweb-edu', or a local dataset folder.")
    config: str | None = Field(None, description="Configuration (subset) of the dataset; none takes its default.")
    split: str = Field("train", min_length=1, description="Split of the dataset to read; validation is held out of it.")
    text_field: str = Field("text", min_length=1, description="Column that holds a document's text.")
    revision: str | None = Field(None, description="Commit or tag of the dataset; set it so that the text cannot change between runs.")


Source = Annotated[PythonPackages | Files | HuggingFace, Field(discriminator="kind")]


class DataConfig(Node):
    """Text, how much of it, and the batches made of it. The vocabulary size belongs to the model (`model.vocab_size`)."""

    source: Source = Field(PythonPackages(), description="Where the text comes from.")
    sequence_length: int = Field(256, ge=1, description="Tokens per training sequence.")
    batch_size: int = Field(8, ge=1, description="Sequences per optimizer step, over all cards together.")
    train_bytes: int = Field(16_000_000, ge=1, description="Most bytes of text to train on.")
    validation_bytes: int = Field(1_000_000, ge=1, description="Most bytes of text to validate on.")
    out_of_distribution_bytes: int = Field(
        1_000_000, ge=0, description="Most bytes of text in the out-of-distribution split; 0 makes no such split."
    )
    tokenizer_bytes: int = Field(4_000_000, ge=1, description="Most bytes of training text that the tokenizer is learned from.")
    seed: int = Field(0, ge=0, lt=2**31, description="Order of the training sequences; separate from the model's seed: variants share it.")
