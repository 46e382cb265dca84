"""Ranks and engines: single, DDP, FSDP2, HSDP and DeepSpeed ZeRO behind one contract."""
