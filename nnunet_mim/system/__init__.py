"""What this machine gives: files, locks, processes, cores and memory."""
