"""Channels that leave a network: `pruner` holds the flow, the other rooms what it is made of.

`scores` say what units are worth, `ranking` puts them in order, `allocate` spends the ratio or the
budget on them, `schedule` says when, and `channels` is the pattern: what one unit is, and how it
leaves. Other patterns (whole layers, single weights) stand beside `channels`.
"""
