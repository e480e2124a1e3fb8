"""Networks that are trained many times: lottery tickets in rounds, and how stable training is."""

from secateur.rounds.controls import CONTROLS
from secateur.rounds.levels import Entry
from secateur.rounds.lottery import Lottery, Row, lottery, rows_of
from secateur.rounds.rounds import Rounds, rounds_methods
from secateur.rounds.run import EvaluateFunction, Run, TrainFunction

__all__ = [
    "CONTROLS",
    "Entry",
    "EvaluateFunction",
    "Lottery",
    "Rounds",
    "Row",
    "Run",
    "TrainFunction",
    "lottery",
    "rounds_methods",
    "rows_of",
]
