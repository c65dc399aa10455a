"""What searches share: bilevel training, expected costs, and plain networks from mixed ones."""
