"""Recipes: merges written down, checked before a weight is read, and made again to the byte.

`model` has what a recipe says, as data. `reading` makes it of a file, by the tables of `keys`, and `mergekit` of a file
of mergekit's. `checks` finds what is wrong with it by itself, `headers` with its files. `running` does what it says;
`resolving` fills in what it leaves open.
"""
