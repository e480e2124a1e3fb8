"""What a run will take, said before it begins: memory, disk, time; and what would make it fit.

Everything follows from the config and the headers of a checkpoint; no weight is read. What a method takes is asked of
its kind, its statistics (``needs``) and its descriptor, never of its name.
"""

from secateur.estimate.result import Estimate

__all__ = ["Estimate"]
