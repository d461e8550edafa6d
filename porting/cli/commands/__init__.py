"""One module per command: ``run(options)`` calls the library, draws what it hears, returns the exit status."""
