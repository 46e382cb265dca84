"""What a run will need, computed before it queues: memory, time, communication, disk, and what looks wrong."""
