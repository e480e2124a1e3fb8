"""Is a checkpoint folder what it says it is? Everything is read in pieces, so that size is no reason to fail."""

from secateur.verification.run import Finding, verify_folder

__all__ = ["Finding", "verify_folder"]
