"""Plug-ins: a folder each, found by the door in `rightrank.runs.plugins`; nothing outside this package imports one.

plan (memory and time before any training), cluster (workers in processes and on Ray), judge (blind pairs for people or a
program), fleet (many adapters at one rank), images (training functions for images), allocate (a rank for each module).
"""
