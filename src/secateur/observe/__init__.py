"""Statistics of calibration data, and the walk that collects them block by block."""

from secateur.observe.ending import Ending
from secateur.observe.featuremaps import MapRanks
from secateur.observe.statistics import (
    Amplitudes,
    Angle,
    Change,
    Contributions,
    Cross,
    Gram,
    LastTokens,
    Lost,
    Moments,
    Needs,
    SequenceMoments,
    Similarity,
    Statistic,
    SumSquares,
    angles,
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
