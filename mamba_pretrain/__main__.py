"""``python -m mamba_pretrain``: what torchrun, deepspeed and srun start."""

from mamba_pretrain.cli import main

if __name__ == "__main__":
    main()
