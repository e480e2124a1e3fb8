"""Sweeps: one recipe at many settings, on several workers, with one table at the end."""
