"""Read data: rows, their forms and splits, and files that are written atomically."""
