"""Methods that factorize layers into smaller ones."""
