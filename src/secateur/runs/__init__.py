"""Runs on disk: a folder with a journal, blocks that are finished one by one, and the checkpoint put together."""
