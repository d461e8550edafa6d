"""What several commands print: tables and listeners that draw on a terminal what the library reports."""
