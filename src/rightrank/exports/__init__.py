"""What is handed over: the adapter folder and the card that holds its evidence."""
