"""The engine that users hold, its record, and the registry of a monitor's engines."""
