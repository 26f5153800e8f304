"""Read data: rows, their forms and splits, and files that are written atomically. Tables of results belong to `tables`."""
