"""What low-rank methods share: ranks and forms planned for a budget, factors fitted to data."""
