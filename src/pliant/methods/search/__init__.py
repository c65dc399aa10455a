"""Methods that search for the architecture itself."""
