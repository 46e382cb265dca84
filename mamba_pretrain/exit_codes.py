"""What the exit code of a run means to the shell, to Slurm and to the launch scripts."""

DONE = 0
FAILED = 1
BAD_INPUT = 2
REQUEUE = 85  # a checkpoint is saved (or the last one stands): start the same command again
