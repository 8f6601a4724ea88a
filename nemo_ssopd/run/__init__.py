"""Everything about processes: command line, workers, stop signals, watchdog, SLURM."""
