"""What pruning methods share: `pruner` calls, in turn, what the other modules do.

`channels` finds the groups of channels that can leave, `scores` says what each is worth, `ranking`
puts them in order, `allocate` takes as few as the ratio or the budget asks for, `schedule` says
when, and `channels` removes them. `blocks` and `sparse` do for whole blocks and single weights what
`channels` does for channels.
"""
