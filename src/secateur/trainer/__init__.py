"""Whole trainings from a recipe: data, network, optimizer, masks, evaluation, checkpoints, report.

``recipe`` is what a file may say, ``examples`` what is trained on, ``networks`` what is trained, ``training`` one
training in memory, and ``run`` one that leaves a folder.
"""

from secateur.trainer.recipe import TrainRecipe, load_train_recipe, make_train_recipe
from secateur.trainer.run import TrainedRun, run_training

__all__ = ["TrainRecipe", "TrainedRun", "load_train_recipe", "make_train_recipe", "run_training"]
