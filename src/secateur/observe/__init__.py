"""Statistics of calibration data, and the walk that collects them block by block."""

from secateur.observe.featuremaps import MapRanks
from secateur.observe.statistics import (
    Amplitudes,
    Angle,
    Change,
    Contributions,
    Cross,
    Gram,
    LastTokens,
    Moments,
    Needs,
    SequenceMoments,
    Similarity,
    Statistic,
    SumSquares,
    angles,
)

__all__ = [
    "Amplitudes",
    "Angle",
    "Change",
    "Contributions",
    "Cross",
    "Gram",
    "LastTokens",
    "MapRanks",
    "Moments",
    "Needs",
    "SequenceMoments",
    "Similarity",
    "Statistic",
    "SumSquares",
    "angles",
]
