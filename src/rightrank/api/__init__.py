"""The Python API: one function for each verb, records in and records out, nothing printed. The command line is a thin layer over it."""
