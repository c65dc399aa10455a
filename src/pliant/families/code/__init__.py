"""What coding methods share: layers whose weights take only a few distinct values."""
