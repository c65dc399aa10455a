"""From scores and limits to a plan of edits: the allocator, and the planner of each run."""
