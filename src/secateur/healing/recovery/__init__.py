"""Recovery training: what is left of a cut model is trained for a while, on text or towards its dense teacher.

One trainer for every method: ``options`` says how, ``trained`` what (adapters, everything, norms and biases),
``losses`` towards what, and ``trainer`` does it, in steps that can be interrupted and repeated to the bit.
"""

from secateur.healing.recovery.capacity import check_guided
from secateur.healing.recovery.curve import Curve
from secateur.healing.recovery.options import (
    RecoveryOptions,
    make_recovery,
    parse_recovery,
    split_heal,
    stages_of,
    with_training,
)

__all__ = [
    "Curve",
    "RecoveryOptions",
    "check_guided",
    "make_recovery",
    "parse_recovery",
    "split_heal",
    "stages_of",
    "with_training",
]
