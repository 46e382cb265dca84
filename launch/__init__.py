"""From a config to a running Slurm job and back."""
