"""The command line: demo, status, watch, report, dashboards."""
