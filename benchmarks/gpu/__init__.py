"""All that waits for a GPU, in the order of its worth, in one command that stops in time."""
