"""What a run shows: tables on the terminal, one HTML file to look at."""

from secateur.report.report import LayerCut, Metric, Report, Sample

__all__ = ["LayerCut", "Metric", "Report", "Sample"]
