"""Several processes that prune one model together, started by torchrun or ``accelerate launch``.

Every process, a rank, walks its own consecutive part of the calibration windows; what they saw is merged in the order
of the ranks after every block, so that all of them decide the same. Rank 0 alone writes and speaks.

Nobody waits for a rank that has given up: ranks meet only in *rounds*, in which each says whether it goes on, and one
that fails says so in a last round, from which all others raise its error. A rank that dies without a word closes its
connections, and that ends the round of the others.
"""

from secateur.ranks.base import ALONE, Ranks
from secateur.ranks.start import join, started_as_main, wait_for_main

__all__ = ["ALONE", "Ranks", "join", "started_as_main", "wait_for_main"]
