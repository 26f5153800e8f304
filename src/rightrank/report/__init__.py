"""Views of a run: figures as plain data, pages, tables and sentences that are computed from its records. Nothing here writes records."""
