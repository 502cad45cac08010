"""What the commands share, from the options of a command line to the search itself."""
