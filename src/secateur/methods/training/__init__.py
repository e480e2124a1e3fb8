"""Masks of single weights that hold while a network is trained."""
