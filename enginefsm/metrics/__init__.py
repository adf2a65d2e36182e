"""The collector of Prometheus metrics, and its counters."""
