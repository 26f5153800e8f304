"""What to train next: strategies, pure functions of the outcomes so far."""
