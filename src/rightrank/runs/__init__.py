"""The main job: validate a request, prepare it, train, decide and export. The journal is its only state."""
