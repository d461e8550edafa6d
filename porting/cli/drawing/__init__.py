"""Output that several commands share: tables, and listeners that draw the library's progress on a terminal."""
