"""What large runs cost: a journal of 10,000 trials, 500 trainings, 200 arms in a pass, five million rows."""
