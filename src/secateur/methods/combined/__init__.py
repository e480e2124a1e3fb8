"""Combinations of methods and allocators under one name, one file each."""
