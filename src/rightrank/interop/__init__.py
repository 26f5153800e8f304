"""Other programs: their tables of results, settings for trainers and servers, and the end of their trainings."""
