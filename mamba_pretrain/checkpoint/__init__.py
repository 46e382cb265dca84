"""One portable checkpoint for every engine and world size."""
