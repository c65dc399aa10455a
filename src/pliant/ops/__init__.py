"""Changes to a model, as data, and what is needed to plan them."""
