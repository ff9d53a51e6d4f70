"""Text as memory-mapped tokens: corpora, packing with document boundaries, a resumable loader, bits per byte, probe tasks.

corpus = prepare(config.data, vocab_size=config.model.vocab_size)
loader = Loader(corpus.split("train"), sequence_length=512, batch_size=32, seed=0)
batch = next(loader)                      # tokens, labels, document_ids: int64 [32, 512]
"""

from longcat_lab.data.batch import IGNORED, Batch, evaluation_batches, shuffled
from longcat_lab.data.corpus import Corpus, TokenSplit, open_corpus
from longcat_lab.data.loader import Loader
from longcat_lab.data.metric import bits_per_byte, label_bytes, scored
from longcat_lab.data.preparation import prepare
from longcat_lab.data.probes import Episode, ProbeLoader, evaluation_probes

__all__ = [
    "IGNORED",
    "Batch",
    "Corpus",
    "Episode",
    "Loader",
    "ProbeLoader",
    "TokenSplit",
    "bits_per_byte",
    "evaluation_batches",
    "evaluation_probes",
    "label_bytes",
    "open_corpus",
    "prepare",
    "scored",
    "shuffled",
]
