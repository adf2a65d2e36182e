"""Everything that touches Ray's private surface."""
