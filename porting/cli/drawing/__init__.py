"""Output that several commands share: tables, and listeners that draw progress on a terminal."""
