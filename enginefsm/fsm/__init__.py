"""The state machine of one engine, and the rules that move it. Pure: no Ray cluster, no threads, no metrics."""
