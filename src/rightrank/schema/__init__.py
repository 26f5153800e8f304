"""Settings, records, events, metric names and errors. This package imports no torch and touches no files."""
