"""Read the result tables of other programs. What they decide belongs to `decision`."""
