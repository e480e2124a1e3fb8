"""The engine: observe → score → allocate → Plan. It owns the loop over blocks; methods only supply the words."""

from secateur.engine.deciding import check_model, decide
from secateur.engine.run import Progress

__all__ = ["Progress", "check_model", "decide"]
