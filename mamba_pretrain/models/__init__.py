"""Language models built from mixers: Mamba-1, Mamba-2, attention."""
