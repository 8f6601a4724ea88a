"""Processes: command line, workers, signals, watchdog, SLURM."""
