"""Methods that remove heads and FFN neurons; one file each."""
