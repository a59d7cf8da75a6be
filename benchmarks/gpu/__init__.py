"""What only a GPU can tell: ``python -m benchmarks.gpu``, or ``make gpu``, once on such a machine.

It needs no network and nothing installed: a check whose packages are missing says so, and the
others are done.
"""
