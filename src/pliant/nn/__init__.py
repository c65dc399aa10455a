"""The plain modules that a compressed network is made of: factorized, rounded, coded, aligned."""
