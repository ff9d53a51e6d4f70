"""Tasks that need one ability of an attention and are learned in minutes: recall of pairs, needles in text, copying.

loader = ProbeLoader(corpus, config.data, seed)                   # a Loader whose rows are probes, all or some of them
for batch, episodes in evaluation_probes(corpus, config.data.probe, length=256, batch_size=32):
    ...                                                           # always the same ones; episodes say what is asked, and how far back
"""

from longcat_lab.data.probes.alphabet import Alphabet, alphabet, check_vocabulary
from longcat_lab.data.probes.episode import Episode, draw
from longcat_lab.data.probes.loader import ProbeLoader, evaluation_probes

__all__ = ["Alphabet", "Episode", "ProbeLoader", "alphabet", "check_vocabulary", "draw", "evaluation_probes"]
