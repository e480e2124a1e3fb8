"""Statistics of calibration data, and the walk that collects them block by block."""

from secateur.observe.statistics import (
    Angle,
    Cross,
    Gram,
    Moments,
    Needs,
    SequenceMoments,
    Similarity,
    Statistic,
    SumSquares,
)

__all__ = ["Angle", "Cross", "Gram", "Moments", "Needs", "SequenceMoments", "Similarity", "Statistic", "SumSquares"]
