"""The subcommands, one module each: options and texts here, the work in the packages beside this one.

A module imports what its command needs when the command runs, so that `--help` works without the extras.
"""
