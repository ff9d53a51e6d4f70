"""Which tokens take how many real experts: routing on held-out text, by what each token is in Python source."""

from __future__ import annotations

import keyword
import re
from typing import TYPE_CHECKING

import numpy as np
import torch

from longcat_lab.blocks.moe.router import Router
from longcat_lab.data import evaluation_batches

if TYPE_CHECKING:
    import pandas
    from torch import Tensor, nn

    from longcat_lab.config import RunConfig
    from longcat_lab.data import Corpus
    from longcat_lab.model import LongcatLM

CLASSES = ("layout", "keyword", "name", "number", "operator", "string", "comment", "end of document")

# Tried in this order at each place, on text with one character a byte. A text may end inside a string, and a quote may stay open.
_LEXER = re.compile(
    r"""(?P<comment>\#[^\n]*)
    |(?P<string>(?:[rbfuRBFU]{1,2}(?=['"]))?(?:
        '''(?:\\.|[^\\])*?(?:'''|\Z)|\"\"\"(?:\\.|[^\\])*?(?:\"\"\"|\Z)|'(?:\\.|[^'\\\n])*'?|"(?:\\.|[^"\\\n])*"?))
    |(?P<number>\.?\d[\w.]*)
    |(?P<name>[A-Za-z_\x80-\xff][\w\x80-\xff]*)
    |(?P<layout>\s+)
    |(?P<operator>.)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)


def token_classes(tokens: np.ndarray, corpus: Corpus) -> np.ndarray:
    """What each token is in Python source: one of `CLASSES`, in the shape of `tokens`.

    A token is what its first character that is no space is; a token of nothing but spaces and line ends is layout. The pieces of a
    docstring are string. No parser is asked, so text that is no Python is labelled too, by its looks.

    Args:
        tokens: int64 [R, T], rows that follow one another in the text, from the start of a document on.
    """
    pieces = _spelled(corpus)
    flat, found = tokens.ravel(), np.empty(tokens.size, dtype=object)
    ends = [*np.flatnonzero(flat == corpus.eos_id), len(flat)]
    start = 0
    for end in ends:
        texts = [pieces[index] for index in flat[start:end]]
        kinds = _character_classes("".join(texts))
        at = 0
        for position, text in enumerate(texts, start):
            inked = len(text) - len(text.lstrip())
            found[position] = "layout" if inked == len(text) else CLASSES[kinds[at + inked]]
            at += len(text)
        if end < len(flat):
            found[end] = "end of document"
        start = end + 1
    return found.reshape(tokens.shape)


def _character_classes(text: str) -> np.ndarray:
    """The index in CLASSES of every character."""
    kinds = np.empty(len(text), dtype=np.int8)
    for match in _LEXER.finditer(text):
        kind = "keyword" if match.lastgroup == "name" and keyword.iskeyword(match.group()) else match.lastgroup
        kinds[match.start() : match.end()] = CLASSES.index(kind)
    return kinds


def _spelled(corpus: Corpus) -> dict[int, str]:
    """Token id to its bytes, a character each (some tokens are parts of a character, so they cannot be decoded alone)."""
    # Byte-level tokenizers spell printable bytes as themselves and the others as the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte = {chr(b): chr(b) for b in printable} | {chr(256 + i): chr(b) for i, b in enumerate(others)}
    vocabulary = corpus.tokenizer.get_vocab(with_added_tokens=True)
    return {index: "" if index == corpus.eos_id else "".join(byte[c] for c in token) for token, index in vocabulary.items()}


@torch.no_grad()
def real_experts(
    model: LongcatLM, corpus: Corpus, config: RunConfig, split: str = "validation"
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Real experts that each held-out token takes, counted from the routers' own picks.

    Returns:
        tokens int64 [R, T], the rows that evaluation reads; and by mixture (`layers.0.mlp`, ...) the counts int64 [R, T].
    """
    picked: dict[str, list[Tensor]] = {}

    def noting(name: str):
        def note(router: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
            picked.setdefault(name, []).append((output[0] < router.config.n_routed_experts).sum(-1).cpu())

        return note

    routers = {name.removesuffix(".router"): module for name, module in model.named_modules() if isinstance(module, Router)}
    hooks = [router.register_forward_hook(noting(name)) for name, router in routers.items()]
    device, was_training, rows = next(model.parameters()).device, model.training, []
    model.eval()
    try:
        for batch in evaluation_batches(
            corpus.split(split), config.data.sequence_length, config.data.batch_size, config.training.evaluation_sequences
        ):
            rows.append(batch.tokens)
            model.hidden(batch.tokens.to(device), batch.document_ids.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    tokens = torch.cat(rows)
    return tokens.numpy(), {name: torch.cat(each).view_as(tokens).numpy() for name, each in picked.items()}


def experts_by_class(model: LongcatLM, corpus: Corpus, config: RunConfig, split: str = "validation") -> pandas.DataFrame:
    """A row a mixture and class of tokens: how many `tokens`, their `mean` real experts, and its `standard_error`.

    The error takes the sequences as the sample, not the tokens: those of one sequence are of one file and route alike.
    """
    import pandas

    tokens, counts = real_experts(model, corpus, config, split)
    classes, rows = token_classes(tokens, corpus), []
    for name, taken in counts.items():
        for kind in CLASSES:
            own = classes == kind
            if own.any():
                mean, error = clustered_mean((taken * own).sum(1), own.sum(1))
                rows.append({"mixture": name, "class": kind, "tokens": int(own.sum()), "mean": mean, "standard_error": error})
    return pandas.DataFrame(rows)


def clustered_mean(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Mean of what lies in clusters of unequal size, and its standard error between clusters (NaN of one cluster).

    m = sum_r s_r / sum_r n_r,   se^2 = R / (R - 1) sum_r (s_r - m n_r)^2 / (sum_r n_r)^2   (ratio estimator, linearised)
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    total, clusters = counts.sum(), len(counts)
    mean = sums.sum() / total
    if clusters < 2:
        return float(mean), float("nan")
    return float(mean), float(np.sqrt(clusters / (clusters - 1) * ((sums - mean * counts) ** 2).sum()) / total)
