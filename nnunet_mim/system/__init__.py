"""Files, locks, processes, cores and memory of the machine, and flags of commands."""
