"""A run folder: its record, journal and tables, written and read again."""
