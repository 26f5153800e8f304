"""Plug-ins: a folder each, found by the door in `rightrank.runs.plugins`; nothing outside this package imports one.

plan (memory and time before any training), cluster (workers in processes and on Ray), atlas (what public sweeps found).
"""
