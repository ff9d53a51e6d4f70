"""What a run reads: where the text comes from, how much of it, and how it is cut into sequences."""

from __future__ import annotations

from typing import Annotated, Literal, Self

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


class ProbeConfig(Node):
    """What all probe tasks share: a sequence tells something, and later asks for it. What is told is new in each sequence."""

    share: float = Field(1.0, gt=0, le=1, description="Share of the training sequences that are probes; the others are ordinary text.")
    scored: Literal["answers", "all"] = Field("answers", description="Labels of a probe that are trained on: the answers, or every token.")
    filler: Literal["text", "random", "blank"] = Field(
        "text", description="Tokens around what is told: text of the source, random tokens that tell nothing, or one token again and again."
    )
    lengths: list[int] | None = Field(
        None,
        min_length=1,
        description="Easy probes first: training starts with sequences packed with probes of the first of these lengths, each a document "
        "of its own and made smaller where it must be; then come the other lengths, then whole probes. None means whole ones at once.",
    )
    length_samples: int = Field(3000, ge=1, description="Training sequences of each of `lengths`.")
    evaluation_episodes: int = Field(256, ge=1, description="Probes of each length that the model is tested on, always the same ones.")
    evaluation_lengths: list[int] | None = Field(
        None, min_length=1, description="Lengths of these probes, in tokens; none means data.sequence_length alone."
    )
    far: int | None = Field(
        None, ge=1, description="Answers told at least this many tokens before they are asked for are counted apart (probe_error_far)."
    )

    def shortest(self) -> int:
        """Tokens of the shortest sequence that the task fits into."""
        raise NotImplementedError

    def within(self, length: int) -> Self:
        """The same task, made smaller where it does not fit into `length` tokens; where that is impossible, as small as it can be."""
        raise NotImplementedError

    def ids(self) -> int:
        """Token ids that the task keeps for itself, besides the ones that mark places."""
        raise NotImplementedError


