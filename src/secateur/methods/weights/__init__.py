"""Methods that prune weights; one file each."""
