"""What rank an update really has, and an adapter of that rank: inspect, resize, extract, allocate."""
