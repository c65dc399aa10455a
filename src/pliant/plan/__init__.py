"""From scores and limits to a plan: one allocator, and the planner of a run."""
