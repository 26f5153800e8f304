"""The main job: a request is checked, prepared, trained, decided and handed over; the journal is its only state."""
