"""Bounded recovery and named failure for fleets of SGLang engines on Ray."""
