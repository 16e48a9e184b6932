"""Results for people: tables for the terminal, progress bars, pictures."""
