"""Methods side by side at equal budgets: one sweep, one table, and a verdict that says how sure it is."""

from secateur.comparison.rows import Comparison, Row
from secateur.comparison.run import compare
from secateur.comparison.verdict import Verdict

__all__ = ["Comparison", "Row", "Verdict", "compare"]
