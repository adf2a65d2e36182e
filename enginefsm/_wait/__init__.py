"""The wait for calls, for threads and for event loops."""
