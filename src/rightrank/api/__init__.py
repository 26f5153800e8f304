"""The Python API: one function for each verb. Functions take and return records and print nothing. The command line is a thin layer over it."""
