"""The commands, a file each.

Such a file has ``add_parser(commands)``, which adds the command's parser, and ``run(options)``, which gives the exit
code. All of them are imported to answer ``--help``: what needs JAX, or prints tables, is imported by ``run``, from
`jaxmerge.cli.actions`. A new command is such a file, and its name here.
"""

# In the order in which they are listed.
COMMANDS = ("merge", "sweep", "verify", "inspect", "compare", "convert", "resize", "methods", "schema", "completion")
