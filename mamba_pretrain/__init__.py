"""Pretrain Mamba language models, from one CPU to a multi-node Slurm cluster."""

__version__ = "0.1.0"
