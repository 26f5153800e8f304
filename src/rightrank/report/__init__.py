"""What is shown: figures as plain data, pages, tables and sentences from the records."""
