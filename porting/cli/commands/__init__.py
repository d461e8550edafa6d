"""One module per command: ``run(options)`` calls the library, prints the results, returns the exit status."""
