"""Calls that an actor runs once, however often they are submitted."""
