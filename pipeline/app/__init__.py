"""The code that commands share, from the options of a command line to the search itself."""
