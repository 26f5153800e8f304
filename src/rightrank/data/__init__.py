"""Rows and files: what people bring, its forms, its splits, and files that are written whole."""
