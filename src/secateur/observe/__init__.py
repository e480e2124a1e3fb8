"""Statistics of calibration data, and the walk that collects them block by block."""

from secateur.observe.changes import Angle, Change, LastTokens, Similarity, angles
from secateur.observe.ending import Ending
from secateur.observe.featuremaps import MapRanks
from secateur.observe.products import Cross, Gram, Lost
from secateur.observe.statistics import (
    Amplitudes,
    Contributions,
    Moments,
    Needs,
    SequenceMoments,
    Statistic,
    SumSquares,
    beside_dense,
    of_ending,
)

__all__ = [
    "Amplitudes",
    "Angle",
    "Change",
    "Contributions",
    "Cross",
    "Ending",
    "Gram",
    "LastTokens",
    "Lost",
    "MapRanks",
    "Moments",
    "Needs",
    "SequenceMoments",
    "Similarity",
    "Statistic",
    "SumSquares",
    "angles",
    "beside_dense",
    "of_ending",
]
