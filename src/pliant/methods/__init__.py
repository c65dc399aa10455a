"""One file per published method; the folder is its family."""
