"""Work inside trainings of other programs: callbacks, a function of the user, and their adapters in memory. Own trainings belong to `training`."""
