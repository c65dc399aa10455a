"""Campaigns against what a run may meet: kills, damaged files, flipped bits, hostile images.

``python -m tests.reliability --help`` says how to run them; the tests run a small part of each.
"""
