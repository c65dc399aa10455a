"""Channels that leave: groups, scores, rounds and cuts."""
