"""Methods that divide samples into groups."""
