"""The command line: demo, status, watch, doctor, report, dashboards."""
