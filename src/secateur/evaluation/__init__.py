"""What a model is worth: perplexity, speed, size and zero-shot tasks, always beside the dense baseline."""

from secateur.evaluation.base import Checked, Evaluation, Settings
from secateur.evaluation.tables import Table
from secateur.evaluation.tasks import evaluate_models, make_network_tasks, make_task

__all__ = ["Checked", "Evaluation", "Settings", "Table", "evaluate_models", "make_network_tasks", "make_task"]
