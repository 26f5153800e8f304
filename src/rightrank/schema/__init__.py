"""The vocabulary: settings, records, events, names of metrics, errors. No torch, no files."""
