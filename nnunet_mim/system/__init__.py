"""Files, locks, processes, cores and memory of the machine."""
