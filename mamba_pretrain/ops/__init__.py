"""Operations: one file each, with its reference and the choice of implementation."""
