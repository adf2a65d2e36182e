"""Programs that run as child processes. Each is started by its path and imports nothing of enginefsm."""
