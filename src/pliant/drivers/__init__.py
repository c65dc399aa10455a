"""Who calls a run while a network trains: our own loop, Lightning or Transformers."""
