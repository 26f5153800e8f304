"""Strategies decide what to train next (`strategies`). A strategy is a pure function of the outcomes so far (`protocol`)."""
