"""``python -m dapt.cli`` is the ``dapt`` command, for launchers that want a module."""

from dapt.cli import main

main()