class Recall(ProbeConfig):
    """Multi-query associative recall: pairs of a key and a value, then some of the keys, each to be followed by its value."""

    kind: Literal["recall"] = Field("recall", description="Probe: pairs of tokens, then keys whose values are asked for.")
    filler: Literal["text", "random", "blank"] = Field("blank", description="Tokens around the pairs, where a sequence has room for any.")
    pairs: int = Field(8, ge=1, description="Pairs of a key and a value in a sequence; its keys differ.")
    queries: int = Field(
        8, ge=1, description="Keys that are asked for at the end of the sequence; each is drawn anew, so one may come twice."
    )
    key_tokens: int = Field(64, ge=1, description="Token ids that keys are drawn from.")
    value_tokens: int = Field(64, ge=2, description="Token ids that values are drawn from; chance is 1 / value_tokens.")
    places: Literal["random", "front"] = Field("random", description="Where the pairs stand before the queries: anywhere, or all in front.")

    @model_validator(mode="after")
    def _possible(self) -> Recall:
        if self.pairs > self.key_tokens:
            raise ValueError(f"pairs {self.pairs} is above key_tokens {self.key_tokens}: the keys of a sequence differ, raise key_tokens")
        return self

    def shortest(self) -> int:
        return 2 * (self.pairs + self.queries) - 1  # the last value is a label alone

    def within(self, length: int) -> Recall:
        pairs = self.pairs if length >= self.shortest() else min(self.pairs, max(1, (length + 1) // 4))
        return self.model_copy(update={"pairs": pairs, "queries": min(self.queries, max(1, (length + 1) // 2 - pairs))})

    def ids(self) -> int:
        return self.key_tokens + self.value_tokens


class Needle(ProbeConfig):
    """A needle in text: a mark, a key and a value somewhere; at the end the mark and the key again, and the value is asked for."""

    kind: Literal["needle"] = Field("needle", description="Probe: one key with its value in text, asked for at the end.")
    key_length: int = Field(1, ge=1, description="Tokens of a key.")
    value_length: int = Field(1, ge=1, description="Tokens of a value; an answer is right when all of them are.")
    key_tokens: int = Field(64, ge=1, description="Token ids that keys are drawn from.")
    value_tokens: int = Field(64, ge=2, description="Token ids that values are drawn from; chance is value_tokens ** -value_length.")

    @property
    def length(self) -> int:
        """Tokens of a needle, and of the question with its answer."""
        return 1 + self.key_length + self.value_length

    @property
    def others(self) -> int:
        """Needles that are not asked for."""
        return 0

    def shortest(self) -> int:
        # Two needles more than there are: wherever the one that is asked for stands, the others find room on its two sides.
        return self.length * (2 + (self.others and self.others + 1)) - 1

    def within(self, length: int) -> Needle:
        return self

    def ids(self) -> int:
        return self.key_tokens + self.value_tokens


class MultiKey(Needle):
    """As `needle`, among needles of other keys."""

    kind: Literal["multi_key"] = Field("multi_key", description="Probe: several keys with their values in text, one is asked for.")
    needles: int = Field(4, ge=1, description="Needles of other keys, which are not asked for.")

    @property
    def others(self) -> int:
        return self.needles

    def within(self, length: int) -> MultiKey:
        return self.model_copy(update={"needles": min(self.needles, max(0, (length + 1) // self.length - 3))})

    @model_validator(mode="after")
    def _possible(self) -> MultiKey:
        if self.key_tokens**self.key_length <= self.needles:
            raise ValueError(
                f"key_tokens {self.key_tokens} with key_length {self.key_length} is too few for {self.needles + 1} needles: raise one"
            )
        return self


class Copy(ProbeConfig):
    """A marked string of random tokens somewhere; at the end the mark again, and the string is asked for."""

    kind: Literal["copy"] = Field("copy", description="Probe: a string of random tokens that is to be repeated at the end.")
    string_length: int = Field(16, ge=1, description="Tokens of the string; none of them twice.")
    string_tokens: int = Field(64, ge=2, description="Token ids that the string is drawn from.")
    distance: int = Field(1, ge=1, description="Fewest tokens from a query back to the token that it asks for (never below string_length).")

    @model_validator(mode="after")
    def _possible(self) -> Copy:
        if self.string_length > self.string_tokens:
            raise ValueError(
                f"string_length {self.string_length} is above string_tokens {self.string_tokens}: its tokens differ, raise string_tokens"
            )
        return self

    def shortest(self) -> int:
        return self.string_length + 1 + max(self.distance, self.string_length)

    def within(self, length: int) -> Copy:
        size = min(self.string_length, max(1, (length - 1) // 2))
        return self.model_copy(update={"string_length": size, "distance": min(self.distance, max(1, length - 1 - size))})

    def ids(self) -> int:
        return self.string_tokens


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
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="Order of the training sequences; none takes the run's `seed`, which draws initial values too."
    )
    probe: Recall | Needle | MultiKey | Copy | None = Field(
        None, discriminator="kind", description="Probe task in the place of some or all of the text; none trains on text alone."
    )

    def probe_lengths(self) -> list[int]:
        """Lengths that a probe is evaluated at, in tokens."""
        return [] if self.probe is None else (self.probe.evaluation_lengths or [self.sequence_length])

    @model_validator(mode="after")
    def _probe_fits(self) -> DataConfig:
        for name, length in [("sequence_length", self.sequence_length), *(("probe.evaluation_lengths", n) for n in self.probe_lengths())]:
            if self.probe is not None and length < self.probe.shortest():
                raise ValueError(
                    f"{name} {length} is too short for this {self.probe.kind} probe, which needs {self.probe.shortest()} tokens: "
                    f"lengthen it or make the probe smaller"
                )
        for length in (self.probe.lengths if self.probe is not None else None) or ():
            least = self.probe.within(length).shortest()
            if not least <= length <= self.sequence_length:
                raise ValueError(
                    f"probe.lengths has {length}: a {self.probe.kind} probe has {least} tokens at least, and sequence_length is "
                    f"{self.sequence_length}"
                )
        if self.probe is not None and self.probe.far is not None and self.probe.far > max(self.probe_lengths()):
            raise ValueError(f"probe.far {self.probe.far} is above the longest probe ({max(self.probe_lengths())} tokens): lower it")
        return self
