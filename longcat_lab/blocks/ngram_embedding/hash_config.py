"""What every kind with hashed n-gram tables can set: which n-grams, how many tables of what size, which hash, where n-grams end."""

from __future__ import annotations

from itertools import count
from typing import ClassVar, Literal

from pydantic import Field

from longcat_lab.blocks.interface import BlockConfig, ModelShape
from longcat_lab.blocks.ngram_embedding.hash_op import HashPlan, make_plan, table_moduli
from longcat_lab.blocks.ngram_embedding.numbers import is_prime
from longcat_lab.node import ConfigError

HashFamily = Literal["polynomial", "prime_base", "random_base", "multiplicative_xor", "permuted"]


class HashSettings(BlockConfig):
    """Tables for orders 2 to `order`, `splits` a order, one behind the other in that sequence."""

    where: ClassVar[str] = "model.embedding.ngram"  # how errors call this node
    shares_width: ClassVar[bool] = True  # the tables' rows divide hidden_size among them, unless table_width is set

    order: int = Field(3, ge=2, le=16, description="longest n-gram, in tokens; orders 2 to this one have tables")
    splits: int = Field(2, ge=1, description="hash tables for each order")
    vocab_ratio: float = Field(
        12.567, gt=0, le=1000, description="rows of a table as a multiple of vocab_size; keep away from simple fractions"
    )
    table_rows: int | None = Field(
        None,
        ge=1,
        description="rows of the first table, in place of vocab_ratio; each further one has 2 more (with prime sizes: the next prime)",
    )
    table_width: int | None = Field(None, ge=1, description="width of a table's rows; empty: an equal share of hidden_size")
    hash: HashFamily = Field(
        "polynomial",
        description="polynomial: LongCat's, base vocab_size; prime_base, random_base: another base; multiplicative_xor: odd multipliers, "
        "prime sizes; permuted: polynomial over token ids in a fixed random order",
    )
    prime_sizes: bool = Field(False, description="sizes are the next primes (multiplicative_xor always has them)")
    hash_seed: int = Field(0, ge=0, lt=2**31, description="draws bases, multipliers and the order of ids; LongCat's hash draws nothing")
    multipliers: list[int] | None = Field(
        None, description="multiplicative_xor: one odd number a lag, the current token's first; empty: drawn"
    )
    boundary: Literal["documents", "eos", "none"] = Field(
        "documents", description="what n-grams do not reach across: other documents, an end-of-sequence token, or nothing"
    )
    pad: Literal["zero", "reserved", "eos"] = Field(
        "zero", description="what stands where there is no token: id 0, an id of its own (vocab_size, base vocab_size + 1), or eos_token_id"
    )
    eos_token_id: int | None = Field(None, ge=0, description="for boundary and pad `eos`")
    eos_looks_back: bool = Field(True, description="boundary eos: n-grams of the end-of-sequence token itself reach back")

    @property
    def tables(self) -> int:
        """E, the number of tables."""
        return (self.order - 1) * self.splits

    def moduli(self, vocab_size: int) -> list[int]:
        """Rows of each table."""
        if self.prime_sizes or self.hash == "multiplicative_xor":
            primes = (p for p in count(self.table_rows or int(self.vocab_ratio * vocab_size) + 1) if is_prime(p))
            return [next(primes) for _ in range(self.tables)]
        if self.table_rows is not None:
            return [self.table_rows + 2 * i for i in range(self.tables)]
        return table_moduli(vocab_size, self.vocab_ratio, self.order, self.splits)

    def width(self, shape: ModelShape) -> int:
        """d, the width of a table's rows."""
        return self.table_width or shape.hidden_size // self.tables

    def plan(self, vocab_size: int, salt: int = 0) -> HashPlan:
        """The hash with every number in it. salt: another one of the same family for another layer."""
        return make_plan(self, vocab_size, self.moduli(vocab_size), salt)

    def table_params(self, shape: ModelShape) -> int:
        return sum(self.moduli(shape.vocab_size)) * self.width(shape)

    def check(self, shape: ModelShape) -> None:
        where, vocab = self.where, shape.vocab_size
        if self.table_width is None and shape.hidden_size % self.tables:
            raise ConfigError(
                f"{where}: {self.tables} tables ((order - 1) * splits) do not divide hidden_size {shape.hidden_size}: "
                "change order, splits or hidden_size, or set table_width."
            )
        if self.table_rows is None and int(self.vocab_ratio * vocab) < 1:
            raise ConfigError(
                f"{where}.vocab_ratio: {self.vocab_ratio} of vocab_size {vocab} gives tables without rows: raise it above 1 / vocab_size "
                f"({1 / vocab:.2g}), or set table_rows."
            )
        if "eos" in (self.boundary, self.pad) and self.eos_token_id is None:
            raise ConfigError(f"{where}.eos_token_id is empty, but boundary or pad is eos: write the token's id.")
        if self.eos_token_id is not None and self.eos_token_id >= vocab:
            raise ConfigError(f"{where}.eos_token_id: {self.eos_token_id} is no token of vocab_size {vocab}: write an id below it.")
        if self.multipliers is not None and self.hash != "multiplicative_xor":
            raise ConfigError(f"{where}.multipliers are for hash multiplicative_xor, and hash is {self.hash}: write null, or that hash.")
        if self.multipliers is not None and (len(self.multipliers) < self.order or any(m < 1 or m % 2 == 0 for m in self.multipliers)):
            raise ConfigError(
                f"{where}.multipliers: {self.multipliers} are not {self.order} (order) odd numbers above 0: write so many, or null."
            )
        self.plan(vocab).check(where)
