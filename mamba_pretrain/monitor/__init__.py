"""What a run tells the world: metrics, sinks, throughput, watchdog, report."""
