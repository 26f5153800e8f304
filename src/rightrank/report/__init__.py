"""What is shown: every figure is plain data first, drawn by thin backends."""
