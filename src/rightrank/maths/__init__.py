"""Pure mathematics: no files, no models."""
