"""An engine: what users hold, and its record."""
