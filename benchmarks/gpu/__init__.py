"""Run all measurements that need a GPU, the most important first, with a time limit."""
