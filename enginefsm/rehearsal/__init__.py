"""Faults made on purpose, and engines to rehearse them on."""
