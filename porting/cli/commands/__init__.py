"""One module per command: ``run(options)`` calls the library, prints the results and returns the exit status."""
