"""Networks that are trained many times: lottery tickets in rounds, and how stable training is."""

from secateur.rounds.connecting import Curve, Distance, connect, distance, interpolate
from secateur.rounds.controls import CONTROLS
from secateur.rounds.levels import Entry
from secateur.rounds.lottery import Lottery, Row, lottery, rows_of
from secateur.rounds.rounds import Rounds, rounds_methods
from secateur.rounds.run import EvaluateFunction, Run, TrainFunction
from secateur.rounds.stability import Instability, Stability, instability

__all__ = [
    "CONTROLS",
    "Curve",
    "Distance",
    "Entry",
    "EvaluateFunction",
    "Instability",
    "Lottery",
    "Rounds",
    "Row",
    "Run",
    "Stability",
    "TrainFunction",
    "connect",
    "distance",
    "instability",
    "interpolate",
    "lottery",
    "rounds_methods",
    "rows_of",
]
