"""The wait for calls, with one driver for threads and one for event loops."""
