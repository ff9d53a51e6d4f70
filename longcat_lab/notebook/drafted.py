"""What the prediction steps save in real decoding, by the number of steps that draft."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import torch

from longcat_lab.data import evaluation_batches
from longcat_lab.errors import LabError
from longcat_lab.model import generate, speculate

if TYPE_CHECKING:
    import pandas

    from longcat_lab.config import RunConfig
    from longcat_lab.data import Corpus
    from longcat_lab.model import LongcatLM


def with_steps(model: LongcatLM, steps: int) -> LongcatLM:
    """The same weights, drafting with the first `steps` prediction steps only. It shares everything with `model`.

    Raises:
        LabError: the model was not trained to predict that far.
    """
    trained = model.config.mtp.num_nextn_predict_layers if model.config.mtp else 0
    if not 1 <= steps <= trained:
        raise LabError(f"with_steps: this model was trained with {trained} prediction steps; ask for 1 to {trained}, not {steps}.")
    fewer = copy.copy(model)  # modules are shared; only the configuration is its own
    fewer.config = model.config.model_copy(update={"mtp": model.config.mtp.model_copy(update={"num_nextn_predict_layers": steps})})
    return fewer


def prompts(corpus: Corpus, config: RunConfig, number: int, length: int, split: str = "validation") -> list[torch.Tensor]:
    """The first `length` tokens of the first `number` held-out sequences, int64 each."""
    return [batch.tokens[0, :length] for batch in evaluation_batches(corpus.split(split), config.data.sequence_length, 1, number)]


@torch.no_grad()
def after_real_text(model: LongcatLM, texts: list[torch.Tensor]) -> pandas.DataFrame:
    """One round of drafts right after each of `texts`: a row a number of drafting steps, `accepted_length` and `acceptance_K` as in
    `drafting_table`.

    A long continuation by a young model soon goes round in circles, which a step drafts right every time or never; here it has not begun.
    Step k's draft is judged where all before it held, so it stands behind the trunk's own choices: one pass over those tells all.
    """
    import pandas

    steps = model.config.mtp.num_nextn_predict_layers
    held, judged = [0] * steps, [0] * steps
    for text in texts:
        tokens, at = generate(model, text, steps + 1)[None], len(text) - 1
        for k, state in enumerate(model.ahead(model.hidden(tokens), tokens), 1):
            judged[k - 1] += 1
            if int(model.lm_head(state[0, at]).argmax()) != int(tokens[0, at + k + 1]):
                break
            held[k - 1] += 1
    shares = {f"acceptance_{k + 1}": held[k] / judged[k] if judged[k] else float("nan") for k in range(steps)}
    rows = [{"steps": n, "accepted_length": 1 + sum(held[:n]) / len(texts)} for n in range(steps + 1)]
    return pandas.DataFrame(rows).set_index("steps").assign(**shares)


def drafting_table(model: LongcatLM, texts: list[torch.Tensor], count: int) -> pandas.DataFrame:
    """A row a number of drafting steps, 0 (plain greedy decoding) to D; all decode `count` tokens after each of `texts`.

    accepted_length: tokens gained by one verifying pass of the trunk; work: tokens that went through the trunk for each token gained,
    rejected drafts included; seconds: of all texts on this machine; same_text: all texts are those of plain decoding, token for
    token; acceptance_K: share of step K's drafts that held, among those whose predecessors held.
    """
    import pandas

    started = time.perf_counter()
    plain = [generate(model, text, count) for text in texts]
    rows = [{"steps": 0, "accepted_length": 1.0, "work": 1.0, "seconds": time.perf_counter() - started, "same_text": True}]
    for steps in range(1, model.config.mtp.num_nextn_predict_layers + 1):
        started = time.perf_counter()
        found = [speculate(with_steps(model, steps), text, count) for text in texts]
        row = {
            "steps": steps,
            "accepted_length": 1 + sum(sum(each.accepted) for each in found) / max(sum(each.rounds for each in found), 1),
            "work": sum(each.rounds + sum(each.drafted) for each in found) / max(sum(each.generated - 1 for each in found), 1),
            "seconds": time.perf_counter() - started,
            "same_text": all(torch.equal(each.tokens, text) for each, text in zip(found, plain, strict=True)),
        }
        accepted, drafted = (torch.tensor([getattr(each, key) for each in found]).sum(0).tolist() for key in ("accepted", "drafted"))
        for k in range(steps):
            # A draft is judged only where all before it held; the last round of a text may draft fewer than there are steps.
            judged = min(drafted[k], accepted[k - 1]) if k else drafted[0]
            row[f"acceptance_{k + 1}"] = accepted[k] / judged if judged else float("nan")
        rows.append(row)
    return pandas.DataFrame(rows).set_index("steps")
